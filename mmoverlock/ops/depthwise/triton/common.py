"""Tiles of maps in channels_last, and convolutions of them in registers.

A program has ``T`` rows of a few columns and a block of channels; every
thread keeps its values of those rows. Going through the columns of a kernel,
it loads the ``T + K - 1`` rows of the input below one column once, for
``T * K`` multiply-adds in single precision. So it goes for maps of single
precision; see banded.py for those of 16 bits.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from ...common import cast_as_convolutions, cdiv, channels_last
from ...partial_sums import check_device

# Candidates for tiles, of which sums are made or which are written; the first
# one of the least cost is taken.
KNOBS = dict(sum_rows=(7, 10, 16), map_rows=(7,), channels=(32, 16), lanes=256)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    sum_rows=((7,), (10,), (16,), (7, 10, 16)),
    map_rows=((7,), (10,), (16,), (7, 10, 16)),
    channels=((16,), (32,), (32, 16)),
    lanes=(128, 256, 512),
)
SPARSE = tl.constexpr(3)  # dilation that is too large for rows to be shared
# Arguments that come in too many values to compile for kinds of them
SIZES = ('height', 'width', 'items', 'images', 'splits', 'count', 'across')


@triton.jit
def tile_of(
    item, channels, height, width, T: tl.constexpr, LANES: tl.constexpr
):
    """First row, columns and channels of a tile, and their offsets.

    Returns:
        row (), col (X, 1), channel (1, C) and o_tile (X, C), the offsets of
        the first row.
    """
    blocks = tl.cdiv(width, LANES[0])
    tiles = tl.cdiv(height, T)
    channel = tl.program_id(1) * LANES[1] + tl.arange(0, LANES[1])[None]
    col = item % blocks * LANES[0] + tl.arange(0, LANES[0])[:, None]
    row = item // blocks % tiles * T
    image = (item // blocks // tiles).to(tl.int64)
    o_tile = ((image * height + row) * width + col) * channels + channel
    return row, col, channel, o_tile


@triton.jit
def zeros(LENGTH: tl.constexpr, LANES: tl.constexpr):
    rows = ()
    for _ in tl.static_range(LENGTH):
        rows = rows + (tl.zeros(LANES, tl.float32),)
    return rows


@triton.jit
def load_rows(p_x, row, step, height, m_x, T: tl.constexpr):
    """Rows of a tile as a tuple, zero outside of the map."""
    rows = ()
    for t in tl.static_range(T):
        b_row = tl.load(p_x + t * step, mask=m_x & (row + t < height), other=0)
        rows = rows + (b_row.to(tl.float32),)
    return rows


@triton.jit
def convolve(
    acc,
    p_x,
    p_taps,
    channels,
    height,
    width,
    channel,
    row,
    col,
    K: tl.constexpr,
    D: tl.constexpr,
    FLIP: tl.constexpr,
    T: tl.constexpr,
):
    """Add a convolution to a tile, a tuple of T rows.

    Args:
        acc: T rows (X, C).
        p_x: Pointers (X, C) to the first row of the tile.
        p_taps: Pointer to the taps of the kernel, (K * K, channels).
        K, D: Size and dilation of the kernel.
        FLIP: Whether its taps come in reversed order.
        T: Rows of the tile.
    """
    REACH: tl.constexpr = K // 2 * D
    LAST: tl.constexpr = K * K - 1 if FLIP else 0
    SIGN: tl.constexpr = -1 if FLIP else 1
    step = width * channels
    m_channel = channel < channels
    for s in range(K):
        shift = s * D - REACH
        m_col = m_channel & (col + shift >= 0) & (col + shift < width)
        p_col = p_x + shift * channels
        p_tap = p_taps + (LAST + SIGN * s) * channels + channel
        if D < SPARSE:
            taps = ()
            for r in tl.static_range(K):
                b_tap = tl.load(
                    p_tap + SIGN * r * K * channels, mask=m_channel, other=0
                )
                taps = taps + (b_tap,)
            for i in tl.static_range(T + (K - 1) * D):
                if is_read(i, K, D, T):
                    y = row + i - REACH
                    b_x = tl.load(
                        p_col + (i - REACH) * step,
                        mask=m_col & (y >= 0) & (y < height),
                        other=0,
                    ).to(tl.float32)
                    for t in tl.static_range(T):
                        if meets(i - t, K, D):
                            part = tl.fma(b_x, taps[(i - t) // D], acc[t])
                            acc = acc[:t] + (part,) + acc[t + 1 :]
        else:  # hardly a row meets two taps
            for r in range(K):
                b_tap = tl.load(
                    p_tap + SIGN * r * K * channels, mask=m_channel, other=0
                )
                first = r * D - REACH
                for t in tl.static_range(T):
                    y = row + first + t
                    b_x = tl.load(
                        p_col + (first + t) * step,
                        mask=m_col & (y >= 0) & (y < height),
                        other=0,
                    ).to(tl.float32)
                    part = tl.fma(b_x, b_tap, acc[t])
                    acc = acc[:t] + (part,) + acc[t + 1 :]
    return acc


@triton.jit
def tap_sums(
    acc,
    p_x,
    b_grad,
    channels,
    height,
    width,
    channel,
    row,
    col,
    s,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """Add ``grad[n] * x[n + tap]`` for column ``s`` of a kernel.

    Args:
        acc: K rows (X, C), one for each tap of the column.
        p_x: Pointers (X, C) to the first row of the tile.
        b_grad: T rows (X, C) of the gradient, zero outside of the map.
    """
    REACH: tl.constexpr = K // 2 * D
    step = width * channels
    shift = s * D - REACH
    p_col = p_x + shift * channels
    m_col = (channel < channels) & (col + shift >= 0) & (col + shift < width)
    for i in tl.static_range(T + (K - 1) * D):
        if is_read(i, K, D, T):
            y = row + i - REACH
            b_x = tl.load(
                p_col + (i - REACH) * step,
                mask=m_col & (y >= 0) & (y < height),
                other=0,
            ).to(tl.float32)
            for r in tl.static_range(K):
                if 0 <= i - r * D and i - r * D < T:
                    part = tl.fma(b_x, b_grad[i - r * D], acc[r])
                    acc = acc[:r] + (part,) + acc[r + 1 :]
    return acc


@constexpr_function
def meets(distance: int, size: int, dilation: int) -> bool:
    """Whether a kernel has a tap so many rows behind its first one."""
    return distance % dilation == 0 and 0 <= distance // dilation < size


@constexpr_function
def is_read(row: int, size: int, dilation: int, tile: int) -> bool:
    return any(meets(row - t, size, dilation) for t in range(tile))


@triton.jit
def tap_at(
    r,
    s,
    K: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The tap of a branch at a place of a larger kernel, if there is one.

    Args:
        r, s: Row and column, from 0 on.
        K, D, FIRST: Size, dilation and first tap of the branch.
        SIZE: Of the larger kernel, which has the same center.

    Returns:
        tuple: The tap among those of all branches, and whether it is one.
    """
    y = r - (SIZE // 2 - K // 2 * D)
    x = s - (SIZE // 2 - K // 2 * D)
    met = (y >= 0) & (y <= (K - 1) * D) & (y % D == 0)
    met = met & (x >= 0) & (x <= (K - 1) * D) & (x % D == 0)
    return FIRST + y // D * K + x // D, met


class Layout(NamedTuple):
    """How a map is cut into tiles."""

    rows: int
    lanes: tuple[int, int]  # columns, channels

    @classmethod
    def of(cls, shape: torch.Size, size: int, rows: str) -> 'Layout':
        """For a kernel of so many rows; ``rows`` is a key of ``KNOBS``."""
        _, channels, height, _ = shape
        return _layout(channels, height, size, rows)

    def grid(self, shape: torch.Size) -> tuple[int, int]:
        """Tiles, and blocks of channels."""
        batch, channels, height, width = shape
        columns, block = self.lanes
        across = cdiv(width, columns)
        tiles = batch * cdiv(height, self.rows) * across
        return tiles, cdiv(channels, block)


@lru_cache
def _layout(channels: int, height: int, size: int, rows: str) -> Layout:
    rows = min(
        KNOBS[rows],
        key=lambda t: cdiv(height, t) * (t * size + 4 * (t + size)),
    )
    block = min(KNOBS['channels'], key=lambda n: cdiv(channels, n) * n)
    return Layout(rows, (KNOBS['lanes'] // block, block))


def autocast(x: Tensor) -> Tensor:
    """Cast a map as autocast does for a convolution, and check it."""
    check_device(x)
    return channels_last(cast_as_convolutions(x))
