"""Compiles what code launches for a GPU that is not there.

``python tests/compile_launches.py [CAPABILITY]`` prints what the kernels of
operators take. The interpreter must be off.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from mmoverlock.models.reparam import BRANCHES
from mmoverlock.ops import partial_sums
from mmoverlock.ops.conv3x3 import triton as residual_conv
from mmoverlock.ops.depthwise.triton import branches as sums
from mmoverlock.ops.dynamic_conv import triton as contmix
from mmoverlock.ops.excitation import triton as squeeze_excite
from mmoverlock.ops.ffn import triton as feed_forward
from mmoverlock.ops.grn import triton as response_norm
from mmoverlock.ops.layernorm import triton as layer_norm
from mmoverlock.ops.prior import triton as update_prior
from mmoverlock.ops.residual import triton as scaled_residual

CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
TYPES = {
    torch.float32: '*fp32',
    torch.float16: '*fp16',
    torch.bfloat16: '*bf16',
    torch.float64: '*fp64',
    torch.int64: '*i64',
}


def compile_kernel(kernel, capability, args, constants, options=None):
    """Compile as a launch with such arguments would.

    Args:
        kernel (JITFunction): Of Triton.
        capability (int): Such as 90.
        args (Sequence): A dtype for a pointer, None, numbers, and tuples of
            numbers.
        constants (dict): Arguments by name that are constant.
        options (dict, optional): Such as the number of warps.

    Returns:
        dict: Numbers of registers, and bytes spilled and shared; these alone
        where nothing is assembled, see :func:`not_assembled`.
    """
    signature, attributes, constants = {}, {}, dict(constants)

    def describe(value, path):
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i)) for i, v in enumerate(value))
        if value is None or value == 1:
            constants[path] = value
            return 'constexpr'
        if isinstance(value, float):
            return 'fp32'
        if isinstance(value, torch.dtype) or value % 16 == 0:
            attributes[path] = [['tt.divisibility', 16]]
        return TYPES.get(value, 'i32')

    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif kernel.params[i].do_not_specialize:
            signature[name] = 'i32'
        else:
            signature[name] = describe(args[i], (i,))
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget('cuda', capability, 32)
    binary = triton.compile(source, target=target, options=options)
    if not binary.asm['cubin']:
        return dict(shared=binary.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary.asm['cubin'])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, '-res-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    return dict(
        registers=int(registers),
        spills=int(stack),
        shared=binary.metadata.shared,
    )


def not_assembled():
    """Have Triton compile to the assembler's language, no further.

    The assembler takes half of the time.
    """
    add_stages = CUDABackend.add_stages

    def add_all_but_the_last(backend, stages, *args):
        add_stages(backend, stages, *args)
        stages['cubin'] = lambda *args: b''

    return patch.object(CUDABackend, 'add_stages', add_all_but_the_last)


def _types(argument):
    """Dtypes in place of tensors."""
    if isinstance(argument, tuple):
        return tuple(map(_types, argument))
    return argument.dtype if isinstance(argument, torch.Tensor) else argument


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
        args = dict(zip(kernel.arg_names, args, strict=False))
        args |= {n: kwargs.pop(n) for n in kernel.arg_names if n in kwargs}
        constants = {
            p.name: args[p.name] for p in kernel.params if p.is_constexpr
        }
        args = [_types(args[name]) for name in kernel.arg_names]
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
        partial_sums.add((partial, weight, bias, bias))
        layer_norm.forward(x, bias, bias, 1e-6)
        layer_norm.backward(x, x, bias, 1e-6, x)

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
        _, state = squeeze_excite.forward(x, *weights, x, True)
        squeeze_excite.backward(x, x, *weights, x, state, True)
        _, *saved = response_norm.forward(x, bias, bias)
        response_norm.backward(x, x, bias, *saved)
        x = _empty_map(2, channels, 17, 16, dtype=dtype)
        squeeze_excite.forward(x, *weights, x)  # many positions
        response_norm.forward(x, bias, bias)
        response_norm.backward(x, x, bias, *saved)
        squeeze_excite.sum_positions(x, x, x, True)
        keep = torch.empty(2)
        scaled_residual.forward(x, x, weight, bias, keep)
        scaled_residual.backward(x, x, dtype, weight, keep)
        prior = _empty_map(2, channels, 17, 16, dtype=dtype)
        z = _empty_map(2, 4 * channels, 17, 16, dtype=dtype)
        operands = z, prior, weight, bias, weight, bias
        update_prior.forward(*operands)
        update_prior.backward(z, z, prior, weight, weight)

    return compile_launches(run, capability)


def compile_branches(capability, dtype, branches, channels, height=56):
    """Compile what a convolution with its companions takes.

    Args:
        capability, dtype, channels: As above.
        branches (Sequence[tuple]): Size and dilation of each.
        height (int): Of the map, by which tiles are chosen. Defaults to 56.
    """

    def run():
        x = _empty_map(2, channels, height, height, dtype=dtype)
        weights = [torch.empty(channels, 1, k, k) for k, _ in branches]
        norms = [torch.empty(channels) for _ in branches]
        dilations = [dilation for _, dilation in branches]
        eps = [1e-5] * len(branches)
        batches = [torch.empty((), dtype=torch.int64) for _ in branches]
        running = sums._Running(norms, norms, batches, [0.1] * len(branches))
        statistics, taps, first = sums._measure(x, weights, dilations, running)
        sums._forward(
            x, weights, norms, norms, dilations, eps, statistics, taps
        )
        sums._backward(
            x, x, first, taps, statistics, weights, norms, dilations, eps
        )

    return compile_launches(run, capability)


def compile_feed_forward(capability, dtype, channels):
    """Compile what the network behind a 1x1 convolution takes."""

    def run():
        x = _empty_map(2, channels, 8, 9, dtype=dtype)
        hidden = 4 * channels
        vector = torch.empty(hidden)
        bias = torch.empty(channels)
        parameters = (
            torch.empty(hidden, channels, 1, 1),
            vector,
            torch.empty(hidden, 1, 3, 3),
            vector,
            torch.empty(1, hidden, 1, 1),
            torch.empty(1, hidden, 1, 1),
            torch.empty(channels, hidden, 1, 1),
            bias,
            x,
            torch.empty(channels, 1, 1, 1),
            bias,
            torch.empty(2),
            True,
        )
        out, *saved = feed_forward.feed_forward(x, *parameters)
        feed_forward._feed_forward_backward(out, x, *saved, *parameters)

    return compile_launches(run, capability)


def compile_contmix(capability, dtype, height, width, size):
    """Compile the kernels of ContMix for a map."""

    def run():
        shapes = (32, height, width), (32, 7, 7), (64, height, width)
        query, key, value = (
            _empty_map(2, *shape, dtype=dtype) for shape in shapes
        )
        taps = 5**2 + size**2
        inputs = (
            query,
            key,
            torch.empty(taps, 49),
            torch.empty(taps),
            torch.empty(2, 9, 9),
            torch.empty(2, 2 * size - 1, 2 * size - 1),
            value,
            0.25,
        )
        out, *saved = contmix._mix.function(*inputs)
        contmix._mix_backward.function(out, *inputs, out, *saved)

    return compile_launches(run, capability)


if __name__ == '__main__':
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels in (64, 384, 1024):
            print(capability, dtype, channels, flush=True)
            for compile_all in (
                compile_passes,
                compile_fused_passes,
                compile_feed_forward,
            ):
                for name, use in compile_all(capability, dtype, channels):
                    print(f'    {name:22}', use, flush=True)
        for size, channels, height in (
            (17, 64, 56),
            (15, 128, 28),
            (13, 256, 14),
            (7, 512, 7),
        ):
            branches = ((size, 1), *BRANCHES[size])
            print(capability, dtype, size, flush=True)
            for name, use in compile_branches(
                capability, dtype, branches, channels, height
            ):
                print(f'    {name:22}', use, flush=True)
