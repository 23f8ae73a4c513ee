"""Convolutions by banded matrices, against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernels import draw, relative_error
from test_depthwise_weight_grads import branches_of

banded = pytest.importorskip(
    'mmoverlock.ops.depthwise.triton.banded', exc_type=ImportError
)
branches_module = pytest.importorskip(
    'mmoverlock.ops.depthwise.triton.branches'
)

HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCES = {HALF: 4e-4, BRAIN: 8e-3}  # the interpreter cuts bf16 off
CASES = [
    # The map ends within the kernel; taps that no value meets.
    ((1, 1, 1, 1), [(3, 1)], BRAIN),
    ((1, 2, 3, 5), [(33, 1)], HALF),
    # One window for all columns, several images a chunk, and chunks.
    ((17, 2, 15, 3), [(3, 4), (5, 1)], HALF),
    ((3, 17, 13, 14), [(13, 1), (5, 2), (3, 5)], BRAIN),
    ((1, 2, 11, 16), [(5, 1)], BRAIN),
    # Windows move: 1, 2 and 3 of them.
    ((1, 2, 4, 17), [(3, 1), (9, 1)], HALF),
    ((1, 16, 9, 33), [(17, 1), (5, 1), (3, 7)], HALF),
    ((1, 2, 3, 37), [(23, 1), (9, 2)], BRAIN),
]


def maps(count, shape, dtype):
    """(count, B, C, H, W), each in channels_last."""
    batch, channels, height, width = shape
    x = draw(count, batch, height, width, channels, dtype=dtype)
    return x.permute(0, 1, 4, 2, 3)


def convolve(x, taps, branch, flip=False):
    """In float64."""
    size, dilation, first = branch
    weight = taps[first : first + size**2].double().mT
    weight = (weight.flip(1) if flip else weight).unflatten(1, (1, size, size))
    reach = size // 2 * dilation
    return F.conv2d(x.double(), weight, None, 1, reach, dilation, len(weight))


@pytest.fixture(params=CASES)
def operands(request):
    shape, sizes, dtype = request.param
    torch.manual_seed(0)
    branches = branches_of(*sizes)
    taps = draw(sum(k**2 for k, _ in sizes), shape[1], dtype=dtype)
    return shape, dtype, branches, taps


@pytest.mark.parametrize('flip', [False, True])
def test_sum_of_convolutions(operands, flip, poison):
    shape, dtype, branches, taps = operands
    x = maps(len(branches), shape, dtype)
    bias = None if flip else draw(shape[1])
    out, other = maps(2, shape, dtype)
    other = other if flip else None
    banded.convolve_maps(x, out, taps, branches, bias, flip, other)
    expected = sum(
        convolve(one, taps, branch, flip)
        for one, branch in zip(x, branches, strict=True)
    )
    expected += other.double() if flip else bias.double()[:, None, None]
    assert relative_error(out, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize('programs', [1, 528])
def test_statistics(operands, programs, monkeypatch, poison):
    """Of all branches, with means that are large beside the deviations."""
    monkeypatch.setitem(banded.KNOBS, 'programs', programs)
    shape, dtype, branches, taps = operands
    x, first = maps(2, shape, dtype)
    x += 2
    parts = banded.statistics(x, taps, first, branches)
    assert torch.equal(parts, banded.statistics(x, taps, first, branches))
    ys = [convolve(x, taps, branch) for branch in branches]
    assert relative_error(first, ys[0]) < TOLERANCES[dtype]
    for (count, mean, squares), y in zip(
        branches_module._combine(parts), ys, strict=True
    ):
        variance, average = torch.var_mean(y, (0, 2, 3), correction=0)
        assert (count == y[:, 0].numel()).all()
        scale = average.abs() + variance.sqrt() + 1e-3
        assert ((mean - average).abs() < 1e-5 * scale).all()
        assert ((squares / count - variance).abs() < 1e-5 * scale**2).all()


def test_gradients_of_branches(operands, poison):
    shape, dtype, branches, taps = operands
    x, first, grad = maps(3, shape, dtype)
    factors = draw(3, len(branches), shape[1])
    out = maps(len(branches), shape, dtype)
    banded.branch_grads(x, first, grad, taps, factors, out, branches)
    for b, branch in enumerate(branches):
        y = convolve(x, taps, branch) if b else first.double()
        p, q, o = factors[:, b, :, None, None].double()
        expected = p * grad.double() - q * y - o
        assert relative_error(out[b], expected) < TOLERANCES[dtype]
