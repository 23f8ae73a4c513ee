"""The depthwise convolutions for GPUs, against PyTorch's in float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import copy

import pytest
import torch
from kernels import DEVICE, NHWC, exact, opchecked
from test_depthwise import draw_branches, plain_conv2d, plain_sum_of_branches
from torch import nn

from mmoverlock.models import OverLoCK
from mmoverlock.models.reparam import BRANCHES, DilatedReparamConv
from mmoverlock.ops import Branch, depthwise_conv2d, sum_of_branches

conv2d = pytest.importorskip(
    'mmoverlock.ops.depthwise.triton.conv2d', exc_type=ImportError
)

NCHW = torch.contiguous_format
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def assert_close(actual, expected, tolerance):
    """Within a share of the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        atol = tolerance * e.abs().max().item()
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol)


@pytest.mark.parametrize(
    'shape, size, dilation, layout',
    [
        ((1, 1, 1, 1), 7, 1, NCHW),  # the map ends within the kernel
        ((1, 3, 5, 6), 17, 1, NHWC),
        ((2, 9, 11, 7), 5, 1, NCHW),  # several tiles
        ((1, 33, 3, 2), 5, 1, NHWC),  # and blocks of channels
        ((2, 2, 6, 9), 5, 2, NHWC),
        ((1, 3, 9, 16), 3, 4, NCHW),
    ],
)
def test_conv2d(shape, size, dilation, layout):
    channels = shape[1]
    torch.manual_seed(0)
    x = draw(*shape).contiguous(memory_format=layout)
    operands = x, draw(channels, 1, size, size), draw(channels)
    check_conv2d(operands, dilation)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    shapes = (1, 6, 9, 7), (6, 1, 5, 5), (6,)
    check_conv2d([draw(*shape, dtype=dtype) for shape in shapes])


def check_conv2d(operands, dilation=1):
    operands = [tensor.requires_grad_() for tensor in operands]
    exact_operands = [exact(tensor) for tensor in operands]
    out = depthwise_conv2d(*operands, dilation, backend='triton')
    expected = plain_conv2d(*exact_operands, dilation)
    x = operands[0]
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=NHWC)
    # The gradient arrives in another format than the map has.
    grad = draw(*x.shape).to(x.dtype)
    grads = torch.autograd.grad(out, operands, grad)
    for operand, result in zip(operands, grads, strict=True):
        assert operand.dtype == result.dtype
    assert_close(
        [out, *grads],
        [
            expected,
            *torch.autograd.grad(expected, exact_operands, grad.double()),
        ],
        TOLERANCES[x.dtype],
    )


def test_options_of_conv2d():
    """No bias, the residual, a map that is a part of another one."""
    torch.manual_seed(0)
    x, weight = draw(2, 5, 6, 7), draw(3, 1, 5, 5)
    x = x[:, 1:4]
    out = depthwise_conv2d(x, weight, residual=True, backend='triton')
    expected = plain_conv2d(x.double(), weight.double(), None, 1) + x.double()
    assert_close([out], [expected], 1e-6)


@pytest.mark.parametrize(
    'shape, dtype',
    [((2, 2, 9, 7), torch.float32), ((2, 2, 9, 57), torch.bfloat16)],
)
def test_weight_gradient_is_deterministic_and_split(monkeypatch, shape, dtype):
    torch.manual_seed(0)
    x, grad = (draw(*shape, dtype=dtype) for _ in range(2))
    x, grad = (conv2d.autocast(maps) for maps in (x, grad))
    knobs = conv2d.weight_grads.__globals__['KNOBS']
    parts = []
    for programs in (2048, 2048, 1):
        for name in ('column_programs', 'unit_programs'):
            monkeypatch.setitem(knobs, name, programs)
        parts.append(conv2d.weight_grads(x, grad[None], ((3, 1, 0),)))
    assert torch.equal(*parts[:2])
    assert len(parts[0]) > len(parts[2])
    sums = [part.double().sum(0) for part in parts[1:]]
    torch.testing.assert_close(*sums, rtol=0, atol=1e-4)


FIVE = [(5, 1), *BRANCHES[5]]


