"""Statistics of the convolutions of a map by all branches, in one launch.

Programs make the values of their tiles or items in registers, branch after
branch, and only count them; those of the first branch are kept. A large kernel
of 16-bit maps has a launch of its own, see banded.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...batch_norm.triton import store_statistics
from ...launching import jit
from . import banded
from .common import (
    SIZES,
    channels_of,
    convolve,
    layout_of,
    tile_of,
    widen,
    zeros,
)
from .rows import (
    convolve_rows,
    count_items,
    load_taps,
    member,
    place,
    plan_of,
    turn,
)
from .tap_grads import num_splits

KNOBS = dict(programs=396)  # at most
CANDIDATES = dict(programs=(264, 396, 528))  # for benchmarks/gpu_tune.py


@jit(do_not_specialize=SIZES)
def _statistics_kernel(
    p_x,
    p_taps,
    p_y,
    p_parts,
    channels: tl.constexpr,
    height,
    width,
    images,
    splits,
    BRANCHES: tl.constexpr,
    FORMS: tl.constexpr,
    MEMBERS: tl.constexpr,
    LARGE: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Number of values, mean and sum of squared deviations from it.

    Of every channel of every branch that is in FORMS, MEMBERS or LARGE, see
    :class:`rows.Plan`; x (B, H, W, C), taps (all taps, C), y (B, H, W, C), the
    output of branch 0, parts (splits, branches * 3, C); grid (parts, blocks of
    channels). Those of branch 0 may be in ``splits`` parts already, and are
    none in the others.
    """
    split = tl.program_id(0)
    own = channels_of(tl.program_id(1), channels, CHANNELS)
    channel, m_channel = own
    shape = (images, height, width)
    o_part = tl.cast(split, tl.int64) * len(BRANCHES) * 3 * channels
    p_part = p_parts + o_part + channel
    if split >= splits:
        none = tl.zeros((1, CHANNELS), tl.float32)
        store_statistics(p_part, 0.0, none, none, channels, m_channel)
    dealt = 0
    for form in tl.static_range(len(FORMS)):
        # One branch after the other, so that only one has its sums and taps in
        # registers.
        for i in tl.range(0, FORMS[form][4]):
            dilation, tap, b = member(
                i, MEMBERS, FORMS[form][3], FORMS[form][4]
            )
            count, mean, squares = _of_items(
                p_x,
                p_taps + tap * channels,
                p_y,
                b,
                dealt,
                own,
                shape,
                dilation,
                channels,
                FORMS[form][0],
                FORMS[form][1],
                FORMS[form][2],
                MEMBERS[FORMS[form][3]][2] == 0,
            )
            p_out = p_part + b * 3 * channels
            store_statistics(p_out, count, mean, squares, channels, m_channel)
            items = count_items(shape, dilation, FORMS[form][2])
            dealt += tl.cdiv(items, FORMS[form][1])
    for i in tl.static_range(len(LARGE)):
        count, mean, squares = _of_tiles(
            p_x,
            p_taps + BRANCHES[LARGE[i]][2] * channels,
            p_y,
            dealt,
            own,
            shape,
            channels,
            BRANCHES[LARGE[i]][0],
            BRANCHES[LARGE[i]][1],
            T,
            COLUMNS,
            LARGE[i] == 0,
        )
        p_out = p_part + LARGE[i] * 3 * channels
        store_statistics(p_out, count, mean, squares, channels, m_channel)
        dealt += images * tl.cdiv(height, T) * tl.cdiv(width, COLUMNS)


@triton.jit
def _of_items(
    p_x,
    p_taps,
    p_y,
    b,
    dealt,
    own,
    shape,
    dilation,
    channels: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    MAY_WRITE: tl.constexpr,
):
    """Number, mean and squared deviations (1, C) of a small kernel's values.

    Every lane sums differences from a value near to those that it sees: what
    it would see, in the middle of its first item, if the map were the same
    everywhere. Branch 0 is written to y.
    """
    HALF: tl.constexpr = K // 2
    height = shape[1]
    width = shape[2]
    taps = load_taps(p_taps, own, channels, K, N)
    first = turn(dealt) * N
    row, m_item, o_row = place(first, own, shape, dilation, channels, T, N)
    down = T // 2 * dilation
    down = tl.where(row + down < height, down, 0)
    col = width // dilation // 2 * dilation
    near = tl.zeros(taps[0].shape, tl.float32)
    for r in tl.static_range(K):
        part = tl.zeros_like(near)
        for s in tl.static_range(K):
            x = col + (s - HALF) * dilation
            part += tl.where((x >= 0) & (x < width), taps[r * K + s], 0.0)
        y = row + down + (r - HALF) * dilation
        near += tl.where((y >= 0) & (y < height), part, 0.0)
    o_near = o_row + (down * width + col) * channels
    near *= widen(tl.load(p_x + o_near, mask=m_item, other=0))
    count = tl.zeros(near.shape, tl.float32)
    total = tl.zeros(near.shape, tl.float32)
    squares = tl.zeros(near.shape, tl.float32)
    for start in tl.range(
        first,
        count_items(shape, dilation, T),
        tl.num_programs(0) * N,
        disable_licm=True,
    ):
        items = place(start, own, shape, dilation, channels, T, N)
        total, squares = convolve_rows(
            _count,
            (total, squares),
            (near, p_y, b, MAY_WRITE),
            p_x,
            taps,
            -near,
            items,
            shape,
            dilation,
            channels,
            K,
            T,
        )
        rows = tl.minimum(tl.cdiv(height - items[0], dilation), T)
        count += tl.where(items[1], rows * width, 0).to(tl.float32)
    return _combine(count, near, total, squares)


