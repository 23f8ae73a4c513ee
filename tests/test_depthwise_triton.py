"""The depthwise convolutions for GPUs, against float64.

By single precision and by products of matrices, of all sizes. What other
operators promise too is in test_operators.py.
"""

from functools import partial

import pytest
import tiny
import torch
from kernels import DEVICE, draw, exact, relative_error
from test_depthwise import (
    draw_branches,
    plain_conv2d,
    plain_sum_of_branches,
    step,
)
from test_operators import assert_right, draw_operands

from mmoverlock.models import OverLoCK
from mmoverlock.models.reparam import BRANCHES, DilatedReparamConv
from mmoverlock.ops import Branch, depthwise_conv2d, sum_of_branches

banded = pytest.importorskip(
    'mmoverlock.ops.depthwise.triton.banded', exc_type=ImportError
)
batch_norm = pytest.importorskip('mmoverlock.ops.batch_norm.triton')
conv2d = pytest.importorskip('mmoverlock.ops.depthwise.triton.conv2d')
statistics = pytest.importorskip('mmoverlock.ops.depthwise.triton.statistics')
tap_grads = pytest.importorskip('mmoverlock.ops.depthwise.triton.tap_grads')

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {HALF: 4e-4, BRAIN: 8e-3}  # the interpreter cuts bf16 off
MANY = (17, 2, 5, 3), [(5, 1), (3, 4)], BRAIN  # images, for several chunks
CASES = [
    # The map ends within the kernel; taps that no value meets
    ((1, 1, 1, 1), [(3, 1)], BRAIN),
    ((1, 2, 3, 5), [(33, 1)], HALF),
    # One window for all columns
    ((2, 17, 7, 14), [(13, 1), (5, 2), (3, 5)], BRAIN),
    MANY,
    ((1, 2, 11, 16), [(5, 1)], BRAIN),
    # Windows move: 1, 2 and 3 of them.
    ((1, 2, 6, 17), [(3, 1), (9, 1)], HALF),
    ((1, 16, 9, 33), [(17, 1), (5, 1), (3, 7)], BRAIN),
    ((1, 2, 3, 37), [(19, 1), (3, 1), (9, 2)], BRAIN),
    # Programs of 32 channels
    ((1, 64, 5, 6), [(13, 1), (3, 2)], BRAIN),
    ((1, 2, 4, 5), [(3, 2), (3, 1)], BRAIN),  # which bands cannot do
]
# With the size of the smallest kernel that is convolved by banded matrices:
# all of them, and none.
FORMS = [(case, 1) for case in CASES]
FORMS += [(case, 99) for case in (CASES[0], *CASES[4:6], CASES[8])]
FIVE = [(5, 1), *BRANCHES[5]]


@pytest.mark.parametrize(
    'shape, size, dilation, residual',
    [
        ((1, 1, 1, 1), 7, 1, False),  # the map ends within the kernel
        ((1, 3, 2, 6), 17, 1, True),
        ((2, 2, 6, 9), 5, 2, False),
        ((1, 3, 9, 16), 3, 4, True),
    ],
)
def test_sizes(shape, size, dilation, residual, poison):
    operands = draw_operands(depthwise_conv2d, shape)
    operands['weight'] = draw(shape[1], 1, size, size).requires_grad_()
    operands |= dict(dilation=dilation, residual=residual)
    assert_right(depthwise_conv2d, operands)


@pytest.mark.parametrize(
    'sizes, shape, dtype, tolerance',
    [
        (FIVE, (1, 33, 6, 5), SINGLE, 1e-5),  # blocks of channels, one of 1
        (FIVE, (2, 64, 8, 9), BRAIN, 2e-2),  # tiles of 1 row, of 1 column
        # Large kernels behind a small one
        ([(3, 1), (11, 1), (13, 1), (3, 2)], (1, 2, 6, 5), SINGLE, 1e-5),
    ],
)
def test_sum_of_branches(sizes, shape, dtype, tolerance, poison):
    """Value, gradients and statistics, and the numbers of batches."""
    torch.manual_seed(0)
    # Means that are large beside the deviations.
    x = (draw(*shape) + 2).to(dtype).requires_grad_()
    grad = draw(*shape, dtype=dtype)
    branches = draw_branches(sizes, shape[1], SINGLE, DEVICE)
    others = [
        Branch(*map(exact, b[:3]), *(s.double() for s in b[3:5]), *b[5:])
        for b in branches
    ]
    expected = step(plain_sum_of_branches, exact(x), others, grad)
    run = partial(sum_of_branches, backend='triton')
    for actual, value in zip(
        step(run, x, branches, grad), expected, strict=True
    ):
        assert relative_error(actual, value) < tolerance
    assert [b.batches.item() for b in branches] == [2] * len(branches)


def maps(count, shape, dtype):
    """(count, B, C, H, W), each in channels_last."""
    batch, channels, height, width = shape
    x = draw(count, batch, height, width, channels, dtype=dtype)
    return x.permute(0, 1, 4, 2, 3)


def prepare(shape, sizes, dtype):
    """The shape, its dtype, branches and their taps."""
    torch.manual_seed(0)
    firsts = [sum(k**2 for k, _ in sizes[:b]) for b in range(len(sizes))]
    branches = zip(sizes, firsts, strict=True)
    branches = tuple((*size, first) for size, first in branches)
    taps = draw(sum(k**2 for k, _ in sizes), shape[1], dtype=dtype)
    return shape, dtype, branches, taps


