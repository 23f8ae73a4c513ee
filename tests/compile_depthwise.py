"""Compiles the kernels of depthwise/triton.py for a GPU that is not there.

``python tests/compile_depthwise.py [CAPABILITY]`` prints what kernels take
for the kernel sizes of the network.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmoverlock.models.reparam import BRANCHES
from mmoverlock.ops.depthwise import triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
TYPES = {
    torch.float32: '*fp32',
    torch.float16: '*fp16',
    torch.bfloat16: '*bf16',
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
        dict: Numbers of registers, and bytes spilled and shared.
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


def compile_all(capability, branches, rows, layout, dtype):
    """Compile what a convolution with its companions takes.

    Args:
        capability (int): Such as 90.
        branches (tuple): (size, dilation) of each.
        rows (int): Of a tile.
        layout (str): 'NCHW' or 'NHWC'.
        dtype (torch.dtype): Of the map.

    Returns:
        dict: By name of the kernel, see :func:`compile_kernel`.
    """
    channels, height, width = 64, 200, 336
    if layout == 'NHWC':
        strides = (channels * height * width, 1, width * channels, channels)
        lanes = 8, 32
    else:
        strides = (channels * height * width, height * width, width, 1)
        lanes = 16, 8
    table = kernels._branches(*zip(*branches, strict=True))
    sums = torch.float32
    shape = channels, height, width
    more = 1 << 20, *strides
    common = dict(T=rows, LANES=lanes)
    every = dict(common, BRANCHES=table)
    one = dict(common, K=branches[0][0], D=branches[0][1])
    arguments = {
        '_sum_kernel': (
            (dtype, sums, sums, dtype, *shape, more, strides),
            every,
        ),
        '_branch_grads_kernel': (
            (dtype, dtype, sums, sums, dtype, *shape, strides, strides, more),
            every,
        ),
        '_statistics_kernel': (
            (dtype, sums, sums, *shape, 99, strides),
            every,
        ),
        '_weight_grad_kernel': (
            (dtype, dtype, sums, *shape, 99, strides, strides),
            one,
        ),
    }
    return {
        name: compile_kernel(getattr(kernels, name), capability, *values)
        for name, values in arguments.items()
    }


def main():
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for size in (7, 13, 15, 17):
        branches = ((size, 1), *BRANCHES[size])
        for layout in ('NHWC', 'NCHW'):
            for dtype in (torch.bfloat16, torch.float32):
                for rows in kernels.TILES:
                    print(capability, size, layout, dtype, rows, flush=True)
                    for name, use in compile_all(
                        capability, branches, rows, layout, dtype
                    ).items():
                        print(f'    {name:22}', use, flush=True)


if __name__ == '__main__':
    main()
