"""The 3 x 3 depthwise convolution in one pass, against float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, NHWC
from torch import nn

from mmoverlock.models.layers import ResDWConv
from mmoverlock.ops import depthwise_conv2d
from mmoverlock.ops.conv3x3 import residual_conv

kernels = pytest.importorskip(
    'mmoverlock.ops.conv3x3.triton', exc_type=ImportError
)
partial_sums = kernels.partial_sums

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


def draw(*shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return x.contiguous(memory_format=NHWC) if len(shape) == 4 else x


def draw_operands(shape, dtype=torch.float32):
    """Map, weight and bias."""
    torch.manual_seed(0)
    channels = shape[1]
    x = draw(*shape, dtype=dtype)
    operands = x, draw(channels, 1, 3, 3).contiguous(), draw(channels)
    return [tensor.requires_grad_() for tensor in operands]


def exact(*tensors):
    return [t.detach().double().clone().requires_grad_() for t in tensors]


def define(x, weight, bias, gelu=False, residual=True):
    if gelu:
        x = F.gelu(x)
    y = F.conv2d(x, weight, bias, padding=1, groups=len(weight))
    return x + y if residual else y


def assert_close(actual, expected, tolerance):
    """Within a share of the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        atol = tolerance * max(1, e.abs().max().item())
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol)


pytestmark = pytest.mark.usefixtures('poison')


@pytest.mark.parametrize(
    'shape, dtype, gelu, residual, squares',
    [
        ((1, 1, 1, 1), torch.float32, False, True, True),
        ((2, 5, 1, 9), torch.float32, True, True, True),  # a row
        ((2, 3, 9, 1), torch.float32, True, False, False),  # a column
        ((1, 67, 4, 8), torch.float32, False, True, False),  # two blocks
        ((3, 3, 17, 9), torch.float32, True, True, True),  # many strips
        ((2, 7, 5, 6), torch.float16, True, True, True),
        ((2, 16, 6, 7), torch.bfloat16, True, True, True),
        ((2, 16, 6, 7), torch.bfloat16, False, False, True),
    ],
)
def test_value_and_gradients(shape, dtype, gelu, residual, squares):
    operands = draw_operands(shape, dtype)
    others = exact(*operands)
    results = residual_conv(*operands, gelu, residual, squares, 'triton')
    if not squares:
        results = (results,)
    y = define(*others, gelu, residual)
    expected = (y, y.square().sum((2, 3)))[: 1 + squares]
    assert results[0].dtype == dtype
    assert results[0].stride() == operands[0].stride()
    assert squares is False or results[1].dtype == torch.float32
    grads = [draw(*e.shape).contiguous() for e in expected]  # NCHW
    grads[0] = grads[0].to(dtype)
    actual = torch.autograd.grad(results, operands, grads)
    for operand, grad in zip(operands, actual, strict=True):
        assert grad.dtype == operand.dtype
    assert_close(
        [*results, *actual],
        [
            *expected,
            *torch.autograd.grad(
                expected, others, [g.double() for g in grads]
            ),
        ],
        TOLERANCES[dtype],
    )


def test_squares_are_those_of_the_rounded_map():
    operands = draw_operands((2, 3, 6, 5), torch.bfloat16)
    y, squares = residual_conv(*operands, squares=True, backend='triton')
    expected = y.double().square().sum((2, 3))
    torch.testing.assert_close(squares.double(), expected, rtol=1e-6, atol=0)


def test_only_the_squares_have_a_gradient():
    operands = draw_operands((2, 3, 6, 5))
    others = exact(*operands)
    _, squares = residual_conv(*operands, squares=True, backend='triton')
    expected = define(*others).square().sum((2, 3))
    grad = draw(2, 3)
    assert_close(
        torch.autograd.grad(squares, operands, grad),
        torch.autograd.grad(expected, others, grad.double()),
        1e-6,
    )


def test_options():
    """No bias; a map that is a part of another one; half weights."""
    x, weight, _ = draw_operands((2, 8, 5, 6))
    x = x.detach()[:, 1:4].requires_grad_()
    weight = weight.detach()[1:4].half().requires_grad_()
    others = exact(x, weight)
    y = residual_conv(x, weight, backend='triton')
    assert y.is_contiguous(memory_format=NHWC)
    expected = define(*others, None)
    grads = torch.autograd.grad(y.sum(), (x, weight))
    expected_grads = torch.autograd.grad(expected.sum(), others)
    assert grads[1].dtype == torch.float16
    assert_close((y, grads[0]), (expected, expected_grads[0]), 1e-6)
    assert_close(grads[1:], expected_grads[1:], 1e-3)


@pytest.mark.parametrize('gelu', [False, True])
def test_gradient_made_while_loading(gelu):
    """grad * scale + y * coef, and the sum of the gradient of the map."""
    x, weight, bias = (t.detach() for t in draw_operands((3, 5, 9, 6)))
    grad, scale, coef = draw(*x.shape), draw(3, 5), draw(3, 5)
    y, _ = kernels.forward(x, weight, bias, gelu)
    grad_x, partial = kernels.backward(
        grad, x, weight, y, scale, coef, gelu, sum_grad_x=True
    )
    sums = torch.empty(5, 1, 3, 3), torch.empty(5), torch.empty(5)
    sums = [t.to(DEVICE) for t in sums]
    partial_sums.add((partial, *sums))
    others = exact(x, weight, bias)
    g = grad.double() * scale[..., None, None] + y * coef[..., None, None]
    expected = torch.autograd.grad(define(*others, gelu), others, g.double())
    assert_close(
        [grad_x, *sums], [*expected, expected[0].sum((0, 2, 3))], 1e-6
    )


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_gelu():
    """The polynomial, from end to end."""
    x = torch.cat((torch.linspace(-12, 12, 193), torch.tensor([-1e30, 1e30])))
    x = x.to(DEVICE).view(1, 1, 1, -1).requires_grad_()
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
    y = residual_conv(x, weight, gelu=True, backend='triton')
    (grad,) = torch.autograd.grad(y.sum(), x)
    (other,) = exact(x)
    expected = F.gelu(other)
    (slope,) = torch.autograd.grad(expected.sum(), other)
    for actual, value in ((y, expected), (grad, slope)):
        torch.testing.assert_close(
            actual.double(), value, rtol=4e-7, atol=4e-7
        )


