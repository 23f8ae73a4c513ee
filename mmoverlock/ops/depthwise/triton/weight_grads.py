"""Gradients of weights of depthwise convolutions that read one map.

In single precision, a program adds up one column of a kernel in registers.

In 16 bits, tensor cores do it. Take a channel, a row r of a kernel of
dilation d, a window of 16 columns x of the gradient and one of 16 columns x'
of the input. The product

    P[x', x] = sum over n of input[n, r, x'] gradient[n, x]

has a long sum, over images, rows and tiles n, and its diagonals hold
gradients of weights: that of tap (r, s) is the sum of P[x', x] where x' is
``s d - reach`` columns behind x. So a *unit* of work is a few rows of a kernel
and where x' begins. It takes 16 *tiles* at a time, which are the dimension
that is summed over: a tile is T rows, d apart, by at most 16 columns.
The rows of x and of the gradient are loaded once for all pairs of them.

There are as many windows x' as a kernel needs (a power of 2). The parts of a
sum, a *lane* each, are as many as the largest number of windows: where a
kernel has fewer of them, lanes share its tiles.

Where only the sum of the gradient times what a convolution made is asked for,
which is its taps times the gradients of these, programs multiply the two.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import cdiv
from ...launching import jit
from .common import (
    INTERPRETED,
    SIZES,
    channels_of,
    layout_of,
    load_rows,
    tap_at,
    tap_sums,
    tile_of,
    zeros,
)

WINDOW = tl.constexpr(16)  # columns, and tiles that a product sums over
# Programs are those where there is enough to do: of columns in single
# precision; of units in 16 bits, eight for each multiprocessor of an H100. The
# others are of units; PAIR is how many channels a warp takes from one load.
# With 128 registers, two programs fit a multiprocessor: on an H200, 0.31 ms in
# place of 0.52 with 168 (256 channels, 14 x 14, 13 x 13), in spite of 8 to 24
# bytes that are spilled.
KNOBS = dict(
    column_programs=1024,
    unit_programs=1056,
    T=3,
    ROWS=3,
    CHANNELS=16,
    PAIR=2,
    WARPS=8,
    registers=128,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    column_programs=(512, 1024, 2048),
    unit_programs=(528, 1056, 2112),
    T=(2, 3, 4),
    ROWS=(3, 5, 7),
    CHANNELS=(8, 16, 32),
    PAIR=(1, 2, 4),
    WARPS=(4, 8),
    registers=(255, 168, 128),
)


@jit(do_not_specialize=SIZES)
def _columns_kernel(
    p_x,
    p_grads,
    p_taps,
    p_parts,
    channels: tl.constexpr,
    height,
    width,
    items,
    images,
    BRANCHES: tl.constexpr,
    INNER: tl.constexpr,
    STARTS: tl.constexpr,
    SUMS: tl.constexpr,
    SUM: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Parts of the gradients of the taps of all branches, by multiply-adds.

    ``parts[b, tap] = sum over n of grads[b, n] x[n + tap]``

    x (B, H, W, C), grads (branches, B, H, W, C), parts (splits, SUMS, C), with
    SUM the last of them the sum of the first gradient; grid (splits, blocks of
    channels, columns of all kernels), COLUMNS the first of each branch.

    With taps (all taps, C) of INNER branches, parts (splits columns, SUMS, C)
    are what a column adds to the sums of theirs times ``parts[0]``, and SUM.
    """
    split = tl.program_id(0)
    column = tl.program_id(2)
    channel, m_channel = channels_of(tl.program_id(1), channels, CHANNELS)
    o_branch = tl.cast(images, tl.int64) * height * width * channels
    part = tl.cast(split, tl.int64)
    if len(INNER):
        part = part * tl.num_programs(2) + column
    p_part = p_parts + part * SUMS * channels + channel
    for b in tl.static_range(len(BRANCHES)):
        s = column - STARTS[b]
        if (s >= 0) & (s < BRANCHES[b][0]):
            _column(
                p_x,
                p_grads + b * o_branch,
                p_taps,
                p_part + BRANCHES[b][2] * channels,
                p_part + (SUMS - 1) * channels,
                split,
                channel,
                m_channel,
                s,
                height,
                width,
                items,
                channels,
                BRANCHES[b][0],
                BRANCHES[b][1],
                INNER,
                SUM and b == 0,
                T,
                COLUMNS,
            )