def convolve(x, taps, branch, flip=False):
    """In float64."""
    size, dilation, first = branch
    weight = taps[first : first + size**2].double().mT
    weight = (weight.flip(1) if flip else weight).unflatten(1, (1, size, size))
    return plain_conv2d(x.double(), weight, None, dilation)


@pytest.mark.parametrize('case, size', FORMS)
def test_sum_of_convolutions(case, size, monkeypatch, poison):
    monkeypatch.setattr(banded, 'SIZE', size)
    flip = CASES.index(case) % 2 == 1
    shape, dtype, branches, taps = prepare(*case)
    x = maps(len(branches), shape, dtype)
    bias = None if flip else draw(shape[1])
    other = draw(*shape, dtype=dtype) if flip else None
    out = conv2d.convolve_maps(x, taps, branches, bias, flip, other)
    expected = sum(
        convolve(one, taps, branch, flip)
        for one, branch in zip(x, branches, strict=True)
    )
    expected += other.double() if flip else bias.double()[:, None, None]
    assert relative_error(out, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize(
    'case, size, programs',
    [
        *((*form, 528) for form in FORMS),
        (MANY, 1, 1),
        (((17, 2, 5, 3), [(5, 1)], BRAIN), 1, 528),  # no others
        (((2, 2, 7, 9), *MANY[1:]), 99, 1),
    ],
)
def test_statistics(case, size, programs, monkeypatch, poison):
    """Of all branches, with means that are large beside the deviations."""
    monkeypatch.setattr(banded, 'SIZE', size)
    monkeypatch.setitem(statistics.KNOBS, 'programs', programs)
    # Parts without those of the first branch
    few = -(-programs // 264)
    monkeypatch.setitem(banded.KNOBS, 'statistics', few)
    shape, dtype, branches, taps = prepare(*case)
    x, first = maps(2, shape, dtype)
    x += 2
    parts = statistics.measure(x, taps, first, branches)
    ys = [convolve(x, taps, branch) for branch in branches]
    assert relative_error(first, ys[0]) < TOLERANCES[dtype]
    rows = x.new_empty(parts.shape[1:], dtype=torch.float64)
    batch_norm.combine_parts(parts, rows)
    for (count, mean, squares), y in zip(
        rows.unflatten(0, (-1, 3)), ys, strict=True
    ):
        variance, average = torch.var_mean(y, (0, 2, 3), correction=0)
        assert (count == y[:, 0].numel()).all()
        scale = average.abs() + variance.sqrt() + 1e-3
        assert ((mean - average).abs() < 1e-5 * scale).all()
        assert ((squares / count - variance).abs() < 1e-5 * scale**2).all()


@pytest.mark.parametrize('size', [(1, 1), (3, 9)])  # one tap sees values
def test_statistics_of_large_means(size):
    """A variance is right that is a millionth of the square of its mean."""
    shape, dtype, branches, taps = prepare((2, 2, 9, 7), [size], SINGLE)
    x = 1000 + maps(1, shape, dtype)[0]
    parts = statistics.measure(x, taps, torch.empty_like(x), branches)
    rows = x.new_empty(parts.shape[1:], dtype=torch.float64)
    batch_norm.combine_parts(parts, rows)
    count, _, squares = rows
    y = convolve(x, taps, branches[0])
    expected = y.var((0, 2, 3), correction=0)
    assert relative_error(squares / count, expected) < 1e-4


@pytest.mark.parametrize(
    'case, programs',
    [
        *((case, 2048) for case in CASES),
        # Which go through all rows
        (((2, 2, 9, 7), [(3, 1)], SINGLE), 1),
        (((2, 2, 40, 21), [(3, 1), (3, 2)], BRAIN), 1),
    ],
)
def test_gradients_of_taps(case, programs, monkeypatch, poison):
    """Sums in single precision of products that are exact.

    And sums of a gradient times what every branch makes.
    """
    monkeypatch.setitem(tap_grads.KNOBS, 'programs', programs)
    shape, dtype, branches, taps = prepare(*case)
    (x,), grads = maps(1 + len(branches), shape, dtype).tensor_split([1])
    size = max((k - 1) * d + 1 for k, d, _ in branches)
    results = (
        tap_grads.tap_grads(x, grads, branches, with_sum=True),
        tap_grads.inner_products(x, grads[0], taps, branches, size),
    )
    taps = taps.double().requires_grad_()
    outs = [convolve(x, taps, branch) for branch in branches]
    (gradient,) = torch.autograd.grad(outs, taps, [*grads.double()])
    grad = grads[0].double()
    products = [(out * grad).sum((0, 2, 3)) for out in outs]
    total = grad.sum((0, 2, 3))
    expected = [*gradient, total], [*products, total]
    for parts, sums in zip(results, expected, strict=True):
        assert parts.dtype == torch.float32
        error = relative_error(parts.double().sum(0), torch.stack(sums))
        assert error < 1e-6


def test_network():
    """The backend is that of all large convolutions."""
    model = OverLoCK(tiny.ARCH, depthwise_backend='triton')
    convs = [m for m in model.modules() if isinstance(m, DilatedReparamConv)]
    assert [conv.backend for conv in convs] == ['triton'] * 6
