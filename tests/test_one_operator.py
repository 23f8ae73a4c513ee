"""What only one operator promises; the others are in test_operators.py."""

from operator import mul

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, exact, relative_error
from test_operators import TOLERANCES, draw_operands, leaves

from mmoverlock.ops import feed_forward, partial_sums, residual_conv
from mmoverlock.ops.pointwise import round_parameters, rows

kernels = pytest.importorskip(
    'mmoverlock.ops.conv3x3.triton', exc_type=ImportError
)
pointwise = pytest.importorskip(
    'mmoverlock.ops.pointwise.triton', exc_type=ImportError
)


def test_squares_are_those_of_the_rounded_map():
    torch.manual_seed(0)
    x, weight = draw(2, 3, 6, 5, dtype=torch.bfloat16), draw(3, 1, 3, 3)
    y, squares = residual_conv(x, weight, squares=True, backend='triton')
    expected = y.double().square().sum((2, 3))
    torch.testing.assert_close(squares.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_gelu_of_residual_conv():
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


@pytest.mark.parametrize(
    'kernel, most', [('forward', 64), ('backward', 64), ('forward', 512)]
)
def test_plan_of_residual_conv(kernel, most):
    """Multiprocessors are busy, which no result would tell."""
    for shape in ((128, 64, 56, 56), (2, 64, 200, 336), (128, 2048, 7, 7)):
        form = kernels.KNOBS[kernel].of_channels(min(most, shape[1]))
        assert form.registers * 32 * form.warps * form.resident <= 65536
        slots = 132 * form.resident
        plan = kernels.plan(shape, form, slots, most)
        lanes, _, strips, blocks, splits = plan
        assert splits * blocks <= slots
        tiles = -(-shape[0] * strips // lanes[0])
        turns = -(-tiles // splits)
        assert tiles * blocks / slots / turns > 0.75, shape


def test_dead_maps_of_feed_forward():
    """Channels that are zero everywhere have finite gradients."""
    operands = draw_operands(feed_forward, (1, 2, 3, 3))
    for name in ('x', 'bias1', 'conv_bias'):  # before the norm
        operands[name] = torch.zeros_like(operands[name], requires_grad=True)
    out = feed_forward(**operands)
    grads = torch.autograd.grad(out.sum(), leaves(operands), create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(NotImplementedError, match="take the backend 'refer"):
        grads[0].sum().backward()  # of gradients, there are none


def test_fused_form_of_feed_forward():
    """Without a shift of the norm, as :func:`fuse` leaves it."""
    operands = draw_operands(feed_forward, (1, 4, 5, 3))
    operands['beta'] = None
    with torch.no_grad():
        out = feed_forward(**operands)
        operands['beta'] = torch.zeros(1, 12, 1, 1, device=DEVICE)
        assert torch.equal(out, feed_forward(**operands))


def test_hidden_map_of_feed_forward(monkeypatch):
    """Wide maps have one; with it, gradients are the same to the bit."""
    results = []
    for most in (4, 3):
        monkeypatch.setattr('mmoverlock.ops.ffn.triton.MAX_REPEATED', most)
        torch.manual_seed(0)
        operands = draw_operands(feed_forward, (1, 4, 3, 2), torch.bfloat16)
        out = feed_forward(**operands)
        kept = [t.shape for t in out.grad_fn.saved_tensors]
        assert kept.count((1, 12, 3, 2)) == (1 if most == 4 else 2)
        results.append(torch.autograd.grad(out.sum(), leaves(operands)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize('width, parts', [(7, 1), (28, 1), (40, 3), (70, 5)])
def test_parts_of_squares(width, parts, poison):
    """One of all strips of an image that a program of 4 has."""
    torch.manual_seed(0)
    x, weight = draw(3, 64, 2, width), draw(64, 1, 3, 3)
    y, sums = kernels.forward(x, weight, squares=True)
    assert sums.shape == (3, parts, 64)
    torch.testing.assert_close(sums.sum(1), y.square().sum((2, 3)))


def test_scales_of_feed_forward(monkeypatch, poison):
    """A launch makes them of many parts, programs of the product of few."""
    results = []
    for most in (2, 3):
        monkeypatch.setattr('mmoverlock.ops.ffn.triton.MAX_PARTS', most)
        operands = draw_operands(feed_forward, (2, 22, 2, 40))  # 3 parts
        out = feed_forward(**operands)
        kept = out.grad_fn.saved_tensors[3:5]
        grads = torch.autograd.grad(out.sum(), leaves(operands))
        results.append([out, *kept, *grads])
        monkeypatch.setattr('mmoverlock.ops.grn.triton.scales', None)
    assert results[0][2].shape == (2, 66)
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_products_and_gradients_of_weights(dtype, poison):
    """Of GELU, of a part of a map, and what has a scale for each image."""
    torch.manual_seed(0)
    x, y = draw(3, 70, 6, 5, dtype=dtype), draw(3, 35, 6, 5, dtype=dtype)
    weight, bias = draw(35, 70, 1, 1, dtype=dtype), draw(35)
    scale, shift, keep = draw(3, 70), draw(70), draw(3)
    out, _ = pointwise.product(x, weight, bias, gelu=True)
    expected = F.conv2d(F.gelu(exact(x)), exact(weight), bias.double())
    assert relative_error(out, expected) < TOLERANCES[dtype]

    scaled = exact(x) * scale[..., None, None] + shift.view(-1, 1, 1)
    expected, products = [], []
    for map_, channels, others in (
        (exact(x), 70, ()),
        (exact(x)[:, :33], 33, ()),
        (F.gelu(exact(x)), 70, (None, None, None, True)),
        (scaled * keep.view(-1, 1, 1, 1), 70, (scale, shift, keep)),
    ):
        outs = [draw(35, channels), draw(35)]
        operands = rows(y), rows(x[:, :channels])
        products.append(pointwise.WeightGrad(outs, *operands, *others))
        expected.append(rows(exact(y)).mT @ rows(map_))
    partial_sums.add(make=pointwise.weight_grads, operands=products)
    for product, value in zip(products, expected, strict=True):
        assert relative_error(product.outs[0], value) < TOLERANCES[dtype]
        factor = 1 if product.keep is None else keep.view(-1, 1, 1, 1)
        value = (y.double() * factor).sum((0, 2, 3))
        assert relative_error(product.outs[1], value) < TOLERANCES[dtype]


def test_shares_of_gradients_of_weights():
    """Their programs run at a time; none has much more than another."""
    for items, blocks in (
        ((512, *[392] * 5, 98), (36, 12, 8, 8, 12, 4, 2)),  # 14 x 14
        ((128, *[98] * 6), (48, 16, 12, 12, 16, 6, 4)),  # 7 x 7
        ((6272,), (4,)),
        ((1,), (300,)),
    ):
        splits = pointwise._splits(items, blocks)
        assert all(1 <= s <= n for s, n in zip(splits, items, strict=True))
        programs = sum(map(mul, splits, blocks))
        assert programs <= max(pointwise.PROGRAMS, sum(blocks))
        longest = max(-(-n // s) for s, n in zip(splits, items, strict=True))
        work = sum(map(mul, items, blocks))
        assert longest <= 1.4 * max(1, work / pointwise.PROGRAMS)


def test_rounding():
    """One dtype is left as it is; others are as PyTorch rounds."""
    x = draw(5)
    assert round_parameters(x.dtype, x)[0].data_ptr() == x.data_ptr()
    for rounded in round_parameters(torch.bfloat16, x, x.bfloat16()):
        assert torch.equal(rounded, x.bfloat16())
