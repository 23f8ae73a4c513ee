"""Products of maps with matrices, and the network that they are part of."""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, relative_error
from test_operators import draw_operands, leaves

from mmoverlock.ops import feed_forward, partial_sums
from mmoverlock.ops.pointwise import round_parameters

products = pytest.importorskip(
    'mmoverlock.ops.pointwise.triton', exc_type=ImportError
)
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    'shape, dtype, scaled, shifted',
    [
        ((2, 20, 9, 8), torch.float32, True, True),  # several tiles of pixels
        ((3, 7, 1, 1), torch.float32, True, False),
        ((1, 70, 5, 3), torch.bfloat16, True, True),  # and blocks of inputs
        ((2, 70, 5, 3), torch.float16, False, False),
    ],
)
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
    keep = torch.rand(batch, device=DEVICE) + 0.5 if scaled else None
    parts = products.weight_grad(grad, x, scale, shift, keep)
    grads = torch.empty_like(weight[..., 0, 0]), torch.empty_like(bias)
    partial_sums.add(*zip(parts, grads, strict=True))
    kept = grad.double()
    if scaled:
        kept = kept * keep[:, None, None, None]
    expected = (
        torch.einsum('bohw,bihw->oi', kept, scaled_x),
        kept.sum((0, 2, 3)),
    )
    assert relative_error(grads[0], expected[0]) < tolerance
    assert relative_error(grads[1], expected[1]) < max(1e-5, tolerance / 2)
    grad_x, _ = products.product(grad, weight, transposed=True)
    expected = F.conv_transpose2d(grad.double(), weight.double())
    assert relative_error(grad_x, expected) < tolerance


def test_dead_maps():
    """Channels that are zero everywhere have finite gradients."""
    operands = draw_operands(feed_forward, (1, 2, 3, 3))
    operands['x'] = torch.zeros_like(operands['x'], requires_grad=True)
    for name in ('bias1', 'conv_bias'):  # before the norm
        operands[name] = torch.zeros_like(operands[name], requires_grad=True)
    out = feed_forward(**operands)
    for grad in torch.autograd.grad(out.sum(), leaves(operands)):
        assert grad.isfinite().all()


def test_fused_form():
    """Without a shift of the norm, as :func:`fuse` leaves it."""
    operands = draw_operands(feed_forward, (2, 4, 5, 3))
    operands['beta'] = None
    out = feed_forward(**operands)
    operands['beta'] = torch.zeros(1, 12, 1, 1, device=DEVICE)
    assert torch.equal(out, feed_forward(**operands))


def test_hidden_map_that_is_kept(monkeypatch):
    """Wide maps have one; with it, gradients are the same to the bit."""
    results = []
    for most in (4, 3):
        monkeypatch.setattr('mmoverlock.ops.ffn.triton.MAX_REPEATED', most)
        torch.manual_seed(0)
        operands = draw_operands(feed_forward, (2, 4, 5, 3), torch.bfloat16)
        out = feed_forward(**operands)
        kept = [t.shape for t in out.grad_fn.saved_tensors]
        assert kept.count((2, 12, 5, 3)) == (1 if most == 4 else 2)
        results.append(torch.autograd.grad(out.sum(), leaves(operands)))
    assert all(map(torch.equal, *results))


def test_gradients_of_gradients_are_refused():
    operands = draw_operands(feed_forward, (1, 2, 3, 3))
    (grad,) = torch.autograd.grad(
        feed_forward(**operands).sum(), operands['x'], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="take the backend 'refer"):
        grad.sum().backward()


def test_rounding():
    """One dtype is left as it is; others are as PyTorch rounds."""
    x = draw(5)
    assert round_parameters(x.dtype, x)[0].data_ptr() == x.data_ptr()
    for rounded in round_parameters(torch.bfloat16, x, x.bfloat16()):
        assert torch.equal(rounded, x.bfloat16())
