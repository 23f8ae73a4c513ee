"""Tiles of maps in channels_last, and convolutions of them in registers.

A program has ``T`` rows of a few columns and a block of channels; every
thread keeps its values of those rows, of four channels. Going through the
columns of a kernel, it loads the ``T + K - 1`` rows of the input below one
column once, for ``T * K`` multiply-adds in single precision. Large kernels of
16-bit maps go to tensor cores, see banded.py.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from ...common import cast_as_convolutions, cdiv, channels_last
from ...partial_sums import check_device

# CHANNELS of a program are the candidate of which the fewest are beyond the
# map's (in 16 bits, 64 are a line of the cache), its columns what is left of
# LANES.
KNOBS = dict(T=7, CHANNELS=(64, 32, 16), LANES=512, warps=4, registers=168)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    T=(4, 5, 7, 10),
    CHANNELS=((64, 32, 16), (32, 16), (16,)),
    LANES=(128, 256, 512),
    warps=(1, 2, 4),
    registers=(255, 168, 128),
)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Arguments that come in too many values to compile for kinds of them
SIZES = ('height', 'width', 'items', 'images', 'splits', 'count', 'across')


@triton.jit
def channels_of(block, channels: tl.constexpr, CHANNELS: tl.constexpr):
    """A block of channels (1, C), and which of them there are."""
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None]
    if channels % CHANNELS == 0:
        return channel, tl.full((1, CHANNELS), True, tl.int1)
    return channel, channel < channels


@triton.jit
def tile_of(
    item,
    height,
    width,
    channels,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """First row (), columns (X, 1) and where the row begins, in 64 bits."""
    blocks = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, T)
    col = item % blocks * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    row = item // blocks % tiles * T
    image = (item // blocks // tiles).to(tl.int64)
    return row, col, (image * height + row) * width * channels


@triton.jit
def widen(block):
    """Values in single precision, those of bfloat16 in one instruction each.

    NVIDIA's compiler takes two for every second one.
    """
    PTX: tl.constexpr = not INTERPRETED and tl.target_info.is_cuda()
    if PTX and block.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            'shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;',
            '=r,=r,r',
            [block],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return block.to(tl.float32)


@triton.jit
def zeros(LENGTH: tl.constexpr, LANES: tl.constexpr):
    rows = ()
    for _ in tl.static_range(LENGTH):
        rows = rows + (tl.zeros(LANES, tl.float32),)
    return rows


@triton.jit
def convolve(
    acc,
    p_row,
    p_taps,
    height,
    width,
    channel,
    m_channel,
    row,
    col,
    channels: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    FLIP: tl.constexpr,
    T: tl.constexpr,
):
    """Add a convolution to a tile, a tuple of T rows.

    Args:
        acc: T rows (X, C).
        p_row: Pointer () to where the first row begins, in (B, H, W, C).
        p_taps: Pointer to the taps of the kernel, (K * K, channels).
        K, D: Size and dilation of the kernel.
        FLIP: Whether its taps come in reversed order.
        T: Rows of the tile.
    """
    REACH: tl.constexpr = K // 2 * D
    LAST: tl.constexpr = K * K - 1 if FLIP else 0
    SIGN: tl.constexpr = -1 if FLIP else 1
    step = width * channels
    # Offsets of every row, if hoisted, would take half the registers.
    for s in tl.range(K, disable_licm=True):
        x = col + s * D - REACH
        o_x = x * channels + channel
        m_x = m_channel & (x >= 0) & (x < width)
        p_tap = p_taps + (LAST + SIGN * s) * channels + channel
        # One for all threads, moved from row to row, which takes no registers
        p_next = p_row - REACH * step
        taps = ()
        for i in tl.static_range(T + (K - 1) * D):
            if i % D == 0 and i // D < K:
                b_tap = tl.load(p_tap, mask=m_channel, other=0)
                taps = taps + (widen(b_tap),)
                p_tap += SIGN * K * channels
            if is_read(i, K, D, T):
                y = row + i - REACH
                m_row = m_x & (y >= 0) & (y < height)
                b_x = widen(tl.load(p_next + o_x, mask=m_row, other=0))
                for t in tl.static_range(T):
                    if meets(i - t, K, D):
                        part = tl.fma(b_x, taps[(i - t) // D], acc[t])
                        acc = acc[:t] + (part,) + acc[t + 1 :]
            p_next += step
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
    """How maps are cut into tiles: constants of kernels, and their grid."""

    constants: dict[str, Any]
    tiles: int
    blocks: int  # of channels


def channel_block(channels: int) -> tuple[int, int]:
    """Channels of a program, and how many such blocks there are."""
    block = min(KNOBS['CHANNELS'], key=lambda n: cdiv(channels, n) * n)
    return block, cdiv(channels, block)


@lru_cache
def layout_of(shape: torch.Size) -> Layout:
    """The layout of maps of a shape, (B, C, H, W)."""
    batch, channels, height, width = shape
    block, blocks = channel_block(channels)
    columns, rows = KNOBS['LANES'] // block, KNOBS['T']
    constants = dict(
        T=rows,
        COLUMNS=columns,
        CHANNELS=block,
        num_warps=KNOBS['warps'],
        maxnreg=KNOBS['registers'],
    )
    tiles = batch * cdiv(height, rows) * cdiv(width, columns)
    return Layout(constants, tiles, blocks)


def autocast(x: Tensor) -> Tensor:
    """Cast a map as autocast does for a convolution, and check it."""
    check_device(x)
    return channels_last(cast_as_convolutions(x))
