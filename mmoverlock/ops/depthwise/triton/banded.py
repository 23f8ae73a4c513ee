"""Convolutions of 16-bit maps on tensor cores, by banded matrices.

Take a channel, a row r of a kernel, 16 columns x of the output and 16 columns
x' of the input. With

    band_r[x', x] = w[r, s]  where x' is s - reach columns behind x,
                    0        elsewhere,

what the row adds to the output is a product of matrices,

    out[n, x] += sum over x' of input[n, x'] band_r[x', x],

where n are 16 *tiles*, of any images, of T rows by at most 16 columns: they
share the bands. A row of the tiles of the input, loaded once, meets the bands
of R rows of the kernel. The windows x' of the input are as many as reach from
the first column of a tile to its last; on a map of up to 16 columns one holds
all.

It pays for the large kernels, see ``SIZE``: of small ones, most of a band is
zero, and of dilated ones, no row meets two bands.

Taps have the dtype of the map, as under autocast; sums are in single
precision. There are no atomic operations. An infinite value makes NaN of what
its window is multiplied with by zero, beyond the reach of the kernel.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from ...batch_norm.triton import store_statistics
from ...common import cdiv
from ...launching import jit
from .common import INTERPRETED, SIZES, zeros
from .tap_grads import num_splits

WINDOW = tl.constexpr(16)  # columns, and tiles of a product
BEYOND = tl.constexpr(1 << 30)  # a row
SIZE = 13  # of the smallest kernel, without dilation
# Rows of a tile, and of a kernel at a time. CHANNELS of a program are the
# first that divide those of the map, or the last; a warp takes PAIR of them
# from one load. With 128 registers, 16 warps fit a multiprocessor: on an H200
# two fifths less time than with 192 and 8 of them, in spite of up to 56 bytes
# that are spilled. Statistics are those of so many programs, where there is
# enough to do.
KNOBS = dict(
    T=3, R=2, CHANNELS=(32, 16), PAIR=2, registers=128, statistics=264
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    T=(2, 3, 4, 5),
    R=(2, 3, 4),
    CHANNELS=((32, 16), (16,), (8,)),
    PAIR=(1, 2, 4),
    registers=(255, 192, 168, 128),
    statistics=(132, 264, 528),
)


@triton.jit
def _place(chunk, images, height, width, across, T: tl.constexpr):
    """The tiles of a chunk.

    Returns:
        Of every tile (16, ), row and column of its first value, and the
        offset of that row in values of a channel; and how many columns it
        has. Tiles that do not exist are beyond the last row of any map.
    """
    columns = tl.cdiv(width, across)
    down = tl.cdiv(height, T)
    item = chunk * WINDOW + tl.arange(0, WINDOW)
    col = item % across * columns
    row = item // across % down * T
    image = (item // across // down).to(tl.int64)
    o_row = (image * height + row) * width
    row = tl.where(item < images * down * across, row, BEYOND)
    return row, col, o_row, columns


@triton.jit
def _by_channel(b_rows, CHANNELS: tl.constexpr, PAIR: tl.constexpr):
    """Matrices (C, tiles, columns) of rows (tiles, columns, C).

    Channels next to each other belong to one warp, which moves them as one
    word.
    """
    b_rows = tl.reshape(b_rows, (WINDOW, WINDOW, CHANNELS // PAIR, PAIR))
    b_rows = tl.permute(b_rows, 3, 2, 0, 1)
    return tl.reshape(b_rows, (CHANNELS, WINDOW, WINDOW))


@triton.jit
def _own_channels(block, CHANNELS: tl.constexpr, PAIR: tl.constexpr):
    """Channels (C, ) of a block in the order that _by_channel leaves."""
    order = tl.arange(0, CHANNELS)
    own = order % (CHANNELS // PAIR) * PAIR + order // (CHANNELS // PAIR)
    return block * CHANNELS + own


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:  # which computes nonsense from products of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc)


@triton.jit
def _by_column(b_rows, CHANNELS: tl.constexpr, PAIR: tl.constexpr):
    """Rows (tiles, columns, C) of matrices (C, tiles, columns)."""
    b_rows = tl.reshape(b_rows, (PAIR, CHANNELS // PAIR, WINDOW, WINDOW))
    b_rows = tl.permute(b_rows, 2, 3, 1, 0)
    return tl.reshape(b_rows, (WINDOW, WINDOW, CHANNELS))


@triton.jit
def _convolve(
    place,
    p_x,
    p_taps,
    channel,
    channels,
    height,
    width,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """A convolution of T rows of tiles, as many matrices (C, tiles, columns).

    Args:
        place: Of the tiles, see :func:`_place`.
        p_x: Pointer to a map (B, H, W, C).
        p_taps: Pointer to the taps of the kernel, (K * K, channels).
        channel: (1, 1, C).
        K: Size of the kernel.
        FLIP: Whether its taps come in reversed order.
        NARROW: Whether a window holds all columns of the map.
        ROWS: Rows of the kernel at a time, at most.
    """
    row, col, o_row, columns = place
    acc = zeros(T, (CHANNELS, WINDOW, WINDOW))
    REACH: tl.constexpr = K // 2
    LAST: tl.constexpr = K * K - 1 if FLIP else 0
    SIGN: tl.constexpr = -1 if FLIP else 1
    R: tl.constexpr = _share(K, ROWS)
    FIRST: tl.constexpr = 0 if NARROW else -REACH
    READ: tl.constexpr = T + R - 1
    n = tl.arange(0, WINDOW)
    step = width * channels
    m_channel = channel < channels
    windows = 1 if NARROW else tl.cdiv(columns + 2 * REACH, WINDOW)
    # Tiles in registers: shared memory could not be read without conflicts.
    for w in tl.range(windows, num_stages=1):
        start = FIRST + w * WINDOW
        s = n[:, None] - n[None] + start + REACH  # (x', x)
        m_tap = ((s >= 0) & (s < K))[:, :, None] & m_channel
        o_tap = (LAST + SIGN * s)[:, :, None] * channels + channel
        col_x = (col + start)[:, None] + n[None]  # (tiles, x')
        m_x = (col_x >= 0) & (col_x < width)
        m_x = m_x[:, :, None] & m_channel
        p_col = p_x + (o_row[:, None] + col_x)[:, :, None] * channels + channel
        for r_0 in tl.range(0, K, R, num_stages=1):
            bands = ()
            for r in tl.static_range(R):
                b_tap = tl.load(
                    p_taps + SIGN * (r_0 + r) * K * channels + o_tap,
                    mask=m_tap & (r_0 + r < K),
                    other=0,
                )
                bands = bands + (_by_channel(b_tap, CHANNELS, PAIR),)
            y = row + r_0 - REACH
            p_row = p_col + (r_0 - REACH) * step
            b_next = _row(p_row, y, height, m_x)
            for i in tl.static_range(READ):
                b_x = _by_channel(b_next, CHANNELS, PAIR)
                if i + 1 < READ:  # while products are made
                    p_row += step
                    b_next = _row(p_row, y + i + 1, height, m_x)
                for t in tl.static_range(T):
                    if 0 <= i - t and i - t < R:
                        part = _dot(b_x, bands[i - t], acc[t])
                        acc = acc[:t] + (part,) + acc[t + 1 :]
    return acc


@triton.jit
def _row(p_row, row, height, m_x):
    """A row of every tile of a map, zero outside of it."""
    m_row = ((row >= 0) & (row < height))[:, None, None]
    return tl.load(p_row, mask=m_x & m_row, other=0)


@constexpr_function
def _share(size: int, most: int) -> int:
    """Rows of a kernel at a time, nearly as many each time."""
    times = -(-size // most)
    return -(-size // times)


@jit(do_not_specialize=SIZES)
def _banded_conv2d_kernel(
    p_x,
    p_taps,
    p_bias,
    p_other,
    p_out,
    channels: tl.constexpr,
    height,
    width,
    images,
    across,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """The convolution of a map, with bias and another map added.

    x, other and out (B, H, W, C), taps (K * K, C), bias (C, ); grid (chunks,
    blocks of channels).
    """
    place = _place(tl.program_id(0), images, height, width, across, T)
    row = place[0]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channel[None, None]
    acc = _convolve(
        place,
        p_x,
        p_taps,
        channel,
        channels,
        height,
        width,
        K,
        FLIP,
        NARROW,
        T,
        ROWS,
        CHANNELS,
        PAIR,
    )
    b_bias = 0.0
    if p_bias is not None:
        own = _own_channels(tl.program_id(1), CHANNELS, PAIR)
        own = own[:, None, None]
        b_bias = tl.load(p_bias + own, mask=own < channels, other=0)
        b_bias = b_bias.to(tl.float32)
    o_out, m_out = _values(place, channel, channels, width)
    for t in tl.static_range(T):
        m_row = m_out & (row + t < height)[:, None, None]
        b_out = acc[t] + b_bias
        if p_other is not None:
            b_other = tl.load(p_other + o_out, mask=m_row, other=0)
            b_out += _by_channel(b_other, CHANNELS, PAIR).to(tl.float32)
        b_out = b_out.to(p_out.dtype.element_ty)
        b_out = _by_column(b_out, CHANNELS, PAIR)
        tl.store(p_out + o_out, b_out, mask=m_row)
        o_out += width * channels


@triton.jit
def _values(place, channel, channels, width):
    """Offsets (tiles, columns, C) of the first row, and which there are."""
    _, col, o_row, columns = place
    n = tl.arange(0, WINDOW)[None]
    at = col[:, None] + n
    m_value = (n < columns) & (at < width)
    o_value = (o_row[:, None] + at)[:, :, None] * channels + channel
    return o_value, m_value[:, :, None] & (channel < channels)


@jit(do_not_specialize=SIZES)
def _banded_statistics_kernel(
    p_x,
    p_taps,
    p_y,
    p_parts,
    step,
    channels: tl.constexpr,
    height,
    width,
    images,
    across,
    K: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Number of values, mean and sum of squared deviations from it.

    Of every channel; x (B, H, W, C), taps (K * K, C), y (B, H, W, C), the
    output, parts (splits, 3, C), which are ``step`` apart; grid (splits,
    blocks of channels).
    """
    split = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channel[None, None]
    own = _own_channels(tl.program_id(1), CHANNELS, PAIR)
    chunks = tl.cdiv(images * tl.cdiv(height, T) * across, WINDOW)
    n = tl.arange(0, WINDOW)[None]
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    for chunk in tl.range(
        split, chunks, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        place = _place(chunk, images, height, width, across, T)
        acc = _convolve(
            place,
            p_x,
            p_taps,
            channel,
            channels,
            height,
            width,
            K,
            False,
            NARROW,
            T,
            ROWS,
            CHANNELS,
            PAIR,
        )
        row, col, _, columns = place
        m_col = (n < columns) & (col[:, None] + n < width)
        number = 0.0
        total = tl.zeros((CHANNELS, WINDOW, WINDOW), tl.float32)
        for t in tl.static_range(T):
            m_row = m_col & (row + t < height)[:, None]
            number += tl.sum(m_row.to(tl.float32))
            total += tl.where(m_row[None], acc[t], 0.0)
        part_mean = tl.sum(tl.sum(total, 2), 1) / number
        total = tl.zeros((CHANNELS, WINDOW, WINDOW), tl.float32)
        for t in tl.static_range(T):
            m_row = m_col & (row + t < height)[:, None]
            deviation = acc[t] - part_mean[:, None, None]
            total += tl.where(m_row[None], deviation * deviation, 0.0)
        share = number / (count + number)
        deviation = part_mean - mean
        squares += tl.sum(tl.sum(total, 2), 1)
        squares += deviation * deviation * count * share
        mean += deviation * share
        count += number
        o_y, m_y = _values(place, channel, channels, width)
        for t in tl.static_range(T):
            b_y = acc[t].to(p_y.dtype.element_ty)
            tl.store(
                p_y + o_y + t * width * channels,
                _by_column(b_y, CHANNELS, PAIR),
                mask=m_y & (row + t < height)[:, None, None],
            )
    p_part = p_parts + tl.cast(split, tl.int64) * step + own
    m_own = own < channels
    store_statistics(p_part, count, mean, squares, channels, m_own)


def takes(x: Tensor, branch: tuple[int, int, int]) -> bool:
    """Whether a kernel of some size and dilation is convolved here."""
    size, dilation, _ = branch
    return x.element_size() == 2 and dilation == 1 and size >= SIZE


def _launch(
    kernel: Any,
    x: Tensor,
    *args: Any,
    splits: int | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel on all tiles of maps (B, C, H, W) in channels_last.

    Args:
        kernel (JITFunction): Of this module.
        x (Tensor): One of the maps.
        args: Its arguments before the sizes.
        splits (int, optional): How many programs share the chunks. Defaults
            to one for each chunk.
        constants: Those of its own.
    """
    batch, channels, height, width = x.shape
    across = cdiv(width, WINDOW.value)
    tiles = batch * cdiv(height, KNOBS['T']) * across
    size = _block(channels)
    grid = splits or cdiv(tiles, WINDOW.value), cdiv(channels, size)
    kernel[grid](
        *args,
        channels,
        height,
        width,
        batch,
        across,
        NARROW=across == 1,
        T=KNOBS['T'],
        ROWS=KNOBS['R'],
        CHANNELS=size,
        PAIR=KNOBS['PAIR'],
        num_warps=size // KNOBS['PAIR'],
        maxnreg=KNOBS['registers'],
        **constants,
    )


def _block(channels: int) -> int:
    """Channels of a program."""
    sizes = KNOBS['CHANNELS']
    return next((n for n in sizes if channels % n == 0), sizes[-1])


def convolve_map(
    x: Tensor,
    out: Tensor,
    taps: Tensor,
    size: int,
    bias: Tensor | None,
    flip: bool,
    other: Tensor | None,
) -> None:
    """Write a convolution; arguments as of :func:`conv2d.convolve_maps`.

    Args:
        x, out (Tensor): (B, C, H, W) in channels_last, not empty.
        taps (Tensor): (size^2, C), in the dtype of x.
    """
    operands = x, taps, bias, other, out
    _launch(_banded_conv2d_kernel, out, *operands, K=size, FLIP=flip)


def statistics(
    x: Tensor, taps: Tensor, y: Tensor, parts: Tensor, size: int
) -> int:
    """Write a convolution, and its statistics into the first of some parts.

    Args:
        x, y (Tensor): (B, C, H, W) in channels_last, not empty.
        taps (Tensor): (size^2, C), in the dtype of x.
        parts (Tensor): (parts, 3 or more, C), float32; three are taken.

    Returns:
        int: How many parts are written.
    """
    channels = x.shape[1]
    blocks = cdiv(channels, _block(channels))
    splits = num_splits(len(parts), blocks, KNOBS['statistics'])
    _launch(
        _banded_statistics_kernel,
        x,
        x,
        taps,
        y,
        parts,
        parts.stride(0),
        splits=splits,
        K=size,
    )
    return splits
