"""Convolutions of 16-bit maps on tensor cores, by banded matrices.

Take a channel, a row r of a kernel of dilation d, 16 columns x of the output
and 16 columns x' of the input. With

    band_r[x', x] = w[r, s]  where x' is s d - reach columns behind x,
                    0        elsewhere,

what the row adds to the output is a product of matrices,

    out[n, x] += sum over x' of input[n, x'] band_r[x', x],

where n are 16 *tiles*, of any images, of T rows by at most 16 columns: they
share the bands. A row of the tiles of the input, loaded once, meets the bands
of R rows of the kernel. The windows x' of the input are as many as reach from
the first column of a tile to its last; on a map of up to 16 columns one holds
all.

Taps have the dtype of the map, as under autocast; sums are in single
precision. There are no atomic operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from ...common import cdiv
from ...launching import jit
from .common import SIZES, SPARSE, is_read, meets, store_statistics
from .weight_grads import (
    WINDOW,
    by_channel,
    dot,
    matrices,
    num_splits,
    own_channels,
)

# Rows of a tile, and of a kernel at a time; PAIR is how many channels a warp
# takes from one load; registers are at most those for many windows and for
# one. Programs are those of sums, where there is enough to do.
KNOBS = dict(
    T=3, R=2, CHANNELS=16, PAIR=2, WARPS=8, registers=(192, 168), programs=528
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    T=(2, 3, 4, 5, 7),
    R=(2, 3, 4),
    CHANNELS=(8, 16, 32),
    PAIR=(1, 2, 4),
    WARPS=(4, 8),
    registers=((255, 255), (192, 168), (128, 128)),
    programs=(264, 528, 1056),
)


@triton.jit
def _place(chunk, images, height, width, across, T: tl.constexpr):
    """The tiles of a chunk.

    Returns:
        Of every tile (16, ), row and column of its first value, the offset of
        that row in values of a channel, and whether it exists; and how many
        columns it has.
    """
    columns = tl.cdiv(width, across)
    down = tl.cdiv(height, T)
    item = chunk * WINDOW + tl.arange(0, WINDOW)
    col = item % across * columns
    row = item // across % down * T
    image = (item // across // down).to(tl.int64)
    o_row = (image * height + row) * width
    return row, col, o_row, item < images * down * across, columns


@triton.jit
def _by_column(b_rows, CHANNELS: tl.constexpr, PAIR: tl.constexpr):
    """Rows (tiles, columns, C) of matrices (C, tiles, columns)."""
    b_rows = tl.reshape(b_rows, (PAIR, CHANNELS // PAIR, WINDOW, WINDOW))
    b_rows = tl.permute(b_rows, 2, 3, 1, 0)
    return tl.reshape(b_rows, (WINDOW, WINDOW, CHANNELS))


@triton.jit
def _convolve(
    acc,
    p_x,
    p_taps,
    row,
    col,
    o_row,
    m_tile,
    columns,
    channel,
    channels,
    height,
    width,
    K: tl.constexpr,
    D: tl.constexpr,
    FLIP: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Add a convolution to T rows of tiles.

    Args:
        acc: T matrices (C, tiles, columns).
        p_x: Pointer to a map (B, H, W, C).
        p_taps: Pointer to the taps of the kernel, (K * K, channels).
        row, col, o_row, m_tile, columns: See :func:`_place`.
        channel: (1, 1, C).
        K, D: Size and dilation of the kernel.
        FLIP: Whether its taps come in reversed order.
        NARROW: Whether a window holds all columns of the map.
        ROWS: Rows of the kernel at a time, at most.
    """
    REACH: tl.constexpr = K // 2 * D
    LAST: tl.constexpr = K * K - 1 if FLIP else 0
    SIGN: tl.constexpr = -1 if FLIP else 1
    R: tl.constexpr = 1 if D >= SPARSE else _share(K, ROWS)
    FIRST: tl.constexpr = 0 if NARROW else -REACH
    READ: tl.constexpr = T + (R - 1) * D
    n = tl.arange(0, WINDOW)
    step = width * channels
    m_channel = channel < channels
    windows = 1 if NARROW else tl.cdiv(columns + 2 * REACH, WINDOW)
    # Tiles in registers: shared memory could not be read without conflicts.
    for w in tl.range(windows, num_stages=1):
        start = FIRST + w * WINDOW
        behind = n[:, None] - n[None] + start + REACH  # (x', x)
        s = behind // D
        m_tap = (behind >= 0) & (behind % D == 0) & (s < K)
        m_tap = m_tap[:, :, None] & m_channel
        o_tap = (LAST + SIGN * s)[:, :, None] * channels + channel
        col_x = (col + start)[:, None] + n[None]  # (tiles, x')
        m_x = m_tile[:, None] & (col_x >= 0) & (col_x < width)
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
                bands = bands + (by_channel(b_tap, CHANNELS, PAIR),)
            y = row + r_0 * D - REACH
            p_row = p_col + (r_0 * D - REACH) * step
            b_next = _row(p_row, y, height, m_x)
            for i in tl.static_range(READ):
                if is_read(i, R, D, T):
                    b_x = by_channel(b_next, CHANNELS, PAIR)
                    if _after(i, R, D, T) < READ:  # while products are made
                        b_next = _row(
                            p_row + _after(i, R, D, T) * step,
                            y + _after(i, R, D, T),
                            height,
                            m_x,
                        )
                    for t in tl.static_range(T):
                        if meets(i - t, R, D):
                            part = dot(b_x, bands[(i - t) // D], acc[t])
                            acc = acc[:t] + (part,) + acc[t + 1 :]
    return acc


@triton.jit
def _row(p_row, row, height, m_x):
    """A row of every tile of a map, zero outside of it."""
    m_row = ((row >= 0) & (row < height))[:, None, None]
    return tl.load(p_row, mask=m_x & m_row, other=0)


@constexpr_function
def _share(size, most):
    """Rows of a kernel at a time, nearly as many each time."""
    times = -(-size // most)
    return -(-size // times)


@constexpr_function
def _after(row, size, dilation, tile):
    """The next row that is read."""
    row += 1
    last = tile + (size - 1) * dilation
    while row < last and not is_read(row, size, dilation, tile):
        row += 1
    return row


@jit(do_not_specialize=SIZES)
def _conv2d_kernel(
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
    BRANCHES: tl.constexpr,
    FLIP: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Sum of the convolutions of maps, one for each branch.

    As of conv2d.py; x (branches, B, H, W, C), taps (all taps, C), bias (C, ),
    other and out (B, H, W, C); grid (chunks, blocks of channels).
    """
    row, col, o_row, m_tile, columns = _place(
        tl.program_id(0), images, height, width, across, T
    )
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channel[None, None]
    o_branch = tl.cast(images, tl.int64) * height * width * channels
    acc = matrices(T, CHANNELS)
    for b in tl.static_range(len(BRANCHES)):
        acc = _convolve(
            acc,
            p_x + b * o_branch,
            p_taps + BRANCHES[b][2] * channels,
            row,
            col,
            o_row,
            m_tile,
            columns,
            channel,
            channels,
            height,
            width,
            BRANCHES[b][0],
            BRANCHES[b][1],
            FLIP,
            NARROW,
            T,
            ROWS,
            CHANNELS,
            PAIR,
        )
    b_bias = 0.0
    if p_bias is not None:
        own = own_channels(tl.program_id(1), CHANNELS, PAIR)
        own = own[:, None, None]
        b_bias = tl.load(p_bias + own, mask=own < channels, other=0)
        b_bias = b_bias.to(tl.float32)
    o_out, m_out = _values(
        row, col, o_row, m_tile, columns, channel, channels, width
    )
    for t in tl.static_range(T):
        m_row = m_out & (row + t < height)[:, None, None]
        b_out = acc[t] + b_bias
        if p_other is not None:
            b_other = tl.load(p_other + o_out, mask=m_row, other=0)
            b_out += by_channel(b_other, CHANNELS, PAIR).to(tl.float32)
        b_out = b_out.to(p_out.dtype.element_ty)
        b_out = _by_column(b_out, CHANNELS, PAIR)
        tl.store(p_out + o_out, b_out, mask=m_row)
        o_out += width * channels


@triton.jit
def _values(row, col, o_row, m_tile, columns, channel, channels, width):
    """Offsets (tiles, columns, C) of the first row, and which there are."""
    n = tl.arange(0, WINDOW)[None]
    at = col[:, None] + n
    m_value = m_tile[:, None] & (n < columns) & (at < width)
    o_value = (o_row[:, None] + at)[:, :, None] * channels + channel
    return o_value, m_value[:, :, None] & (channel < channels)


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
    across,
    BRANCHES: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Number of values, mean and sum of squared deviations from it.

    Of every channel of every branch; x (B, H, W, C), taps (all taps, C), y
    (B, H, W, C), the output of the first branch, parts (splits, branches * 3,
    C); grid (splits, blocks of channels).
    """
    split = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channel[None, None]
    own = own_channels(tl.program_id(1), CHANNELS, PAIR)
    chunks = tl.cdiv(images * tl.cdiv(height, T) * across, WINDOW)
    o_part = tl.cast(split, tl.int64) * len(BRANCHES) * 3 * channels
    p_part = p_parts + o_part + own
    n = tl.arange(0, WINDOW)[None]
    for b in tl.static_range(len(BRANCHES)):
        count = 0.0
        mean = tl.zeros((CHANNELS,), tl.float32)
        squares = tl.zeros((CHANNELS,), tl.float32)
        for chunk in tl.range(
            split,
            chunks,
            tl.num_programs(0),
            num_stages=1,
            disable_licm=True,
        ):
            row, col, o_row, m_tile, columns = _place(
                chunk, images, height, width, across, T
            )
            acc = _convolve(
                matrices(T, CHANNELS),
                p_x,
                p_taps + BRANCHES[b][2] * channels,
                row,
                col,
                o_row,
                m_tile,
                columns,
                channel,
                channels,
                height,
                width,
                BRANCHES[b][0],
                BRANCHES[b][1],
                False,
                NARROW,
                T,
                ROWS,
                CHANNELS,
                PAIR,
            )
            m_col = m_tile[:, None] & (n < columns)
            m_col = m_col & (col[:, None] + n < width)
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
            if b == 0:
                o_y, m_y = _values(
                    row, col, o_row, m_tile, columns, channel, channels, width
                )
                for t in tl.static_range(T):
                    b_y = acc[t].to(p_y.dtype.element_ty)
                    tl.store(
                        p_y + o_y + t * width * channels,
                        _by_column(b_y, CHANNELS, PAIR),
                        mask=m_y & (row + t < height)[:, None, None],
                    )
        m_own = own < channels
        store_statistics(p_part, count, mean, squares, channels, m_own)
        p_part += 3 * channels


@jit(do_not_specialize=SIZES)
def _branch_grads_kernel(
    p_x,
    p_y,
    p_grad,
    p_taps,
    p_factors,
    p_out,
    channels: tl.constexpr,
    height,
    width,
    images,
    across,
    BRANCHES: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """``p g - q y - o`` for every branch.

    x, y (of the first branch) and grad (B, H, W, C), taps (all taps, C),
    factors (3, branches, C), out (branches, B, H, W, C); grid (chunks, blocks
    of channels).
    """
    chunks = tl.cdiv(images * tl.cdiv(height, T) * across, WINDOW)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channel[None, None]
    own = own_channels(tl.program_id(1), CHANNELS, PAIR)[:, None, None]
    o_branch = tl.cast(images, tl.int64) * height * width * channels
    step = width * channels
    for b in tl.static_range(len(BRANCHES)):
        # One chunk, in a loop that nothing is moved out of
        for chunk in tl.range(
            tl.program_id(0),
            chunks,
            tl.num_programs(0),
            num_stages=1,
            disable_licm=True,
        ):
            row, col, o_row, m_tile, columns = _place(
                chunk, images, height, width, across, T
            )
            acc = matrices(T, CHANNELS)
            if b > 0:
                acc = _convolve(
                    acc,
                    p_x,
                    p_taps + BRANCHES[b][2] * channels,
                    row,
                    col,
                    o_row,
                    m_tile,
                    columns,
                    channel,
                    channels,
                    height,
                    width,
                    BRANCHES[b][0],
                    BRANCHES[b][1],
                    False,
                    NARROW,
                    T,
                    ROWS,
                    CHANNELS,
                    PAIR,
                )
            o_value, m_value = _values(
                row, col, o_row, m_tile, columns, channel, channels, width
            )
            # The first branch goes by columns, the others by channels.
            at = channel if b == 0 else own
            p_factor = p_factors + b * channels + at
            p = tl.load(p_factor, mask=at < channels, other=0)
            p_factor += len(BRANCHES) * channels
            q = tl.load(p_factor, mask=at < channels, other=0)
            p_factor += len(BRANCHES) * channels
            o = tl.load(p_factor, mask=at < channels, other=0)
            for t in tl.static_range(T):
                m_out = m_value & (row + t < height)[:, None, None]
                o_out = o_value + t * step
                b_grad = tl.load(p_grad + o_out, mask=m_out, other=0)
                if b == 0:
                    b_y = tl.load(p_y + o_out, mask=m_out, other=0)
                    b_y = b_y.to(tl.float32)
                    b_out = p * b_grad.to(tl.float32) - q * b_y - o
                    b_out = b_out.to(p_out.dtype.element_ty)
                else:
                    b_grad = by_channel(b_grad, CHANNELS, PAIR)
                    b_out = p * b_grad.to(tl.float32) - q * acc[t] - o
                    b_out = b_out.to(p_out.dtype.element_ty)
                    b_out = _by_column(b_out, CHANNELS, PAIR)
                tl.store(p_out + b * o_branch + o_out, b_out, mask=m_out)


def _launch(kernel, x, *args, splits=None, **constants):
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
    kernel[splits or _chunks(x), cdiv(channels, KNOBS['CHANNELS'])](
        *args,
        channels,
        height,
        width,
        batch,
        across,
        NARROW=across == 1,
        T=KNOBS['T'],
        ROWS=KNOBS['R'],
        CHANNELS=KNOBS['CHANNELS'],
        PAIR=KNOBS['PAIR'],
        num_warps=KNOBS['WARPS'],
        maxnreg=KNOBS['registers'][across == 1],
        **constants,
    )


def _chunks(x):
    batch, _, height, width = x.shape
    tiles = batch * cdiv(height, KNOBS['T']) * cdiv(width, WINDOW.value)
    return cdiv(tiles, WINDOW.value)


def convolve_maps(
    x: Tensor,
    out: Tensor,
    taps: Tensor,
    branches: tuple,
    bias: Tensor | None,
    flip: bool,
    other: Tensor | None,
) -> None:
    """See :func:`conv2d.convolve_maps`.

    Args:
        x (Tensor): (branches, B, C, H, W), each map in channels_last.
        out (Tensor): (B, C, H, W) in channels_last, not empty.
    """
    operands = x, taps, bias, other, out
    _launch(_conv2d_kernel, out, *operands, BRANCHES=branches, FLIP=flip)


def statistics(x: Tensor, taps: Tensor, first: Tensor, branches: tuple):
    """Parts of the statistics of all branches; writes the first's output.

    Args:
        x, first (Tensor): (B, C, H, W) in channels_last.
        taps (Tensor): (all taps, C), in the dtype of x.
        branches (tuple): Size, dilation and first tap of each.

    Returns:
        Tensor: (splits, branches * 3, C), float32.
    """
    channels = x.shape[1]
    blocks = cdiv(channels, KNOBS['CHANNELS'])
    splits = num_splits(_chunks(x), blocks, KNOBS['programs'])
    shape = splits, 3 * len(branches), channels
    parts = x.new_empty(shape, dtype=torch.float32)
    _launch(
        _statistics_kernel,
        x,
        x,
        taps,
        first,
        parts,
        splits=splits,
        BRANCHES=branches,
    )
    return parts


def branch_grads(
    x: Tensor,
    first: Tensor,
    grad: Tensor,
    taps: Tensor,
    factors: Tensor,
    out: Tensor,
    branches: tuple,
) -> None:
    """Write the gradients of the outputs of all branches.

    Args:
        x, first, grad (Tensor): (B, C, H, W) in channels_last.
        taps (Tensor): (all taps, C), in the dtype of x.
        factors (Tensor): (3, branches, C), float32.
        out (Tensor): (branches, B, C, H, W), each in channels_last.
        branches (tuple): Size, dilation and first tap of each.
    """
    operands = x, first, grad, taps, factors, out
    _launch(_branch_grads_kernel, x, *operands, BRANCHES=branches)
