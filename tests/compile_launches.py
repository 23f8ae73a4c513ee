"""Compiles what code launches for a GPU that is not there.

The interpreter must be off.
"""

import importlib
import pkgutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from kernels import draw
from test_depthwise import draw_branches, parameters_of
from test_operators import (
    SPECS,
    branches,
    draw_operands,
    kernels_of,
    outputs,
)
from torch import distributed
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import count
from benchmarks.kernels import usage
from mmoverlock import ops
from mmoverlock.ops import (
    conv_norm,
    depthwise_conv2d,
    feed_forward,
    partial_sums,
    residual_conv,
    sum_of_branches,
)
from mmoverlock.ops.batch_norm import Norm
from mmoverlock.ops.batch_norm import triton as batch_norm
from mmoverlock.ops.blocks.triton import focus
from mmoverlock.ops.dynamic_conv import triton as contmix
from mmoverlock.ops.pointwise.triton import WeightGrad, weight_grads

PACKAGE = f'{ops.__name__}.'
LARGE = (13, 1), (3, 2)  # what runs on tensor cores in 16 bits, and the rest


class Driver(count._Driver):
    """Of a GPU of some capability, such as 90."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget('cuda', self.capability, 32)

    def get_current_device(self):
        return self.capability


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


def compile_launches(run, capability):
    """Compile every kernel that a function launches.

    Args:
        run (callable): Its operands are without data.
        capability (int): Such as 90.

    Returns:
        list[tuple[str, dict]]: Names, numbers of registers and of stores, and
        bytes spilled and shared.
    """
    uses = {}
    launch = triton.JITFunction.run

    def compile_launch(kernel, *args, grid, warmup, **kwargs):
        binary = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        if binary.hash not in uses:
            registers, spills = usage(binary.asm['cubin'])
            use = dict(registers=registers, spills=spills)
            use['shared'] = binary.metadata.shared
            use['stores'] = binary.asm['ptx'].count('st.global')
            uses[binary.hash] = _name(kernel), use

    patches = [
        patch.object(triton.JITFunction, 'run', compile_launch),
        patch.object(type(driver), 'active', Driver(capability)),
        # As many for two images as a GPU has for a batch
        patch.object(partial_sums, 'programs', lambda device, most: most),
        patch.object(distributed, 'get_world_size', lambda group: 2),
        patch.object(batch_norm, '_all_gather', lambda *args: None),
        patch.object(distributed, 'all_reduce', lambda *args, **kwargs: None),
    ]
    with count._on_gpu('meta', patches):
        run()
    return [*uses.values()]


def _without_data(tensor):
    return tensor.detach().to('meta').requires_grad_(tensor.requires_grad)


def compile_operators(capability, dtype, channels, operators=tuple(SPECS)):
    """Compile what operators on maps launch, both ways."""
    problems = []
    for operator in operators:
        # Few positions and many
        for shape in ((2, channels, 8, 9), (2, channels, 17, 16)):
            operands = draw_operands(operator, shape, dtype)
            for name, operand in operands.items():
                if torch.is_tensor(operand):
                    operands[name] = _without_data(operand)
            problems.append((operator, operands))

    def run():
        for operator, operands in problems:
            out = outputs(kernels_of(operator)(**operands))
            sum(y.sum() for y in out if y.requires_grad).backward()

    return compile_launches(run, capability)


def compile_branches(capability, dtype, sizes, channels, height):
    """Compile what a convolution with its companions takes.

    Args:
        capability, dtype, channels: As above.
        sizes (Sequence[tuple]): Size and dilation of each.
        height (int): Of the map, by which tiles are chosen.
    """
    x = draw(2, channels, height, height, dtype=dtype).to('meta')
    norms = draw_branches(sizes, channels, torch.float32, 'meta')
    operands = [x.requires_grad_(), *parameters_of(norms)]

    def run():
        focus.large_conv.pack(dtype, norms, [norms[0].weight, norms[0].scale])
        for group in (None, 'two processes'):
            out = sum_of_branches(x, norms, 'triton', group)
            torch.autograd.grad(out.sum(), operands)

    return compile_launches(run, capability)


def compile_sums(capability, dtype):
    """Compile what adds up gradients of a Focus block, with the most of them.

    And what else no other operator launches.
    """
    pooled, grad = (
        draw(2, n, m, m, dtype=dtype).to('meta')
        for n, m in ((64, 7), (640, 14))
    )
    taps, vector, keep = (
        torch.empty(shape, device='meta') for shape in ((640, 1, 3, 3), 640, 2)
    )
    matrix = torch.empty(640, 640, 1, 1, dtype=dtype, device='meta')
    x, y = (
        torch.empty(25088, n, dtype=dtype, device='meta') for n in (384, 256)
    )
    scale = torch.empty(128, 384, device='meta')
    pairs = (x, y), (y, y), (y, y), (y, x, None, None, None, True)
    pairs += (y, x[:, :256]), (y, x, scale, scale[0], scale[:, 0])
    products = [
        WeightGrad((a.new_empty(a.shape[1], b.shape[1]), a[0]), a, b, *others)
        for a, b, *others in pairs
    ]

    maps = [
        draw(2, 320, *size, dtype=dtype).to('meta')
        for size in ((8, 9), (17, 16))
    ]
    weight1, bias1, c, count = (
        torch.empty(shape, device='meta')
        for shape in ((40, 320, 1, 1), 40, 320, ())
    )
    weights = weight1, bias1, weight1, c
    norms = [Norm(c, c, c, c, count, 0.1, 1e-5)] * 3

    def excite(x):
        """Three norms, and one; none, in inference; and one by itself."""
        for gate, n in ((x, 3), (None, 1)):
            measured = batch_norm.measure([x] * n, norms[:n])
            grad, state = focus.excitation.forward(
                x, *weights, gate, True, gate, measured
            )
            focus.excitation.backward(
                grad, x, *weights, gate, state, True, gate, measured[1]
            )
        focus.excitation.forward(x, *weights, x, True)
        ((y, facts),) = batch_norm.forward([x], norms[:1])
        batch_norm.backward([y], [x], [facts])

    def run():
        for z in maps:
            excite(z)
            focus.layer_norm.forward(z, c, c, 1e-6)
        for z in (*maps, grad, pooled[:, :, :1, :1].contiguous()):
            y = focus.layer_norm.forward(z, vector, vector, 1e-6, True)
            focus.layer_norm.backward(y, z, vector, 1e-6)
        partial_sums.add(make=weight_grads, operands=products)
        focus.conv.forward(grad, taps, vector, activate=True)
        focus.conv.backward(grad, grad, taps, keep=keep, kept=grad)
        for other in (None, pooled):
            focus.layer_norm.backward(
                grad, grad, vector, 1e-6, grad, vector, other
            )
        focus.product(grad, matrix, transposed=True, gelu_input=grad)
        focus.product(grad, matrix, vector, gelu=True)

    return compile_launches(run, capability)


def compile_contmix(capability, dtype, height, width, size):
    """Compile the kernels of ContMix for maps of 128 images."""
    shapes = (128, height, width), (128, 7, 7), (256, height, width)
    query, key, value = (
        torch.empty(128, *shape, dtype=dtype, device='meta').to(
            memory_format=torch.channels_last
        )
        for shape in shapes
    )
    taps = 5**2 + size**2
    tables = (taps, 49), (taps,), (8, 9, 9), (8, 2 * size - 1, 2 * size - 1)
    weights = [torch.empty(shape, device='meta') for shape in tables]
    inputs = query, key, *weights, value

    def run():
        outputs = contmix._mix.function(*inputs, 0.25)
        grad = outputs[0]
        contmix.backward(grad, inputs, 0.25, outputs, grad, adds=True)

    return compile_launches(run, capability)


def compile_all(capability, dtype, every_shape=True):
    """Compile every kernel, some of them for several shapes.

    Returns:
        dict: By kind, see :func:`compile_launches`.
    """
    where = capability, dtype
    # Launched by others, too
    others = [residual_conv, depthwise_conv2d]
    apart = branches, conv_norm, *others
    wide = [run for run in SPECS if run not in apart]
    maps = [(14, 14, 13)]
    narrow = [(56, [branches]), (512, [conv_norm])]
    if every_shape:
        wide += others
        narrow += [(64, [conv_norm, feed_forward])]
        maps += [(50, 84, 13)]
    kinds = [(640, wide), *narrow]
    large = [(64, 14), (56, 28)] if every_shape else [(64, 14)]
    return dict(
        operators=sum(
            (compile_operators(*where, *kind) for kind in kinds), []
        ),
        branches=sum((compile_branches(*where, LARGE, *n) for n in large), []),
        sums=compile_sums(*where),
        contmix=sum((compile_contmix(*where, *size) for size in maps), []),
    )


def compiled_anew(sizes):
    """Names of what two blocks of t compile for each size but the first.

    Args:
        sizes (Sequence[tuple[int, int]]): Of images.
    """
    names, kept = [], count._do_not_compile

    def keep(kernel, *args):
        names[-1].append(_name(kernel))
        return kept(kernel, *args)

    patches = [
        patch.object(triton.JITFunction, '_do_compile', keep),
        patch.object(type(driver), 'active', count._Driver()),
    ]
    blocks = count.blocks(count.build(True, 'triton'), batch=2).values()
    with count._on_gpu('meta', patches):
        for height, width in sizes:
            names.append([])
            for block, maps in blocks:
                stride = 224 // maps[0].shape[2]
                size = height // stride, width // stride
                maps = [F.interpolate(x, size) for x in maps]
                block(*maps).sum().backward()
    return names
