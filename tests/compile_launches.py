"""Compiles what code launches for a GPU that is not there.

``python tests/compile_launches.py [CAPABILITY]`` prints what the kernels of
residual_conv and layer_norm take. The interpreter must be off.
"""

import sys
from unittest.mock import patch

import torch
import triton
from compile_depthwise import compile_kernel

from mmoverlock.ops import partial_sums
from mmoverlock.ops.layer_norm import triton as layer_norm
from mmoverlock.ops.residual_conv import triton as residual_conv


def compile_launches(run, capability):
    """Compile every kernel that a function launches, on operands on a CPU.

    Args:
        run (callable): It gets back what it makes of empty memory.
        capability (int): Such as 90.

    Returns:
        list[tuple[str, dict]]: Names, and see :func:`compile_kernel`.
    """
    uses = []

    def compile_launch(kernel, *args, grid, warmup, **kwargs):
        constants = {n: kwargs.pop(n) for n in kernel.arg_names if n in kwargs}
        args = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
        use = compile_kernel(kernel, capability, args, constants, kwargs)
        uses.append((kernel.__name__, use))

    with patch.object(triton.JITFunction, 'run', compile_launch):
        run()
    return uses


def compile_passes(capability, dtype, channels):
    """Compile the kernels of all passes, with all that they can do."""

    def run():
        x, y = (
            torch.empty(2, channels, 8, 9, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        weight, bias = torch.empty(channels, 1, 3, 3), torch.empty(channels)
        scale = torch.empty(2, channels)
        residual_conv.forward(x, weight, bias, gelu=True, squares=True)
        _, partial = residual_conv.backward(
            x, x, weight, y, scale, scale, gelu=True, sum_grad_x=True
        )
        partial_sums.add(partial, weight, bias, bias)
        layer_norm.forward(x, bias, bias, 1e-6)
        layer_norm.backward(x, x, bias, 1e-6)

    return compile_launches(run, capability)


if __name__ == '__main__':
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels in (64, 384, 1024):
            print(capability, dtype, channels, flush=True)
            for name, use in compile_passes(capability, dtype, channels):
                print(f'    {name:22}', use, flush=True)