@triton.jit
def _count(state, operands, value, o_value, m_value):
    """Add differences to their sum and that of their squares."""
    total, squares = state
    near, p_y, b, MAY_WRITE = operands
    difference = tl.where(m_value, value, 0.0)
    total += difference
    squares += difference * difference
    if MAY_WRITE:
        b_y = (value + near).to(p_y.dtype.element_ty)
        tl.store(p_y + o_value, b_y, mask=m_value & (b == 0))
    return total, squares


@triton.jit
def _combine(count, near, total, squares):
    """Number, mean and squared deviations (1, C) of those of lanes (N, C).

    Args:
        near: The values that differences are from.
        total, squares: Sums of differences, and of their squares.
    """
    share = total / tl.maximum(count, 1.0)
    squares -= total * share
    number = tl.sum(count, 0)[None]
    mean = tl.sum(count * (near + share), 0)[None] / tl.maximum(number, 1.0)
    deviation = near + share - mean
    squares = tl.sum(squares + count * deviation * deviation, 0)[None]
    return number, mean, squares


@triton.jit
def _of_tiles(
    p_x,
    p_taps,
    p_y,
    dealt,
    own,
    shape,
    channels: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """The same of a large kernel; differences are from the first value."""
    images, height, width = shape
    channel, m_channel = own
    lanes: tl.constexpr = (COLUMNS, channel.shape[1])
    count = tl.zeros(lanes, tl.float32)
    first = tl.zeros(lanes, tl.float32)
    total = tl.zeros(lanes, tl.float32)
    squares = tl.zeros(lanes, tl.float32)
    tiles = images * tl.cdiv(height, T) * tl.cdiv(width, COLUMNS)
    # Nothing is hoisted: offsets of rows would take many registers.
    for item in tl.range(
        turn(dealt), tiles, tl.num_programs(0), disable_licm=True
    ):
        row, col, o_row = tile_of(item, height, width, channels, T, COLUMNS)
        acc = convolve(
            zeros(T, lanes),
            p_x + o_row,
            p_taps,
            height,
            width,
            channel,
            m_channel,
            row,
            col,
            channels,
            K,
            D,
            False,
            T,
        )
        first = tl.where(count == 0, acc[0], first)
        values = tl.where(col < width, tl.minimum(height - row, T), 0)
        count += values.to(tl.float32)
        o_tile = o_row + col * channels + channel
        for t in tl.static_range(T):
            m_value = (col < width) & (row + t < height)
            difference = tl.where(m_value, acc[t] - first, 0.0)
            total += difference
            squares += difference * difference
            if WRITE:
                tl.store(
                    p_y + o_tile + t * width * channels,
                    acc[t].to(p_y.dtype.element_ty),
                    mask=m_channel & m_value,
                )
    return _combine(count, first, total, squares)


def measure(x: Tensor, taps: Tensor, first: Tensor, branches: tuple) -> Tensor:
    """Parts of the statistics; writes the output of the first branch.

    Args:
        x, first (Tensor): (B, C, H, W) in channels_last.
        taps (Tensor): (all taps, C), in the dtype of x.
        branches (tuple): Size, dilation and first tap of each.

    Returns:
        Tensor: (parts, branches * 3, C), float32.
    """
    is_banded = x.numel() > 0 and banded.takes(x, branches[0])
    layout = layout_of(x.shape)
    splits = num_splits(layout.tiles, layout.blocks, KNOBS['programs'])
    shape = splits, 3 * len(branches), x.shape[1]
    parts = x.new_empty(shape, dtype=torch.float32)
    if is_banded:
        size, *_ = branches[0]
        splits = banded.statistics(x, taps[: size**2], first, parts, size)
        if len(branches) == 1:
            return parts[:splits]
    plan = plan_of(branches, x.shape[1], int(is_banded))
    # Apart: with both, the compiler spills registers.
    for some in (plan._replace(FORMS=()), plan._replace(LARGE=())):
        if some.FORMS or some.LARGE:
            _statistics_kernel[len(parts), layout.blocks](
                x,
                taps,
                first,
                parts,
                *x.shape[1:],
                len(x),
                splits,
                BRANCHES=branches,
                **some._asdict(),
                **layout.constants,
            )
    return parts
