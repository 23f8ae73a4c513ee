"""Products with scales and sums, and the feed-forward network, for GPUs."""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, exact, relative_error

from mmoverlock.ops import feed_forward

products = pytest.importorskip(
    'mmoverlock.ops.pointwise.triton', exc_type=ImportError
)
operators = pytest.importorskip(
    'mmoverlock.ops.feed_forward.triton', exc_type=ImportError
)
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [
    ((2, 20, 9, 8), torch.float32),  # several tiles of pixels
    ((3, 7, 1, 1), torch.float32),
    ((1, 70, 5, 3), torch.bfloat16),  # several blocks of inputs
    ((2, 5, 3, 4), torch.float16),
]


@pytest.mark.parametrize('shape, dtype', SHAPES)
@pytest.mark.parametrize('scaled, shifted', [(1, 1), (1, 0), (0, 0)])
def test_product(shape, dtype, scaled, shifted, poison):
    torch.manual_seed(0)
    batch, inputs, *size = shape
    x, weight = draw(*shape, dtype=dtype), draw(11, inputs, 1, 1)
    bias, factor = draw(11), draw(batch, 11, *size, dtype=dtype)
    scale = draw(batch, inputs) if scaled else None
    shift = draw(inputs) if shifted else None
    out, sums = products.product(x, weight, bias, scale, shift, factor=factor)
    scaled_x = x.double()
    if scaled:
        scaled_x = scaled_x * scale.double()[..., None, None]
    if shifted:
        scaled_x = scaled_x + shift.double()[:, None, None]
    expected = F.conv2d(scaled_x, weight.double(), bias.double())
    tolerance = TOLERANCES[dtype]
    assert relative_error(out, expected) < tolerance
    sums = sums.sum(1).unflatten(1, (2, 11))
    # Of the rounded product
    for actual, terms in zip(
        sums.unbind(1), (out.double() * factor, out.double()), strict=True
    ):
        assert relative_error(actual, terms.sum((2, 3))) < 1e-5
    grad = draw(*out.shape, dtype=dtype)
    grads = products.weight_grad(grad, x, weight, bias, scale, shift)
    expected = (
        torch.einsum('bohw,bihw->oi', grad.double(), scaled_x),
        grad.double().sum((0, 2, 3)),
    )
    assert relative_error(grads[0][..., 0, 0], expected[0]) < tolerance
    assert relative_error(grads[1], expected[1]) < 1e-5
    grad_x, _ = products.product(grad, weight, transposed=True)
    expected = F.conv_transpose2d(grad.double(), weight.double())
    assert relative_error(grad_x, expected) < tolerance


def draw_parameters(channels):
    hidden = 3 * channels
    return [
        draw(hidden, channels, 1, 1),
        draw(hidden),
        draw(hidden, 1, 3, 3).contiguous(),
        draw(hidden),
        draw(1, hidden, 1, 1),
        draw(1, hidden, 1, 1),
        draw(channels + 1, hidden, 1, 1),
        draw(channels + 1),
    ]


def define(x, weight1, bias1, conv, conv_bias, gamma, beta, weight2, bias2, r):
    f = F.gelu(F.conv2d(x, weight1, bias1))
    y = r * f + F.conv2d(f, conv, conv_bias, padding=1, groups=len(conv))
    norm = y.square().sum((2, 3), keepdim=True).sqrt()
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    return F.conv2d(y * (gamma * response + 1) + beta, weight2, bias2)


@pytest.mark.parametrize('shape, dtype', SHAPES)
@pytest.mark.parametrize('residual', [True, False])
def test_feed_forward(shape, dtype, residual, poison):
    torch.manual_seed(0)
    operands = [draw(*shape, dtype=dtype), *draw_parameters(shape[1])]
    operands = [tensor.requires_grad_() for tensor in operands]
    others = [exact(tensor) for tensor in operands]
    out = feed_forward(*operands, residual)
    expected = define(*others, residual)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    grad = draw(*out.shape, dtype=dtype)
    grads = torch.autograd.grad(out, operands, grad)
    again = torch.autograd.grad(
        feed_forward(*operands, residual), operands, grad
    )
    expected_grads = torch.autograd.grad(expected, others, grad.double())
    assert relative_error(out, expected) < TOLERANCES[dtype]
    for operand, result, other, exact_grad in zip(
        operands, grads, again, expected_grads, strict=True
    ):
        assert result.dtype == operand.dtype
        assert relative_error(result, exact_grad) < 2 * TOLERANCES[dtype]
        assert torch.equal(result, other)


def test_dead_maps():
    """Channels that are zero everywhere have finite gradients."""
    operands = [torch.zeros(1, 2, 3, 3, device=DEVICE), *draw_parameters(2)]
    for i in (2, 4):  # the biases before the norm
        operands[i].zero_()
    operands = [tensor.requires_grad_() for tensor in operands]
    grads = torch.autograd.grad(feed_forward(*operands).sum(), operands)
    assert all(grad.isfinite().all() for grad in grads)


def test_fused_form():
    """Without a shift of the norm, as :func:`fuse` leaves it."""
    torch.manual_seed(0)
    x, parameters = draw(2, 4, 5, 3), draw_parameters(4)
    parameters[5] = None
    expected = [p if p is None else p.double() for p in parameters]
    expected[5] = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    expected = define(x.double(), *expected, False)
    out = feed_forward(x, *parameters, residual=False)
    assert relative_error(out, expected) < 1e-6


def test_registered(never_the_same):
    torch.manual_seed(0)
    operands = [draw(1, 2, 3, 3), *draw_parameters(2)]
    operands = [tensor.requires_grad_() for tensor in operands]
    torch.library.opcheck(operators.feed_forward.run, (*operands, True))


def test_gradients_of_gradients_are_refused():
    operands = [draw(1, 2, 3, 3), *draw_parameters(2)]
    operands = [tensor.requires_grad_() for tensor in operands]
    (grad,) = torch.autograd.grad(
        feed_forward(*operands).sum(), operands[0], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="take the backend 'refer"):
        grad.sum().backward()