@pytest.mark.parametrize(
    'shape, sizes, layout, dtype',
    [
        ((2, 3, 6, 5), FIVE, NHWC, torch.float32),
        ((1, 9, 8, 4), [(3, 1), (3, 4)], NCHW, torch.float32),
        ((2, 4, 6, 7), FIVE, NHWC, torch.bfloat16),
    ],
)
def test_sum_of_branches(shape, sizes, layout, dtype):
    """Value, gradients and statistics are those of the plain form."""
    torch.manual_seed(0)
    # Means that are large beside the deviations.
    x = (draw(*shape) + 2).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    branches = draw_branches(sizes, shape[1], torch.float32, DEVICE)
    others = [
        Branch(*map(exact, b[:3]), *(s.double() for s in b[3:5]), *b[5:])
        for b in branches
    ]
    operands = [x, *(p for b in branches for p in b[:3])]
    exact_operands = [exact(x), *(p for b in others for p in b[:3])]
    out = sum_of_branches(x, branches, 'triton')
    expected = plain_sum_of_branches(exact_operands[0], others)
    grad = draw(*shape).to(dtype)
    grads = torch.autograd.grad(out, operands, grad)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_close(
        [out, *grads, *(s for b in branches for s in b[3:5])],
        [
            expected,
            *torch.autograd.grad(expected, exact_operands, grad.double()),
            *(s for b in others for s in b[3:5]),
        ],
        tolerance,
    )
    assert out.is_contiguous(memory_format=NHWC)
    assert [b.batches.item() for b in branches] == [2] * len(branches)


def module(channels=3, kernel_size=5, backend='triton'):
    torch.manual_seed(0)
    conv = DilatedReparamConv(
        channels, kernel_size, dict(type='BN'), backend=backend
    )
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv.to(DEVICE)


def test_network():
    """The backend is that of all large convolutions."""
    model = OverLoCK('xt', depthwise_backend='triton')
    convs = [m for m in model.modules() if isinstance(m, DilatedReparamConv)]
    assert len(convs) == 17
    assert {conv.backend for conv in convs} == {'triton'}


def test_autocast():
    """Parameters are not rounded, and gradients have their dtypes."""
    conv = module()
    x = draw(2, 3, 4, 5).requires_grad_()
    expected = module(backend='auto')(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    assert_close([out], [expected.double()], 2e-2)
    out.float().square().sum().backward()
    for tensor in (x, *conv.parameters()):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize('train', [True, False])
def test_module(train):
    """In both modes, as the plain form; statistics are counted once."""
    results = []
    for backend in ('triton', 'auto'):
        conv = module(backend=backend).train(train)
        x = draw(2, 3, 4, 5).requires_grad_()
        out = conv(x)
        out.sin().sum().backward()
        results.append([out, *(p.grad for p in (x, *conv.parameters()))])
        results[-1] += conv.buffers()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compile():
    """The graph has the operators in it, and no breaks."""
    conv = module(1)
    other = copy.deepcopy(conv)
    x = draw(2, 1, 3, 4)
    compiled = torch.compile(conv, fullgraph=True, backend='aot_eager')
    results = [compiled(x), other(x)]
    for result in results:
        result.sin().sum().backward()
    torch.testing.assert_close(*results)
    for actual, expected in zip(
        [*(p.grad for p in conv.parameters()), *conv.buffers()],
        [*(p.grad for p in other.parameters()), *other.buffers()],
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_registered(never_the_same):
    torch.manual_seed(0)
    x = draw(1, 2, 4, 5).contiguous(memory_format=NHWC).requires_grad_()
    branches = draw_branches([(3, 1), (3, 2)], 2, torch.float32, DEVICE)
    with opchecked() as calls:
        y = depthwise_conv2d(x, branches[0].weight, backend='triton')
        y = y + sum_of_branches(x, branches, 'triton')
        y.sum().backward()
    assert len(calls) == 5  # both ways, and running statistics


def test_what_cannot_run(monkeypatch):
    x = draw(1, 1, 3, 3)
    with pytest.raises(ValueError, match="'cudnn'.*'auto', 'reference', 'tri"):
        depthwise_conv2d(x, x, backend='cudnn')
    with pytest.raises(ValueError, match='float64'):
        depthwise_conv2d(x.double(), x, backend='triton')
    monkeypatch.setattr('triton.JITFunction', object)  # not interpreted
    if DEVICE == 'cpu':
        with pytest.raises(ValueError, match='maps on a GPU, got one on cpu'):
            depthwise_conv2d(x, x, backend='triton')
