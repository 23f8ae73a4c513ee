"""The depthwise convolutions for GPUs, of all sizes, against float64.

What other operators promise too is in test_operators.py.
"""

import pytest
import tiny
import torch
from kernels import DEVICE, draw, exact, relative_error
from test_depthwise import (
    draw_branches,
    parameters_of,
    plain_conv2d,
    plain_sum_of_branches,
    statistics_of,
)
from test_operators import assert_right, draw_operands

from mmoverlock.models import OverLoCK
from mmoverlock.models.reparam import BRANCHES, DilatedReparamConv
from mmoverlock.ops import Branch, depthwise_conv2d, sum_of_branches

SINGLE, BRAIN = torch.float32, torch.bfloat16
FIVE = [(5, 1), *BRANCHES[5]]


@pytest.mark.parametrize(
    'shape, size, dilation',
    [
        ((1, 1, 1, 1), 7, 1),  # the map ends within the kernel
        ((1, 3, 2, 6), 17, 1),
        ((2, 2, 6, 9), 5, 2),
        ((1, 3, 9, 16), 3, 4),
    ],
)
def test_sizes(shape, size, dilation, poison):
    operands = draw_operands(depthwise_conv2d, shape)
    operands['weight'] = draw(shape[1], 1, size, size).requires_grad_()
    operands['dilation'] = dilation
    assert_right(depthwise_conv2d, operands)


def test_options():
    """No bias, the residual, a map that is a part of another one."""
    torch.manual_seed(0)
    x, weight = draw(2, 5, 6, 7)[:, 1:4], draw(3, 1, 5, 5)
    out = depthwise_conv2d(x, weight, residual=True, backend='triton')
    expected = plain_conv2d(x.double(), weight.double(), None) + x.double()
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize(
    'shape, sizes, dtype, tolerance',
    [
        ((1, 33, 6, 5), FIVE, SINGLE, 1e-5),  # blocks of channels, one of 1
        ((2, 64, 8, 9), FIVE, BRAIN, 2e-2),  # tiles of 1 row, of 1 column
    ],
)
def test_sum_of_branches(shape, sizes, dtype, tolerance, poison):
    """Value, gradients and statistics, and the numbers of batches."""
    torch.manual_seed(0)
    # Means that are large beside the deviations.
    x = (draw(*shape) + 2).to(dtype).requires_grad_()
    branches = draw_branches(sizes, shape[1], SINGLE, DEVICE)
    others = [
        Branch(*map(exact, b[:3]), *(s.double() for s in b[3:5]), *b[5:])
        for b in branches
    ]
    operands = [x, *parameters_of(branches)]
    exact_operands = [exact(x), *parameters_of(others)]
    out = sum_of_branches(x, branches, 'triton')
    expected = plain_sum_of_branches(exact_operands[0], others)
    grad = draw(*shape, dtype=dtype)
    grads = torch.autograd.grad(out, operands, grad)
    expected_grads = torch.autograd.grad(
        expected, exact_operands, grad.double()
    )
    for actual, value in zip(
        (out, *grads, *statistics_of(branches)),
        (expected, *expected_grads, *statistics_of(others)),
        strict=True,
    ):
        assert relative_error(actual, value) < tolerance
    assert [b.batches.item() for b in branches] == [2] * len(branches)


def test_network():
    """The backend is that of all large convolutions."""
    model = OverLoCK(tiny.ARCH, depthwise_backend='triton')
    convs = [m for m in model.modules() if isinstance(m, DilatedReparamConv)]
    assert [conv.backend for conv in convs] == ['triton'] * 6
