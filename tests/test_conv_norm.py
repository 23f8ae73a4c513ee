"""A 3 x 3 convolution and the norm behind it, against float64."""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, exact, relative_error

from mmoverlock.ops import conv_norm

pytest.importorskip('mmoverlock.ops.conv3x3_norm.triton', exc_type=ImportError)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw_operands(shape, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    channels = shape[1]
    operands = [
        draw(*shape, dtype=dtype),
        draw(channels, 1, 3, 3).contiguous(),
        draw(channels) if bias else None,
        draw(channels),
        draw(channels),
    ]
    for tensor in operands:
        if tensor is not None:
            tensor.requires_grad_()
    return operands


def define(x, weight, bias, scale, shift, eps=1e-6, residual=True):
    y = residual * x + F.conv2d(x, weight, bias, 1, 1, 1, len(weight))
    z = F.layer_norm(y.movedim(1, -1), (len(weight),), scale, shift, eps)
    return y, z.movedim(-1, 1)


@pytest.mark.parametrize(
    'shape, dtype, bias, residual',
    [
        ((2, 20, 9, 8), torch.float32, True, True),
        ((1, 3, 1, 5), torch.float32, True, False),
        ((3, 70, 4, 3), torch.bfloat16, False, True),
    ],
)
@pytest.mark.parametrize('used', ['both', 'y', 'z'])
def test_values_and_gradients(shape, dtype, bias, residual, used, poison):
    operands = draw_operands(shape, dtype, bias)
    others = [None if t is None else exact(t) for t in operands]
    outs = conv_norm(*operands, 1e-3, residual)
    expected = define(*others, 1e-3, residual)
    tolerance = TOLERANCES[dtype]
    for actual, value in zip(outs, expected, strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(actual, value) < tolerance
    picked = [i for i, name in enumerate('yz') if used in ('both', name)]
    weights = [draw(*shape) for _ in picked]
    results = [
        torch.autograd.grad(
            sum(
                (maps[i] * w).sum()
                for i, w in zip(picked, weights, strict=True)
            ),
            [t for t in tensors if t is not None],
            materialize_grads=True,
        )
        for maps, tensors in ((outs, operands), (expected, others))
    ]
    leaves = [t for t in operands if t is not None]
    for leaf, actual, value in zip(leaves, *results, strict=True):
        assert actual.dtype == leaf.dtype
        assert relative_error(actual, value) < 2 * tolerance


def test_autocast():
    """The convolution casts; the norm takes what it gets."""
    operands = draw_operands((1, 4, 3, 5))
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = conv_norm(*operands)
    expected = conv_norm(operands[0].bfloat16(), *operands[1:])
    assert all(map(torch.equal, outs, expected))


def test_empty():
    operands = draw_operands((0, 3, 4, 5))
    y, z = conv_norm(*operands)
    assert y.shape == z.shape == (0, 3, 4, 5)
    (y.sum() + z.sum()).backward()
    for tensor in operands:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_registered(never_the_same):
    for bias in (True, False):
        operands = draw_operands((1, 2, 3, 3), bias=bias)
        operator = torch.ops.mmoverlock.conv_norm.default
        torch.library.opcheck(operator, (*operands, 1e-6, True))
