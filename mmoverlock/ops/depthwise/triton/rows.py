"""Convolutions by small kernels, along rows of maps.

A program has an *item* for each of its rows of lanes: ``T`` rows of the output
that are as far apart as the taps of a kernel. Threads go along them, as many
columns at a time, and keep the taps in registers, and of every row the ``K``
columns that see the one they are at. So a value, once loaded, meets up to
``K * K`` multiply-adds. Kernels of one size share their code, whatever their
dilation. Programs take turns for the items of all branches.

Triton 3.7 compares every load with all else that a kernel does, unless its
pointers are passed on from one step of a loop to the next: here they are, with
a tenth of the time to compile.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from . import common
from .common import channel_block, widen, zeros

# By size of a kernel, or the next larger one: channels of a thread, and rows
# of an item
KNOBS = dict(FORMS={3: (4, 4), 5: (2, 7), 7: (1, 7), 9: (1, 4)})
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    FORMS=(
        KNOBS['FORMS'],
        {3: (4, 4), 5: (2, 4), 7: (1, 4), 9: (1, 4)},
        {3: (4, 7), 5: (2, 7), 7: (1, 7), 9: (1, 3)},
        {3: (2, 7), 5: (1, 7), 7: (1, 7), 9: (1, 4)},
    )
)


class Plan(NamedTuple):
    """Shares branches among loops of a kernel, which is compiled for it."""

    # Of small kernels, for each size: itself, items of a program, rows of an
    # item; the first of its members and how many there are
    FORMS: tuple
    MEMBERS: tuple  # dilation, first tap and index of each branch
    LARGE: tuple  # indices of the other branches


@lru_cache
def plan_of(branches: tuple, channels: int, skip: int = 0) -> Plan:
    """The plan of branches that read one map.

    Args:
        branches (tuple): Size, dilation and first tap of each.
        channels (int): Of the map.
        skip (int): How many branches are left out. Defaults to 0.
    """
    block, _ = channel_block(channels)
    sizes, large = {}, []
    for b, (size, dilation, first) in [*enumerate(branches)][skip:]:
        if size > max(KNOBS['FORMS']):
            large.append(b)
        else:
            sizes.setdefault(size, []).append((dilation, first, b))
    forms, members = [], []
    for size, some in sizes.items():
        form = min(k for k in KNOBS['FORMS'] if k >= size)
        per_thread, rows = KNOBS['FORMS'][form]
        lanes = max(1, 32 * common.KNOBS['warps'] * per_thread // block)
        forms.append((size, lanes, rows, len(members), len(some)))
        members += some
    return Plan(tuple(forms), tuple(members), tuple(large))


@triton.jit
def member(i, MEMBERS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Dilation, first tap and index of one of COUNT branches."""
    dilation = tl.full((), MEMBERS[FIRST][0], tl.int32)
    tap = tl.full((), MEMBERS[FIRST][1], tl.int32)
    b = tl.full((), MEMBERS[FIRST][2], tl.int32)
    for j in tl.static_range(1, COUNT):
        dilation = tl.where(i == j, MEMBERS[FIRST + j][0], dilation)
        tap = tl.where(i == j, MEMBERS[FIRST + j][1], tap)
        b = tl.where(i == j, MEMBERS[FIRST + j][2], b)
    return dilation, tap, b


@triton.jit
def turn(dealt):
    """The first piece of work of this program, after so many of others."""
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - dealt % programs) % programs


@triton.jit
def count_items(shape, dilation, T: tl.constexpr):
    """How many items there are of maps (images, height, width)."""
    groups = tl.cdiv(tl.cdiv(shape[1], dilation), T)
    return shape[0] * groups * dilation


