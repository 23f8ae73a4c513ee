"""What only the 3 x 3 depthwise convolution promises."""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, exact

from mmoverlock.ops import residual_conv

kernels = pytest.importorskip(
    'mmoverlock.ops.conv3x3.triton', exc_type=ImportError
)


def test_squares_are_those_of_the_rounded_map():
    torch.manual_seed(0)
    x, weight = draw(2, 3, 6, 5, dtype=torch.bfloat16), draw(3, 1, 3, 3)
    y, squares = residual_conv(x, weight, squares=True, backend='triton')
    expected = y.double().square().sum((2, 3))
    torch.testing.assert_close(squares.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_gelu():
    """The polynomial, from end to end."""
    x = torch.cat((torch.linspace(-12, 12, 97), torch.tensor([-1e30, 1e30])))
    x = x.to(DEVICE).view(1, 1, 1, -1).requires_grad_()
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
    y = residual_conv(x, weight, gelu=True, backend='triton')
    (grad,) = torch.autograd.grad(y.sum(), x)
    other = exact(x)
    expected = F.gelu(other)
    (slope,) = torch.autograd.grad(expected.sum(), other)
    for actual, value in ((y, expected), (grad, slope)):
        torch.testing.assert_close(
            actual.double(), value, rtol=4e-7, atol=4e-7
        )


@pytest.mark.parametrize('kernel', ['forward', 'backward'])
def test_plan(kernel):
    """Multiprocessors are busy, which no result would tell."""
    form = kernels.KNOBS[kernel]
    slots = 132 * form.resident
    for shape in ((128, 64, 56, 56), (2, 64, 200, 336), (128, 2048, 7, 7)):
        lanes, _, strips, blocks, splits = kernels.plan(shape, form, slots)
        assert splits * blocks <= slots
        tiles = -(-shape[0] * strips // lanes[0])
        turns = -(-tiles // splits)
        assert tiles * blocks / slots / turns > 0.75, shape
