"""ContMix: what CPUs run against the oracle, and networks elsewhere.

The kernels are in test_contmix_triton.py.
"""

from contextlib import nullcontext

import pytest
import torch
from kernels import relative_error

from benchmarks.count import Count, _on_gpu, _Operators
from mmoverlock.ops import contmix
from mmoverlock.ops.dynamic_conv import BACKENDS
from mmoverlock.ops.dynamic_conv.tiled import _choose_tiles

SMALL = 3  # size of the small kernel


def draw(batch, height, width, kernel_size, groups=2, channels=(3, 2)):
    """Operands of contmix, with gradients; channels are those of a group."""
    shapes = dict(
        query=(batch, groups * channels[0], height, width),
        key=(batch, groups * channels[0], 2, 2),
        value=(batch, 2 * groups * channels[1], height, width),
        weight=(SMALL**2 + kernel_size**2, 4),
        bias=(SMALL**2 + kernel_size**2,),
        small=(groups, 2 * SMALL - 1, 2 * SMALL - 1),
        large=(groups, 2 * kernel_size - 1, 2 * kernel_size - 1),
    )
    generator = torch.Generator().manual_seed(0)
    operands = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {k: v.requires_grad_() for k, v in operands.items()}


def call(operands, backend):
    *rest, small, large = operands.values()
    return contmix(*rest, (small, large), backend=backend, scale=0.5)


def test_gradcheck():
    operands = draw(1, 5, 6, kernel_size=5, groups=1, channels=(1, 1))
    assert torch.autograd.gradcheck(
        lambda *args: call(dict(zip(operands, args, strict=True)), 'tiled'),
        tuple(operands.values()),
    )


def lay_out(maps, layout):
    """A copy of maps with other strides, or the maps."""
    if layout == 'channels_last':
        return maps.contiguous(memory_format=torch.channels_last)
    if layout == 'strided':
        return maps.mT.contiguous().mT
    return maps


def differentiate(operands, backend, layout='contiguous'):
    """The output and all gradients; a layout for query and value.

    Or the gradient is 'expanded', as that of a sum.
    """
    maps = dict(operands)
    for name in ('query', 'value'):
        maps[name] = lay_out(maps[name], layout)
    out = call(maps, backend)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64)
    grad = grad.view(out.shape).to(out)
    if layout == 'expanded':
        grad = grad[:1, :1, :1, :1].expand_as(out)
    return [out, *torch.autograd.grad(out, list(operands.values()), grad)]


@pytest.mark.parametrize(
    'shape, kernel_size, layout',
    [
        ((1, 7, 7), 7, 'contiguous'),  # as small as the kernel
        ((2, 13, 29), 13, 'channels_last'),
        ((2, 14, 14), 13, 'strided'),
        ((1, 16, 17), 13, 'channels_last'),
        ((3, 8, 7), 7, 'strided'),
        ((1, 19, 50), 7, 'contiguous'),
        ((1, 31, 33), 5, 'channels_last'),
        ((0, 9, 9), 7, 'contiguous'),
        ((2, 16, 17), 13, 'as on GPUs'),  # many images and groups at a time
        ((2, 9, 8), 7, 'one group'),
    ],
)
def test_tiled_agrees_with_reference(shape, kernel_size, layout):
    operands = draw(*shape, kernel_size, 1 if 'group' in layout else 2)
    expected = differentiate(operands, 'reference', layout)
    with _on_gpu('cpu', []) if 'GPU' in layout else nullcontext():
        actual = differentiate(operands, 'tiled', layout)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('width', [7, 20])  # 7: regions are windows
def test_gradients_of_gradients(monkeypatch, width, dtype):
    """They are whole, a few groups at a time and of 16-bit maps too.

    Nothing that inference keeps gets in their way.
    """
    monkeypatch.setattr('mmoverlock.ops.dynamic_conv.tiled.CHUNK', 1)
    with torch.inference_mode():
        call(draw(2, 7, width, kernel_size=7), 'tiled')
    results = []
    for backend in ('reference', 'tiled'):
        operands = draw(2, 7, width, kernel_size=7)
        rounded = {name: x.to(dtype) for name, x in operands.items()}
        out = call(rounded, backend).double()
        inputs = [*operands.values()]
        grads = torch.autograd.grad(
            out.square().sum(), inputs, create_graph=True
        )
        loss = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(loss, inputs))
    most = max(1e-12, 4 * torch.finfo(dtype).eps)
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < most