@triton.jit
def place(
    first,
    own,
    shape,
    dilation,
    channels: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
):
    """Where N items are.

    Args:
        own: Channels (1, C) of the program, and which of them there are.

    Returns:
        tuple: First row (N, 1), whether it is on a map (N, C), and the offset
        of its first value (N, C), in 64 bits.
    """
    images, height, width = shape
    channel, m_channel = own
    item = first + tl.arange(0, N)[:, None]
    groups = tl.cdiv(tl.cdiv(height, dilation), T)
    phase = item // groups
    row = item % groups * T * dilation + phase % dilation
    image = (phase // dilation).to(tl.int64)
    o_row = (image * height + row) * width * channels + channel
    return row, m_channel & (image < images) & (row < height), o_row


@triton.jit
def load_taps(
    p_taps, own, channels: tl.constexpr, K: tl.constexpr, N: tl.constexpr
):
    """K * K taps (N, C), in single precision."""
    channel, m_channel = own
    lanes: tl.constexpr = (N, channel.shape[1])
    p_first = p_taps + tl.broadcast_to(channel, lanes)
    m_tap = tl.broadcast_to(m_channel, lanes)
    p_row = ()
    for s in tl.static_range(K):
        p_row = p_row + (p_first + s * channels,)
    taps = zeros(K * K, lanes)
    for _ in tl.range(0, K):
        taps = taps[K:]
        p_next = ()
        for s in tl.static_range(K):
            b_tap = tl.load(p_row[s], mask=m_tap, other=0)
            taps = taps + (b_tap.to(tl.float32),)
            p_next = p_next + (p_row[s] + K * channels,)
        p_row = p_next
    return taps


@triton.jit
def convolve_rows(
    FINISH: tl.constexpr,
    state,
    operands,
    p_x,
    taps,
    start,
    items,
    shape,
    dilation,
    channels: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
):
    """Go along the rows of some items, and finish value after value.

    Args:
        FINISH: Called as ``FINISH(state, operands, value, o_value, m_value)``
            with values (N, C) of the convolution, their offsets and which of
            them there are; returns the state.
        state (tuple), operands: For it.
        p_x: Pointer to the maps (B, H, W, C).
        taps: K * K of them (N, C).
        start: (N, C), which the convolution is added to.
        items: What :func:`place` returns.
        shape: (B, H, W).
    """
    HALF: tl.constexpr = K // 2
    height = shape[1]
    width = shape[2]
    row, m_item, o_row = items
    step = dilation * width * channels
    columns = tl.cdiv(width, dilation)
    for col in tl.range(0, dilation):
        o_first = o_row + col * channels
        rest = tl.where(m_item, width - col, 0)
        where = (row, rest, o_first, height, dilation, step)
        p_rows = ()
        for r in tl.static_range(T + K - 1):
            p_rows = p_rows + (p_x + o_first + (r - HALF) * step,)
        acc = ()
        for _ in tl.static_range(T * K):
            acc = acc + (start,)
        for x in tl.range(0, columns):
            m_column = x * dilation < rest
            values = ()
            p_next = ()
            for r in tl.static_range(T + K - 1):
                # No row is both above the map and below.
                if r < HALF:
                    m_row = m_column & (row >= (HALF - r) * dilation)
                else:
                    m_row = m_column & (row < height - (r - HALF) * dilation)
                b_x = tl.load(p_rows[r], mask=m_row, other=0)
                values = values + (widen(b_x),)
                p_next = p_next + (p_rows[r] + dilation * channels,)
            p_rows = p_next
            acc = _add_column(acc, start, values, taps, K, T)
            state = _finish(
                FINISH,
                state,
                operands,
                acc,
                x - HALF,
                where,
                channels,
                K,
                T,
            )
        for i in tl.range(0, HALF):
            acc = acc[1:] + (start,)
            state = _finish(
                FINISH,
                state,
                operands,
                acc,
                columns - HALF + i,
                where,
                channels,
                K,
                T,
            )
    return state


@triton.jit
def _add_column(acc, start, values, taps, K: tl.constexpr, T: tl.constexpr):
    """Add a column of the map to all columns of the output that see it.

    Args:
        acc: T times K columns (N, C) of the output, which saw the last one.
        values: T + K - 1 of the map (N, C).

    Returns:
        The same of those which see this one; of every K, the first has seen
        all.
    """
    new = ()
    for t in tl.static_range(T):
        for s in tl.static_range(K):
            part = start
            if s < K - 1:
                part = acc[t * K + s + 1]
            for r in tl.static_range(K):
                tap = taps[r * K + K - 1 - s]
                part = tl.fma(values[t + r], tap, part)
            new = new + (part,)
    return new


@triton.jit
def _finish(
    FINISH: tl.constexpr,
    state,
    operands,
    acc,
    x,
    where,
    channels: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
):
    """Finish the first of every K columns, which is x steps along the rows."""
    row, rest, o_first, height, dilation, step = where
    o_column = o_first + x * (dilation * channels)
    m_column = (x >= 0) & (x * dilation < rest)
    for t in tl.static_range(T):
        m_value = m_column & (row < height - t * dilation)
        o_value = o_column + t * step
        state = FINISH(state, operands, acc[t * K], o_value, m_value)
    return state
