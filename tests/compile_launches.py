"""Compiles what code launches for a GPU that is not there.

``python tests/compile_launches.py [CAPABILITY]`` prints what the kernels of
operators take. The interpreter must be off.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from kernels import draw
from test_depthwise import draw_branches
from test_operators import SPECS, draw_operands, kernels_of, outputs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from mmoverlock import ops
from mmoverlock.models.reparam import BRANCHES
from mmoverlock.ops import depthwise_conv2d, partial_sums, sum_of_branches
from mmoverlock.ops.dynamic_conv import triton as contmix
from mmoverlock.ops.excitation import Norm, excite_norms
from mmoverlock.ops.focus import triton as focus
from mmoverlock.ops.pointwise.triton import weight_grads

CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
PACKAGE = f'{ops.__name__}.'
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


def _name(kernel):
    return f'{kernel.__module__}.{kernel.__name__}'.removeprefix(PACKAGE)


def all_kernels():
    """Names of what is launched, but for ContMix, as compiling gives them."""
    return {
        _name(kernel)
        for module in pkgutil.walk_packages(ops.__path__, PACKAGE)
        for name, kernel in vars(importlib.import_module(module.name)).items()
        if name.endswith('_kernel') and isinstance(kernel, triton.JITFunction)
    }


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
        uses.append((_name(kernel), use))

    with patch.object(triton.JITFunction, 'run', compile_launch):
        run()
    return uses


def _differentiate(run):
    """Both passes on a CPU, whose tensors kernels are told to take."""
    with patch.object(partial_sums, 'triton', SimpleNamespace(JITFunction=())):
        out = outputs(run())
        sum(y.sum() for y in out).backward()


def compile_operators(capability, dtype, channels, operators=tuple(SPECS)):
    """Compile what operators on maps launch, with all that they can do."""

    def run():
        for operator in operators:
            # Few positions and many
            for shape in ((2, channels, 8, 9), (2, channels, 17, 16)):
                operands = draw_operands(operator, shape, dtype)
                _differentiate(partial(kernels_of(operator), **operands))

    return compile_launches(run, capability)


def compile_branches(capability, dtype, sizes, channels, height=56):
    """Compile what a convolution with its companions takes.

    Args:
        capability, dtype, channels: As above.
        sizes (Sequence[tuple]): Size and dilation of each.
        height (int): Of the map, by which tiles are chosen. Defaults to 56.
    """

    def run():
        x = draw(2, channels, height, height, dtype=dtype).requires_grad_()
        branches = draw_branches(sizes, channels, torch.float32)
        _differentiate(partial(sum_of_branches, x, branches, 'triton'))
        weight = branches[0].weight
        _differentiate(partial(depthwise_conv2d, x, weight, backend='triton'))

    return compile_launches(run, capability)


def compile_norms(capability, dtype, channels):
    """Compile norms of one map and of three, squeeze-excite behind them."""

    def run():
        weights = [(40, channels, 1, 1), (40,), (channels, 40, 1, 1)]
        weights = [draw(*shape) for shape in (*weights, (channels,))]
        shape = 2, channels, 14, 14
        for count in 1, 3:
            maps = [
                draw(*shape, dtype=dtype).requires_grad_()
                for _ in range(count)
            ]
            vectors = [draw(channels) for _ in range(4)]
            norm = Norm(*vectors, torch.ones((), dtype=torch.int64), 0.1, 1e-5)
            operands = maps, [norm] * count, *weights, 'triton'
            _differentiate(partial(excite_norms, *operands))

    return compile_launches(run, capability)


def compile_sums(capability, dtype):
    """Compile what adds up gradients of a Focus block, with the most of them.

    And the gradient of an average, which it adds to another one.
    """

    def run():
        x, y = (torch.empty(25088, n, dtype=dtype) for n in (384, 256))
        parts = weight_grads((x, y), (y, y), (y, y), (y, x), (y, x[:, :256]))
        sums = [part for pair in parts for part in pair]
        partial_sums.add(*((part, part[0].clone()) for part in sums))
        maps = (draw(2, 64, n, n, dtype=dtype) for n in (7, 14))
        focus._unpool(*maps)

    return compile_launches(run, capability)


def compile_contmix(capability, dtype, height, width, size):
    """Compile the kernels of ContMix for a map."""

    def run():
        shapes = (32, height, width), (32, 7, 7), (64, height, width)
        query, key, value = (draw(2, *shape, dtype=dtype) for shape in shapes)
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


def compile_all(capability, dtype):
    """Compile every kernel, some of them for several shapes.

    Returns:
        dict: By kind, see :func:`compile_launches`.
    """
    where = capability, dtype
    return dict(
        operators=compile_operators(*where, 640),
        norms=compile_norms(*where, 64) + compile_norms(*where, 320),
        sums=compile_sums(*where),
        branches=compile_branches(*where, ((5, 1), (3, 2)), 64),
        contmix=[
            *compile_contmix(*where, 14, 14, 13),
            *compile_contmix(*where, 50, 84, 13),
        ],
    )


if __name__ == '__main__':
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kinds = compile_all(capability, dtype)
        for size, channels, height in (
            (17, 64, 56),
            (15, 128, 28),
            (13, 256, 14),
            (7, 512, 7),
        ):
            kinds[f'{size} x {size}'] = compile_branches(
                capability,
                dtype,
                ((size, 1), *BRANCHES[size]),
                channels,
                height,
            )
        for kind, uses in kinds.items():
            print(capability, dtype, kind)
            for name, use in uses:
                print(f'    {name:22}', use)
