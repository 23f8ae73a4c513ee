"""Weight gradients by products of matrices, against sums in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, relative_error

weight_grads = pytest.importorskip(
    'mmoverlock.ops.depthwise.triton.weight_grads', exc_type=ImportError
)

# Sums of fp32 products of 16-bit factors, which are exact.
TOLERANCE = 1e-6


def expected(x, grad, size, dilation):
    """(size^2, C), tap by tap."""
    x, grad = x.double(), grad.double()
    reach = size // 2 * dilation
    height, width = x.shape[2:]
    x = F.pad(x, (reach,) * 4)
    rows = range(0, size * dilation, dilation)
    return torch.stack(
        [
            (x[:, :, i : i + height, j : j + width] * grad).sum((0, 2, 3))
            for i in rows
            for j in rows
        ]
    )


def branches_of(*sizes):
    """Size, dilation and first tap of each."""
    first = [sum(k**2 for k, _ in sizes[:b]) for b in range(len(sizes))]
    return tuple((k, d, n) for (k, d), n in zip(sizes, first, strict=True))


@pytest.mark.parametrize(
    'shape, sizes, dtype',
    [
        ((1, 1, 1, 1), [(3, 1)], torch.bfloat16),
        # One window for all columns.
        ((2, 3, 7, 5), [(7, 1), (3, 2)], torch.float16),
        ((3, 17, 13, 14), [(13, 1), (5, 2), (3, 5)], torch.bfloat16),
        ((1, 2, 11, 16), [(5, 1)], torch.bfloat16),
        # Windows move: 1 or 2 of them, then 4, 1 and 2.
        ((1, 2, 4, 17), [(5, 1), (9, 1)], torch.float16),
        ((1, 16, 9, 33), [(17, 1), (5, 1), (3, 7)], torch.bfloat16),
        ((1, 2, 3, 37), [(23, 1), (3, 1), (9, 2)], torch.bfloat16),
        # More tiles than a product takes; taps that no column meets.
        ((17, 2, 5, 3), [(3, 4), (5, 1)], torch.bfloat16),
        ((1, 2, 3, 5), [(33, 1)], torch.float16),
    ],
)
def test_all_branches(shape, sizes, dtype):
    torch.manual_seed(0)
    x = draw(*shape, dtype=dtype)
    grads = torch.stack([draw(*shape).permute(0, 2, 3, 1) for _ in sizes])
    grads = grads.permute(0, 1, 4, 2, 3).to(dtype)
    branches = branches_of(*sizes)
    parts = weight_grads.weight_grads(x, grads, branches, with_sum=True)
    assert parts.dtype == torch.float32
    sums = [
        expected(x, grad, *size)
        for grad, size in zip(grads, sizes, strict=True)
    ]
    sums = torch.cat([*sums, grads[0].double().sum((0, 2, 3))[None]])
    assert relative_error(parts.double().sum(0), sums) < TOLERANCE


def test_no_images():
    x = torch.empty(0, 3, 4, 5, dtype=torch.bfloat16, device=DEVICE)
    parts = weight_grads.weight_grads(x, x[None], ((3, 1, 0),), True)
    assert parts.shape[1:] == (10, 3)
    assert not parts.any()


def test_every_tap_is_in_every_part():
    """Memory that is not written would be added up."""
    units, lanes, taps = weight_grads._units(
        branches_of((17, 1), (5, 1), (9, 2), (3, 7)), False, True
    )
    assert lanes == 2
    assert taps == 17**2 + 5**2 + 9**2 + 3**2 + 1
    for lane in range(lanes):
        written = [
            unit[3] + (unit[4] + row) * unit[1] + s
            for unit in units[lane::lanes]
            for row in range(unit[5])
            for s in range(unit[1])
        ]
        assert sorted(written) == list(range(taps))