def test_deterministic(monkeypatch):
    """Equal bits twice; close ones with another number of programs."""
    results = []
    for slots in (3, 3, 1):
        monkeypatch.setattr(partial_sums, 'programs', lambda *_, n=slots: n)
        operands = draw_operands((2, 3, 3, 40))
        y, squares = residual_conv(
            *operands, gelu=True, squares=True, backend='triton'
        )
        (y.sum() + squares.sum()).backward()
        results.append([y, squares, *(t.grad for t in operands)])
    for first, second, other in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


def test_autocast():
    """The map is cast, the weights are not."""
    operands = draw_operands((2, 3, 6, 5))
    with torch.autocast(DEVICE, torch.bfloat16):
        y, squares = residual_conv(*operands, squares=True, backend='triton')
    assert y.dtype == torch.bfloat16
    assert squares.dtype == torch.float32
    rounded = operands[0].bfloat16().double()
    expected = define(rounded, *exact(*operands[1:]))
    # The interpreter cuts what it should round.
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-6)
    y.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in operands)


class Pass(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(draw(3, 1, 3, 3).contiguous())
        self.bias = nn.Parameter(draw(3))

    def forward(self, x):
        y, squares = residual_conv(
            x.sin(), self.weight, self.bias, True, True, True, 'triton'
        )
        return y * (1 + squares.sqrt())[..., None, None]


def test_compile(monkeypatch):
    """The graph has no breaks, and sizes may change without a new one."""
    monkeypatch.undo()  # tracing makes empty tensors, too
    module = Pass().to(DEVICE)
    compiled = torch.compile(
        module, fullgraph=True, backend='aot_eager', dynamic=True
    )
    for shape in ((2, 3, 4, 5), (3, 3, 3, 6)):
        x = draw(*shape)
        expected = module(x)
        actual = compiled(x)
        assert actual.stride() == expected.stride()
        grads = [
            torch.autograd.grad(y.sum(), module.parameters())
            for y in (actual, expected)
        ]
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*grads)


def test_operators_are_registered_rightly(monkeypatch, never_the_same):
    monkeypatch.undo()
    operands = draw_operands((1, 2, 2, 3))
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    torch.library.opcheck(
        torch.ops.mmoverlock.residual_conv,
        (*operands, True, True, True),
        test_utils=checks,
    )
    x, weight, _ = (t.detach() for t in operands)
    torch.library.opcheck(
        torch.ops.mmoverlock.residual_conv_backward,
        (x, x, weight, x, draw(1, 2), True, True),
        test_utils=checks,
    )


@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty_map(shape):
    operands = draw_operands(shape)
    y, squares = residual_conv(*operands, squares=True, backend='triton')
    assert y.shape == shape
    assert torch.equal(squares, torch.zeros_like(squares))
    (y.sum() + squares.sum()).backward()
    for tensor in operands:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_reference():
    """The definition; on a CPU it is what the layer always ran."""
    operands = exact(*draw_operands((2, 3, 6, 5)))
    y, squares = residual_conv(*operands, True, squares=True)
    expected = define(*operands, gelu=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(squares, expected.square().sum((2, 3)))
    layer = ResDWConv(3)
    x = torch.randn(2, 3, 6, 5)
    parameters = layer.weight, layer.bias
    assert torch.equal(residual_conv(x, *parameters), layer(x))
    assert torch.equal(
        residual_conv(x, *parameters, residual=False),
        depthwise_conv2d(x, *parameters),
    )


def test_what_cannot_run():
    x, weight, bias = draw_operands((1, 2, 3, 3))
    with pytest.raises(ValueError, match="'cudnn'.*'auto'.*'triton'"):
        residual_conv(x, weight, bias, backend='cudnn')
    with pytest.raises(ValueError, match='float64'):
        residual_conv(x.double(), weight, backend='triton')
    with pytest.raises(ValueError, match=r'\(3, 1, 3, 3\).*\(2, 1, 3, 3\)'):
        residual_conv(x, torch.ones(3, 1, 3, 3))


@pytest.mark.parametrize('kernel', ['forward', 'backward'])
def test_plan(kernel):
    """Lanes and multiprocessors are busy, and every row has a strip."""
    form = kernels.KNOBS[kernel]
    slots = 132 * form.resident
    for shape in ((128, 64, 56, 56), (2, 64, 200, 336), (128, 2048, 7, 7)):
        lanes, rows, strips, blocks, splits = kernels.plan(shape, form, slots)
        batch, channels, height, width = shape
        assert lanes[0] * lanes[1] == 32 * form.warps * form.channels
        assert lanes[1] * blocks == channels
        across = -(-width // form.columns)
        assert strips == -(-height // rows) * across
        assert splits * blocks <= slots
        tiles = -(-batch * strips // lanes[0])
        turns = -(-tiles // splits)
        assert tiles * blocks / slots / turns > 0.75, shape