@triton.jit
def _column(
    p_x,
    p_grad,
    p_taps,
    p_part,
    p_total,
    split,
    channel,
    m_channel,
    s,
    height,
    width,
    items,
    channels: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    INNER: tl.constexpr,
    SUM: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Column s of the kernel of a branch."""
    lanes: tl.constexpr = (COLUMNS, channel.shape[1])
    acc = zeros(K, lanes)
    total = tl.zeros(lanes, tl.float32)
    for item in range(split, items, tl.num_programs(0)):
        row, col, o_row = tile_of(item, height, width, channels, T, COLUMNS)
        b_grad = load_rows(
            p_grad + o_row,
            col * channels + channel,
            row,
            width * channels,
            height,
            m_channel & (col < width),
            T,
        )
        if SUM:
            for t in tl.static_range(T):
                total += b_grad[t]
        acc = tap_sums(
            acc,
            p_x + o_row,
            b_grad,
            height,
            width,
            channel,
            m_channel,
            row,
            col,
            s,
            channels,
            K,
            D,
            T,
        )
    sums = ()
    for r in tl.static_range(K):
        sums = sums + (tl.sum(acc[r], 0)[None],)
    b_sum = tl.sum(total, 0)[None]
    if len(INNER):
        for b in tl.static_range(len(INNER)):
            product = tl.zeros_like(b_sum)
            for r in tl.static_range(K):
                tap, met = tap_at(
                    r, s, INNER[b][0], INNER[b][1], INNER[b][2], K
                )
                p_tap = p_taps + tap * channels + channel
                b_tap = tl.load(p_tap, mask=m_channel & met, other=0)
                product += b_tap * sums[r]
            tl.store(p_part + b * channels, product, mask=m_channel)
        b_sum = tl.where(s == 0, b_sum, 0.0)
        tl.store(p_total, b_sum, mask=m_channel)
    else:
        for r in tl.static_range(K):
            p_row = p_part + (r * K + s) * channels
            tl.store(p_row, sums[r], mask=m_channel)
        if SUM:
            tl.store(p_total, b_sum, mask=m_channel & (s == 0))


@jit(do_not_specialize=SIZES)
def _units_kernel(
    p_x,
    p_grads,
    p_taps,
    p_parts,
    channels: tl.constexpr,
    height,
    width,
    images,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """The same by products of matrices; see the module.

    x (B, H, W, C), grads (branches, B, H, W, C), parts (splits, PARTS, SUMS,
    C), of INNER branches (splits, units, SUMS, C); grid (units, blocks of
    channels, splits); UNITS from :func:`_units`.
    """
    unit = tl.program_id(0)
    split = tl.program_id(2)
    branch, size, dilation, tap, first, rows = 0, 0, 0, 0, 0, 0
    columns, start, ones, windows = 0, 0, 0, 0
    for u in tl.static_range(len(UNITS)):
        own = unit == u
        branch = tl.where(own, UNITS[u][0], branch)
        size = tl.where(own, UNITS[u][1], size)
        dilation = tl.where(own, UNITS[u][2], dilation)
        tap = tl.where(own, UNITS[u][3], tap)
        first = tl.where(own, UNITS[u][4], first)
        rows = tl.where(own, UNITS[u][5], rows)
        columns = tl.where(own, UNITS[u][6], columns)
        start = tl.where(own, UNITS[u][7], start)
        ones = tl.where(own, UNITS[u][8], ones)
        windows = tl.where(own, UNITS[u][9], windows)
    lane = unit % PARTS
    shares = PARTS // windows
    o_branch = tl.cast(images, tl.int64) * height * width * channels
    p_grads += branch * o_branch
    reach = size // 2 * dilation
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channel[None, None]
    across = tl.cdiv(width, columns)
    columns = tl.cdiv(width, across)
    down = tl.cdiv(tl.cdiv(height, dilation), T)
    items = images * dilation * down * across
    step = width * channels * dilation
    n = tl.arange(0, WINDOW)
    acc = matrices(ROWS, CHANNELS)
    # Tiles in registers: shared memory could not be read without conflicts.
    for chunk in tl.range(
        split * shares + lane // windows,
        tl.cdiv(items, WINDOW),
        tl.num_programs(2) * shares,
        num_stages=1,
    ):
        item = chunk * WINDOW + tl.arange(0, WINDOW)
        col = (item % across * columns)[:, None] + n[None]
        rest = item // across
        row = rest // dilation % down * T * dilation + rest % dilation
        image = (rest // dilation // down).to(tl.int64)
        o_row = ((image * height + row) * width)[:, None]
        m_item = (item < items)[:, None]
        m_grad = m_item & (n < columns)[None] & (col < width)
        m_grad = m_grad[:, :, None] & (channel < channels)
        p_grad = p_grads + (o_row + col)[:, :, None] * channels + channel
        col += start
        m_x = m_item & (col >= 0) & (col < width) & (ones == 0)
        m_x = m_x[:, :, None] & (channel < channels)
        p_row = p_x + (o_row + col)[:, :, None] * channels + channel
        p_row += first * step - reach * width * channels
        grads = ()
        for t in tl.static_range(T):
            m_row = (row + t * dilation < height)[:, None, None]
            b_grad = tl.load(p_grad + t * step, mask=m_grad & m_row, other=0)
            grads = grads + (b_grad,)
        row += first * dilation - reach
        b_next = _input_row(p_row, row, height, m_x, ones)
        for i in tl.static_range(T + ROWS - 1):
            b_x = tl.permute(by_channel(b_next, CHANNELS, PAIR), 0, 2, 1)
            if i < T + ROWS - 2:  # on its way while the products are made
                b_next = _input_row(
                    p_row + (i + 1) * step,
                    row + (i + 1) * dilation,
                    height,
                    m_x,
                    ones,
                )
            for t in tl.static_range(T):
                if 0 <= i - t and i - t < ROWS:
                    b_grad = by_channel(grads[t], CHANNELS, PAIR)
                    part = dot(b_x, b_grad, acc[i - t])
                    acc = acc[: i - t] + (part,) + acc[i - t + 1 :]
    part = tl.cast(split, tl.int64)
    if len(INNER):
        part = part * tl.num_programs(0) + unit
    else:
        part = part * PARTS + lane
    own = own_channels(tl.program_id(1), CHANNELS, PAIR)[:, None]
    p_part = p_parts + part * SUMS * channels + own
    products = ()  # of all branches, and the sum of the gradient
    for _ in tl.static_range(len(INNER) + 1):
        products = products + (tl.zeros((CHANNELS, WINDOW), tl.float32),)
    for s_0 in range(0, size, WINDOW):
        s = s_0 + tl.arange(0, WINDOW)
        at = (s * dilation - reach - start)[:, None] + n[None]
        inside = (at >= 0) & (at < WINDOW)
        at = tl.broadcast_to(
            tl.where(inside, at, 0)[None], (CHANNELS, WINDOW, WINDOW)
        )
        m_tap = (s < size)[None] & (own < channels)
        for r in tl.static_range(ROWS):
            b_diagonals = tl.where(inside[None], tl.gather(acc[r], at, 1), 0.0)
            b_sum = tl.sum(b_diagonals, 2)
            m_sum = m_tap & (r < rows)
            if len(INNER):
                products = _multiply(
                    products,
                    tl.where(m_sum, b_sum, 0.0),
                    p_taps + own,
                    m_sum,
                    channels,
                    first + r,
                    s[None],
                    ones,
                    INNER,
                    UNITS[0][1],
                )
            else:
                o_tap = (tap + (first + r) * size + s)[None]
                tl.store(p_part + o_tap * channels, b_sum, mask=m_sum)
    if len(INNER):
        for b in tl.static_range(SUMS):
            b_sum = tl.sum(products[b], 1)[:, None]
            tl.store(p_part + b * channels, b_sum, mask=own < channels)


@triton.jit
def _multiply(
    products,
    b_sum,
    p_taps,
    m_sum,
    channels,
    row,
    s,
    ones,
    BRANCHES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Add sums times the taps of branches, or, of ones, themselves."""
    N: tl.constexpr = len(BRANCHES)
    for b in tl.static_range(N):
        tap, met = tap_at(
            row, s, BRANCHES[b][0], BRANCHES[b][1], BRANCHES[b][2], SIZE
        )
        m_tap = m_sum & met & (ones == 0)
        b_tap = tl.load(p_taps + tap * channels, mask=m_tap, other=0)
        product = products[b] + b_tap.to(tl.float32) * b_sum
        products = products[:b] + (product,) + products[b + 1 :]
    return products[:N] + (products[N] + tl.where(ones == 1, b_sum, 0.0),)


@triton.jit
def _input_row(p_row, row, height, m_x, ones):
    """A row of every tile of the input, or ones."""
    m_row = ((row >= 0) & (row < height))[:, None, None]
    other = ones.to(tl.float32).to(p_row.dtype.element_ty)
    return tl.load(p_row, mask=m_x & m_row, other=other)


@triton.jit
def by_channel(b_rows, CHANNELS: tl.constexpr, PAIR: tl.constexpr):
    """Matrices (C, tiles, columns) of rows (tiles, columns, C).

    Channels next to each other belong to one warp, which moves them as one
    word.
    """
    b_rows = tl.reshape(b_rows, (WINDOW, WINDOW, CHANNELS // PAIR, PAIR))
    b_rows = tl.permute(b_rows, 3, 2, 0, 1)
    return tl.reshape(b_rows, (CHANNELS, WINDOW, WINDOW))


@triton.jit
def own_channels(block, CHANNELS: tl.constexpr, PAIR: tl.constexpr):
    """Channels (C, ) of a block in the order that by_channel leaves."""
    order = tl.arange(0, CHANNELS)
    own = order % (CHANNELS // PAIR) * PAIR + order // (CHANNELS // PAIR)
    return block * CHANNELS + own


@triton.jit
def matrices(LENGTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Zeros, a tuple of matrices (C, 16, 16)."""
    rows = ()
    for _ in tl.static_range(LENGTH):
        rows = rows + (tl.zeros((CHANNELS, WINDOW, WINDOW), tl.float32),)
    return rows


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:  # which computes nonsense from products of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc)


@lru_cache
def _units(branches: tuple, narrow: bool, with_sum: bool) -> tuple[tuple, int]:
    """The units of work, in rows of 10 numbers, lane by lane.

    These are the branch, its size, dilation and first tap; the first row of
    the kernel and how many; the columns of a tile at most, and where the
    window of the input begins, from these; whether the input is ones; and the
    number of windows.

    Args:
        branches (tuple): Size, dilation and first tap of each.
        narrow (bool): Whether a window holds all columns of the map.
        with_sum (bool): Whether to add up the first gradient too.

    Returns:
        tuple: The units and the lanes.
    """
    size, _, taps = branches[-1]
    taps += size**2
    windows = [_windows(k // 2 * d, narrow) for k, d, _ in branches]
    lanes = max(count for count, _ in windows)
    most = KNOBS['ROWS']
    units = []
    for b, (size, dilation, tap) in enumerate(branches):
        count, columns = windows[b]
        start = 0 if narrow else -(size // 2) * dilation
        blocks = cdiv(size, most)
        bounds = [size * i // blocks for i in range(blocks + 1)]
        units += [
            (b, size, dilation, tap, first, last - first, columns)
            + (start + lane % count * WINDOW.value, 0, count)
            for first, last in zip(bounds, bounds[1:], strict=False)
            for lane in range(lanes)
        ]
    if with_sum:
        units += [
            (0, 1, 1, taps, 0, 1, WINDOW.value, 0, 1, 1) for _ in range(lanes)
        ]
    return tuple(units), lanes


def _windows(reach: int, narrow: bool) -> tuple[int, int]:
    """Windows of the input that a tile needs, and its columns at most."""
    size = WINDOW.value
    if narrow:
        return 1, size
    counts = [2**i for i in range(12)]
    forms = [(n, min(size, size * n - 2 * reach)) for n in counts]
    return min(
        ((n, columns) for n, columns in forms if columns > 0),
        key=lambda form: form[0] / form[1],
    )


def weight_grads(
    x: Tensor, grads: Tensor, branches: tuple, with_sum: bool = False
) -> Tensor:
    """Parts of the gradients of the taps of all branches.

    Args:
        x (Tensor): (B, C, H, W) in channels_last.
        grads (Tensor): (branches, B, C, H, W), each in channels_last.
        branches (tuple): Size, dilation and first tap of each.
        with_sum (bool): Whether there is a last row, the sum of the first of
            the gradients. Defaults to False.

    Returns:
        Tensor: (parts, all taps, C), float32.
    """
    return _launch(x, grads, branches, with_sum)


def inner_products(
    x: Tensor, grad: Tensor, taps: Tensor, branches: tuple, size: int
) -> Tensor:
    """Parts of the sums of a gradient times what branches made of a map.

    Args:
        x, grad (Tensor): (B, C, H, W) in channels_last.
        taps (Tensor): (all taps, C), in the dtype of x.
        branches (tuple): Size, dilation and first tap of each.
        size (int): Of a kernel that has all taps.

    Returns:
        Tensor: (parts, branches + 1, C), float32; last, those of the gradient.
    """
    return _launch(x, grad[None], ((size, 1, 0),), True, taps, branches)


def _launch(x, grads, branches, with_sum, taps=None, inner=()):
    batch, channels, height, width = x.shape
    sizes = [size for size, *_ in branches]
    sums = len(inner) or branches[-1][2] + sizes[-1] ** 2
    sums += with_sum
    if x.element_size() == 2:
        narrow = width <= WINDOW.value
        units, lanes = _units(branches, narrow, with_sum)
        tiles = batch * cdiv(height, KNOBS['T']) * cdiv(width, WINDOW.value)
        blocks = cdiv(channels, KNOBS['CHANNELS'])
        splits = num_splits(
            cdiv(tiles, WINDOW.value),
            blocks * len(units),
            KNOBS['unit_programs'],
        )
        shares = len(units) if inner else lanes
        parts = x.new_empty(
            splits * shares, sums, channels, dtype=torch.float32
        )
        _units_kernel[len(units), blocks, splits](
            x,
            grads,
            taps,
            parts,
            channels,
            height,
            width,
            batch,
            UNITS=units,
            INNER=inner,
            SUMS=sums,
            PARTS=lanes,
            T=KNOBS['T'],
            ROWS=KNOBS['ROWS'],
            CHANNELS=KNOBS['CHANNELS'],
            PAIR=KNOBS['PAIR'],
            num_warps=KNOBS['WARPS'],
            maxnreg=KNOBS['registers'],
        )
        return parts
    layout = layout_of(x.shape)
    columns = sum(sizes)
    splits = num_splits(
        layout.tiles, layout.blocks * columns, KNOBS['column_programs']
    )
    shares = columns if inner else 1
    parts = x.new_empty(splits * shares, sums, channels)
    _columns_kernel[splits, layout.blocks, columns](
        x,
        grads,
        taps,
        parts,
        *x.shape[1:],
        layout.tiles,
        batch,
        BRANCHES=branches,
        INNER=inner,
        STARTS=tuple(sum(sizes[:b]) for b in range(len(sizes))),
        SUMS=sums,
        SUM=with_sum,
        **layout.constants,
    )
    return parts


def num_splits(items: int, others: int, programs: int) -> int:
    """Number of programs to share some items, beside so many others."""
    return max(1, min(items, cdiv(programs, others)))