@pytest.mark.parametrize(
    'shape, most', [((128, 14, 14, 13), 220), ((2, 50, 84, 13), 190)]
)
def test_operators_of_tiled_on_gpus(shape, most):
    """A tenth or a fifth of what a CPU's cache is good for."""
    operands = {
        name: operand.detach().to('meta').requires_grad_()
        for name, operand in draw(1, *shape[1:], 8, (16, 16)).items()
    }
    for name in ('query', 'key', 'value'):
        operand = operands[name].bfloat16().expand(shape[0], -1, -1, -1)
        operands[name] = operand.detach().requires_grad_()
    for _ in range(2):  # the first call makes plans
        with _on_gpu('meta', []), _Operators(Count(), ()) as counted:
            differentiate(operands, 'tiled')
    assert 0 < counted.result.operators <= most


@pytest.mark.parametrize(
    'backend, dtype', [('reference', torch.bfloat16), ('tiled', torch.half)]
)
def test_kernels_are_made_in_single_precision(backend, dtype):
    """Of logits of hundreds, autocast would round differences of 1 off."""
    operands = {
        name: operand.detach().float()
        * (20 if name in ('query', 'key') else 1)
        for name, operand in draw(1, 9, 8, kernel_size=5).items()
    }
    operands['value'] = operands['value'].to(dtype)
    exact = {name: operand.double() for name, operand in operands.items()}
    with torch.autocast('cpu', dtype):
        actual = call(operands, backend)
    assert actual.dtype == dtype
    error = relative_error(actual, call(exact, backend))
    assert error < 2 * torch.finfo(dtype).eps


def test_tiles():
    """Their sizes are those that were fast (benchmarks/NOTES.md)."""
    for length, kernel_size, size in (
        *((7, 7, 7), (14, 5, 7), (14, 13, 7), (16, 7, 8), (32, 13, 4)),
        *((50, 13, 5), (64, 13, 5), (84, 13, 6)),
    ):
        assert _choose_tiles(length, kernel_size)[1] == size


def test_backends(monkeypatch):
    """The one that is named runs; 'auto' is the tiled one on a CPU."""
    monkeypatch.setattr('mmoverlock.ops.backends.check_triton', lambda: None)
    ran = []
    for name in BACKENDS:
        monkeypatch.setitem(
            BACKENDS, name, lambda *args, name=name: ran.append(name)
        )
    operands = draw(1, 9, 9, kernel_size=7)
    for backend in ('reference', 'tiled', 'triton', 'auto'):
        call(operands, backend)
    assert ran == ['reference', 'tiled', 'triton', 'tiled']


@pytest.mark.parametrize(
    'name, shape, message',
    [
        ('query', (1, 5, 9, 9), 'query has shape'),
        ('query', (1, 6, 9, 6), 'value has shape'),
        ('key', (2, 6, 2, 2), 'key has shape'),
        ('value', (1, 6, 9, 9), 'value has shape'),
        ('weight', (58, 5), 'weight has shape'),
        ('bias', (57,), 'bias has shape'),
        ('small', (2, 6, 6), 'odd k'),
        ('large', (3, 13, 13), 'rpb must be'),
    ],
)
def test_shapes_that_disagree(name, shape, message):
    operands = draw(1, 9, 9, kernel_size=7)
    operands[name] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        call(operands, 'auto')


def test_other_mistakes():
    with pytest.raises(ValueError, match='6 x 9 map is smaller than the 7 x'):
        call(draw(1, 6, 9, kernel_size=7), 'auto')
    with pytest.raises(ValueError, match="'natten'.*reference.*tiled.*triton"):
        call(draw(1, 9, 9, kernel_size=7), 'natten')
