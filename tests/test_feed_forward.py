"""Products with scales and sums, and the feed-forward network, for GPUs."""

import json

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, exact, python, relative_error

from mmoverlock.ops import (
    feed_forward,
    partial_sums,
    pointwise_conv,
    round_parameters,
)

products = pytest.importorskip(
    'mmoverlock.ops.pointwise.triton', exc_type=ImportError
)
operators = pytest.importorskip(
    'mmoverlock.ops.ffn.triton', exc_type=ImportError
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


def draw_identity(shape, options, dtype):
    """Identity, gain, offset and what drops images; or None."""
    batch, channels, *size = shape
    channels += 1
    return [
        draw(batch, channels, *size, dtype=dtype) if options else None,
        draw(channels, 1, 1, 1) if 'gain' in options else None,
        draw(channels) if 'offset' in options else None,
        torch.arange(batch, device=DEVICE) * 0.75 if options else None,
    ]


def define(
    x,
    weight1,
    bias1,
    conv,
    conv_bias,
    gamma,
    beta,
    weight2,
    bias2,
    r,
    identity=None,
    gain=None,
    offset=None,
    keep=None,
):
    f = F.gelu(F.conv2d(x, weight1, bias1))
    y = r * f + F.conv2d(f, conv, conv_bias, padding=1, groups=len(conv))
    norm = y.square().sum((2, 3), keepdim=True).sqrt()
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    y = F.conv2d(y * (gamma * response + 1) + beta, weight2, bias2)
    if keep is not None:
        y = y * keep[:, None, None, None]
    if gain is not None:
        identity = F.conv2d(identity, gain, offset, groups=len(gain))
    return y if identity is None else identity + y


@pytest.mark.parametrize('shape, dtype', SHAPES)
@pytest.mark.parametrize(
    'residual, options',
    [
        (True, ''),
        (False, ''),
        (True, 'identity'),
        (True, 'identity gain'),
        (True, 'identity gain offset'),
    ],
)
def test_feed_forward(shape, dtype, residual, options, poison):
    torch.manual_seed(0)
    operands = [draw(*shape, dtype=dtype), *draw_parameters(shape[1])]
    *identity, keep = draw_identity(shape, options, dtype)
    operands += [tensor for tensor in identity if tensor is not None]
    operands = [tensor.requires_grad_() for tensor in operands]
    others = [exact(tensor) for tensor in operands]

    def arguments(tensors):
        tensors = [*tensors, None, None, None][:12]
        return *tensors[:9], residual, *tensors[9:], keep

    out = feed_forward(*arguments(operands))
    expected = define(*arguments(others))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    grad = draw(*out.shape, dtype=dtype)
    grads = torch.autograd.grad(out, operands, grad)
    again = torch.autograd.grad(
        feed_forward(*arguments(operands)), operands, grad
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
    shape = 1, 2, 3, 3
    for dtype, options in (
        (torch.float32, 'identity gain offset'),
        (torch.float32, 'identity'),
        (torch.bfloat16, ''),
    ):
        *others, keep = draw_identity(shape, options, dtype)
        operands = [draw(*shape, dtype=dtype), *draw_parameters(2), *others]
        for tensor in operands:
            if tensor is not None:
                tensor.requires_grad_()
        torch.library.opcheck(
            operators.feed_forward.run, (*operands, keep, True)
        )


def test_gradients_of_gradients_are_refused():
    operands = [draw(1, 2, 3, 3), *draw_parameters(2)]
    operands = [tensor.requires_grad_() for tensor in operands]
    (grad,) = torch.autograd.grad(
        feed_forward(*operands).sum(), operands[0], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="take the backend 'refer"):
        grad.sum().backward()


@pytest.mark.parametrize('has_bias', [True, False])
def test_pointwise_conv(has_bias, poison):
    """With the dtypes of autocast; channels of a wider map."""
    torch.manual_seed(0)
    x = draw(2, 7, 3, 5, dtype=torch.bfloat16)[:, 1:6].requires_grad_()
    weight = draw(4, 5, 1, 1).requires_grad_()
    bias = draw(4).requires_grad_() if has_bias else None
    operands = [t for t in (x, weight, bias) if t is not None]
    rounded = [*round_parameters(x.dtype, *operands[1:]), None][:2]
    assert rounded[0].dtype == x.dtype and not rounded[0].requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        out = pointwise_conv(x, weight, bias, *rounded)
        assert torch.equal(out, F.conv2d(x, weight, bias))
    grad = draw(*out.shape, dtype=torch.bfloat16)
    grads = torch.autograd.grad(out, operands, grad)
    others = [exact(t) for t in (x, *rounded[: len(operands) - 1])]
    expected = torch.autograd.grad(F.conv2d(*others), others, grad.double())
    for operand, actual, value, limit in zip(
        operands, grads, expected, (1e-2, 1e-6, 1e-6), strict=False
    ):
        assert actual.dtype == operand.dtype
        assert relative_error(actual, value) < limit


def test_pointwise_conv_is_registered(never_the_same):
    torch.manual_seed(0)
    x, weight, bias = draw(1, 2, 3, 3), draw(4, 2, 1, 1), draw(4)
    for operands in ((x, weight, bias), (x, weight, None)):
        rounded = [t if t is None else t.clone() for t in operands[1:]]
        for tensor in operands:
            if tensor is not None:
                tensor.requires_grad_()
        operator = torch.ops.mmoverlock.pointwise_conv.default
        torch.library.opcheck(operator, (*operands, *rounded))


def test_rounding():
    """One dtype is left as it is; others are as PyTorch rounds."""
    x = draw(5)
    assert round_parameters(x.dtype, x)[0].data_ptr() == x.data_ptr()
    for rounded in round_parameters(torch.bfloat16, x, x.bfloat16()):
        assert torch.equal(rounded, x.bfloat16())


def test_fits_every_card_in_single_precision(tmp_path):
    """Registers, and the 99 KB of shared memory of capability 8.6."""
    out = python(
        'import json, torch\n'
        'from compile_launches import compile_feed_forward\n'
        'uses = compile_feed_forward(80, torch.float32, 64)\n'
        'print(json.dumps(uses))',
        TRITON_CACHE_DIR=str(tmp_path),
    )
    uses = json.loads(out.splitlines()[-1])
    assert {'_product_kernel', '_weight_grad_kernel'} < {u[0] for u in uses}
    for name, use in uses:
        assert use['spills'] == 0, (name, use)
        assert use['shared'] <= 99 * 1024, (name, use)
