"""Compiles what code launches for a GPU that is not there.

``python tests/compile_launches.py [CAPABILITY]`` prints what the kernels of
passes over maps take. The interpreter must be off.
"""

import sys
from unittest.mock import patch

import torch
import triton
from compile_depthwise import compile_kernel

from mmoverlock.ops import partial_sums
from mmoverlock.ops.layer_norm import triton as layer_norm
from mmoverlock.ops.residual_conv import triton as residual_conv
from mmoverlock.ops.scaled_residual import triton as scaled_residual
from mmoverlock.ops.squeeze_excite import triton as squeeze_excite
from mmoverlock.ops.update_prior import triton as update_prior


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


def _empty_map(*shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def compile_passes(capability, dtype, channels):
    """Compile the kernels of convolution and norm, with all they can do."""

    def run():
        x, y = (_empty_map(2, channels, 8, 9, dtype=dtype) for _ in range(2))
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


def compile_fused_passes(capability, dtype, channels):
    """Compile the kernels of the others, with all that they can do."""

    def run():
        bias, weight = torch.empty(channels), torch.empty(channels, 1, 1, 1)
        hidden = max(16, channels // 8)
        weights = (
            torch.empty(hidden, channels, 1, 1),
            torch.empty(hidden),
            torch.empty(channels, hidden, 1, 1),
            bias,
        )
        x = _empty_map(2, channels, 8, 9, dtype=dtype)
        _, state = squeeze_excite.forward(x, *weights, x)
        squeeze_excite.backward(x, x, *weights, x, state)
        x = _empty_map(2, channels, 17, 16, dtype=dtype)
        squeeze_excite.forward(x, *weights, x)  # many positions
        squeeze_excite.sum_positions(x, x, x)
        keep = torch.empty(2)
        scaled_residual.forward(x, x, weight, bias, keep)
        scaled_residual.backward(x, x, dtype, weight, bias, keep)
        prior = _empty_map(2, channels, 17, 16, dtype=dtype)
        z = _empty_map(2, 4 * channels, 17, 16, dtype=dtype)
        operands = z, prior, weight, bias, weight, bias
        update_prior.forward(*operands)
        update_prior.backward(z, z, prior, weight, weight)

    return compile_launches(run, capability)


if __name__ == '__main__':
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels in (64, 384, 1024):
            print(capability, dtype, channels, flush=True)
            for compile_all in (compile_passes, compile_fused_passes):
                for name, use in compile_all(capability, dtype, channels):
                    print(f'    {name:22}', use, flush=True)
