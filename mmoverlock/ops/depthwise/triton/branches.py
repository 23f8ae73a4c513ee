"""A sum of batch-normalized depthwise convolutions, in training mode.

``out = sum over b of norm_b(conv_b(x))``. With y = conv_b(x), mean m,
reciprocal standard deviation r, scale s:

- statistics: one launch, in which every program makes the y of its tiles in
  registers, branch after branch, and only counts them (of 16-bit maps, with
  the others, in banded.py);
- value: one convolution, the kernels ``s r w`` added in the frame of the
  largest one, with the bias ``sum of shift - s r m``;
- backward: with g the gradient of out, the gradient of y is

      dy = s r (g - mean(g) - z mean(g z)),   z = (y - m) r
         = p g - q y - o,   p = s r,   q = s r^2 mean(g z),
                            o = p mean(g) - q m

  ``mean(g z) = r (mean(g y) - m mean(g))`` and ``sum of g y`` is ``w`` times
  the gradient that a plain convolution's weight would have, so one weight
  gradient in the largest frame has all that is needed for p, q and o. Then
  dy of every branch is made from x and g in one pass, and the gradients of
  x and of all weights read those. (Composing ``conv^T conv`` into one kernel
  would be wrong near the border, where y ends, and takes more taps.)

Processes that share statistics (SyncBN) exchange those of all branches once,
and sum(g) and sum(g z) once, before p, q and o.

What is kept for the backward pass is x and the output of the first branch,
whose kernel is the largest. Every step is one launch, five forward and seven
backward; batches are counted and running statistics moved by the way. Sums are
made of partial sums in a fixed order, in double precision in the end, so
results are deterministic.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from ...common import cdiv, contiguous, custom_op
from ...launching import jit
from . import banded
from .common import (
    SIZES,
    Layout,
    autocast,
    convolve,
    load_rows,
    move,
    tile_of,
    zeros,
)
from .conv2d import convolve_maps, weight_grad
from .weight_grads import num_splits, weight_grads

# Programs of kernels that end in sums, where there is enough to do.
KNOBS = dict(statistics=528)
CANDIDATES = dict(statistics=(264, 528, 1056))  # for benchmarks/gpu_tune.py
BLOCK = tl.constexpr(32)  # channels of kernels that finish sums
TAPS = tl.constexpr(16)  # and how many taps these take at a time


@triton.jit
def _channels(channels):
    """A block of channels (BLOCK, ) and which of them there are."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return channel, channel < channels


@jit
def _pack_kernel(weights, batches, p_taps, channels, BRANCHES: tl.constexpr):
    """Taps of all branches, (C, k * k) each, to (all taps, C).

    Adds one to the number of batches, () each, of every branch. Grid (blocks
    of channels, all taps).
    """
    channel, m_channel = _channels(channels)
    tap = tl.program_id(1)
    for b in tl.static_range(len(BRANCHES)):
        count = BRANCHES[b][0] * BRANCHES[b][0]
        own = tap - BRANCHES[b][2]
        if (own >= 0) & (own < count):
            b_tap = tl.load(weights[b] + channel * count + own, mask=m_channel)
            tl.store(
                p_taps + tap * channels + channel,
                b_tap.to(p_taps.dtype.element_ty),
                mask=m_channel,
            )
            if (own == 0) & (tl.program_id(0) == 0):
                tl.store(batches[b], tl.load(batches[b]) + 1)


@jit(do_not_specialize=SIZES)
def _statistics_kernel(
    p_x,
    p_taps,
    p_y,
    p_parts,
    channels,
    height,
    width,
    items,
    BRANCHES: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """Number of values, mean and sum of squared deviations from it.

    Of every channel of every branch; x (B, H, W, C), taps (all taps, C), y
    (B, H, W, C), the output of the first branch, parts (splits, branches * 3,
    C); grid (splits, blocks of channels). Every lane sums differences from the
    first value that it saw.
    """
    split = tl.program_id(0)
    channel = tl.program_id(1) * LANES[1] + tl.arange(0, LANES[1])[None]
    m_channel = channel < channels
    o_part = tl.cast(split, tl.int64) * len(BRANCHES) * 3 * channels
    p_part = p_parts + o_part + channel
    # One branch after the other, so that only one has its sums in registers,
    # and, with nothing hoisted, its offsets.
    for b in tl.static_range(len(BRANCHES)):
        count = tl.zeros(LANES, tl.float32)
        first = tl.zeros(LANES, tl.float32)
        total = tl.zeros(LANES, tl.float32)
        squares = tl.zeros(LANES, tl.float32)
        for item in tl.range(
            split, items, tl.num_programs(0), disable_licm=True
        ):
            row, col, _, o_tile = tile_of(
                item, channels, height, width, T, LANES
            )
            acc = convolve(
                zeros(T, LANES),
                p_x + o_tile,
                p_taps + BRANCHES[b][2] * channels,
                channels,
                height,
                width,
                channel,
                row,
                col,
                BRANCHES[b][0],
                BRANCHES[b][1],
                False,
                T,
            )
            first = tl.where(count == 0, acc[0], first)
            for t in tl.static_range(T):
                ok = (col < width) & (row + t < height)
                difference = tl.where(ok, acc[t] - first, 0.0)
                count += tl.where(ok, 1.0, 0.0)
                total += difference
                squares += difference * difference
                if b == 0:
                    tl.store(
                        p_y + o_tile + t * width * channels,
                        acc[t].to(p_y.dtype.element_ty),
                        mask=m_channel & ok,
                    )
        share = total / tl.maximum(count, 1.0)
        squares -= total * share
        number = tl.sum(count, 0)[None]
        mean = tl.sum(count * (first + share), 0)[None]
        mean /= tl.maximum(number, 1.0)
        deviation = first + share - mean
        squares = tl.sum(squares + count * deviation * deviation, 0)[None]
        tl.store(p_part, number, mask=m_channel)
        tl.store(p_part + channels, mean, mask=m_channel)
        tl.store(p_part + 2 * channels, squares, mask=m_channel)
        p_part += 3 * channels


@jit(do_not_specialize=SIZES)
def _combine_kernel(
    p_parts,
    p_out,
    means,
    variances,
    batches,
    splits,
    channels,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    MOMENTA: tl.constexpr,
):
    """Statistics of the whole from those of parts; moves the running ones.

    parts (splits, N * 3, C), out (N, 3, C) in float64, means and variances (C,
    ) each, batches () each, the number of batches with this one; MOMENTA has
    -1 for a cumulative average, and nothing where nothing is moved; grid
    (blocks of channels, N).
    """
    channel, m_channel = _channels(channels)
    o_branch = tl.program_id(1) * 3 * channels + channel
    count = tl.zeros((SPLITS, BLOCK), tl.float64)
    total = tl.zeros((SPLITS, BLOCK), tl.float64)
    for start in range(0, splits, SPLITS):
        b_count, b_mean, _ = _part(
            p_parts, start, splits, o_branch, channels, m_channel, SPLITS, N
        )
        count += b_count
        total += b_count * b_mean
    count = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros((SPLITS, BLOCK), tl.float64)
    for start in range(0, splits, SPLITS):
        b_count, b_mean, b_squares = _part(
            p_parts, start, splits, o_branch, channels, m_channel, SPLITS, N
        )
        deviation = b_mean - mean[None]
        squares += b_squares + b_count * deviation * deviation
    p_out += o_branch
    tl.store(p_out, count, mask=m_channel)
    tl.store(p_out + channels, mean, mask=m_channel)
    squares = tl.sum(squares, 0)
    tl.store(p_out + 2 * channels, squares, mask=m_channel)
    variance = squares / tl.maximum(count - 1, 1)
    for b in tl.static_range(len(MOMENTA)):
        if tl.program_id(1) == b:
            momentum = tl.full((), MOMENTA[b], tl.float64)
            if MOMENTA[b] < 0:
                momentum = 1 / tl.load(batches[b]).to(tl.float64)
            move(means[b] + channel, mean, momentum, m_channel)
            move(variances[b] + channel, variance, momentum, m_channel)


@triton.jit
def _part(
    p_parts,
    start,
    splits,
    o_branch,
    channels,
    m_channel,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
):
    split = start + tl.arange(0, SPLITS)[:, None]
    m_part = (split < splits) & m_channel[None]
    p_part = p_parts + split.to(tl.int64) * (N * 3 * channels) + o_branch[None]
    count = tl.load(p_part, mask=m_part, other=0).to(tl.float64)
    mean = tl.load(p_part + channels, mask=m_part, other=0).to(tl.float64)
    squares = tl.load(p_part + 2 * channels, mask=m_part, other=0)
    return count, mean, squares.to(tl.float64)


@triton.jit
def _rstd(p_statistics, b: tl.constexpr, channel, channels, m_channel, EPS):
    """Mean and reciprocal standard deviation of branch b."""
    p_branch = p_statistics + 3 * b * channels + channel
    count = tl.load(p_branch, mask=m_channel, other=1)
    mean = tl.load(p_branch + channels, mask=m_channel, other=0)
    squares = tl.load(p_branch + 2 * channels, mask=m_channel, other=0)
    return count, mean, 1 / tl.sqrt(squares / count + EPS)


@jit
def _merge_kernel(
    p_taps,
    scales,
    shifts,
    p_statistics,
    p_merged,
    p_bias,
    channels,
    SIZE: tl.constexpr,
    BRANCHES: tl.constexpr,
    EPS: tl.constexpr,
):
    """One kernel and one bias for all branches.

    taps (all taps, C), scales and shifts (C, ) each, statistics (branches,
    3, C), merged (SIZE * SIZE, C), bias (C, ); grid (blocks of channels,
    SIZE), a program for a row of the merged kernel.
    """
    channel, m_channel = _channels(channels)
    r = tl.program_id(1)
    p_out = p_merged + r * SIZE * channels + channel
    bias = tl.zeros((BLOCK,), tl.float64)
    factors = ()
    for b in tl.static_range(len(BRANCHES)):
        _, mean, rstd = _rstd(
            p_statistics, b, channel, channels, m_channel, EPS[b]
        )
        scale = tl.load(scales[b] + channel, mask=m_channel, other=0)
        shift = tl.load(shifts[b] + channel, mask=m_channel, other=0)
        factor = scale.to(tl.float64) * rstd
        bias += shift.to(tl.float64) - mean * factor
        factors = factors + (factor,)
    if r == 0:
        tl.store(p_bias + channel, bias.to(tl.float32), mask=m_channel)
    for s in range(SIZE):
        acc = tl.zeros((BLOCK,), tl.float64)
        for b in tl.static_range(len(BRANCHES)):
            k = BRANCHES[b][0]
            d = BRANCHES[b][1]
            y = r - (SIZE // 2 - k // 2 * d)
            x = s - (SIZE // 2 - k // 2 * d)
            met = (y >= 0) & (x >= 0) & (y % d == 0) & (x % d == 0)
            met = met & (y <= (k - 1) * d) & (x <= (k - 1) * d)
            tap = BRANCHES[b][2] + y // d * k + x // d
            b_tap = tl.load(
                p_taps + tap * channels + channel,
                mask=m_channel & met,
                other=0,
            )
            acc += b_tap.to(tl.float64) * factors[b]
        b_tap = acc.to(tl.float32).to(p_merged.dtype.element_ty)
        tl.store(p_out + s * channels, b_tap, mask=m_channel)


@jit
def _sums_kernel(
    p_taps,
    p_frame,
    p_statistics,
    scales,
    p_sums,
    p_grads,
    p_factors,
    channels,
    SIZE: tl.constexpr,
    BRANCHES: tl.constexpr,
    EPS: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """``sum(g z)`` of every branch, and ``sum(g)``.

    taps (all taps, C), frame (SIZE * SIZE + 1, C) in float64: the gradient of
    a kernel that holds all others, and sum(g), sums (branches + 1, C); grads
    (2, branches, C), of scales and shifts: the same in their dtype; and, if
    the sums are LOCAL to this process, factors; grid (blocks of channels,
    branches).
    """
    channel, m_channel = _channels(channels)
    p_total = p_frame + SIZE * SIZE * channels + channel
    total = tl.load(p_total, mask=m_channel, other=0)
    for b in tl.static_range(len(BRANCHES)):
        if tl.program_id(1) == b:
            k = BRANCHES[b][0]
            d = BRANCHES[b][1]
            first = SIZE // 2 - k // 2 * d
            products = tl.zeros((TAPS, BLOCK), tl.float64)
            for start in range(0, k * k, TAPS):
                tap = start + tl.arange(0, TAPS)[:, None]
                m_tap = (tap < k * k) & m_channel[None]
                place = (first + tap // k * d) * SIZE + first + tap % k * d
                o_tap = (BRANCHES[b][2] + tap) * channels + channel[None]
                b_tap = tl.load(p_taps + o_tap, mask=m_tap, other=0)
                b_grad = tl.load(
                    p_frame + place * channels + channel[None],
                    mask=m_tap,
                    other=0,
                )
                products += b_tap.to(tl.float64) * b_grad
            product = tl.sum(products, 0)  # sum(g y)
            _, mean, rstd = _rstd(
                p_statistics, b, channel, channels, m_channel, EPS[b]
            )
            product = rstd * (product - mean * total)
            o_row = b * channels + channel
            tl.store(p_sums + o_row, product, mask=m_channel)
            p_out = p_grads + o_row
            b_grad = product.to(p_grads.dtype.element_ty)
            tl.store(p_out, b_grad, mask=m_channel)
            p_out += len(BRANCHES) * channels
            b_grad = total.to(p_grads.dtype.element_ty)
            tl.store(p_out, b_grad, mask=m_channel)
            if LOCAL:
                _store_factors(
                    p_factors,
                    scales[b],
                    p_statistics,
                    product,
                    total,
                    channels,
                    b,
                    len(BRANCHES),
                    EPS[b],
                )
    if tl.program_id(1) == 0:
        p_last = p_sums + len(BRANCHES) * channels + channel
        tl.store(p_last, total, mask=m_channel)


@triton.jit
def _store_factors(
    p_factors,
    p_scale,
    p_statistics,
    product,
    total,
    channels,
    b: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
):
    """p, q and o of branch b, from its sum(g z) and sum(g)."""
    channel, m_channel = _channels(channels)
    count, mean, rstd = _rstd(
        p_statistics, b, channel, channels, m_channel, EPS
    )
    b_scale = tl.load(p_scale + channel, mask=m_channel, other=0)
    p = b_scale.to(tl.float64) * rstd
    q = p * rstd * product / count
    o = p * total / count - q * mean
    p_out = p_factors + b * channels + channel
    step = N * channels
    tl.store(p_out, p.to(tl.float32), mask=m_channel)
    tl.store(p_out + step, q.to(tl.float32), mask=m_channel)
    tl.store(p_out + 2 * step, o.to(tl.float32), mask=m_channel)


@jit
def _factors_kernel(
    scales,
    p_statistics,
    p_sums,
    p_factors,
    channels,
    N: tl.constexpr,
    EPS: tl.constexpr,
):
    """Factors p, q and o, (3, branches, C), from sums over all processes.

    Grid (blocks of channels, branches).
    """
    channel, m_channel = _channels(channels)
    p_last = p_sums + N * channels + channel
    total = tl.load(p_last, mask=m_channel, other=0)
    for b in tl.static_range(N):
        if tl.program_id(1) == b:
            p_sum = p_sums + b * channels + channel
            product = tl.load(p_sum, mask=m_channel, other=0)
            _store_factors(
                p_factors,
                scales[b],
                p_statistics,
                product,
                total,
                channels,
                b,
                N,
                EPS[b],
            )


@jit(do_not_specialize=SIZES)
def _branch_grads_kernel(
    p_x,
    p_y,
    p_grad,
    p_taps,
    p_factors,
    p_out,
    channels,
    height,
    width,
    BRANCHES: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """``p g - q y - o`` for every branch.

    x, y (of the first branch) and grad (B, H, W, C), taps (all taps, C),
    factors (3, branches, C), out (branches, B, H, W, C); grid (tiles, blocks
    of channels).
    """
    row, col, channel, o_tile = tile_of(
        tl.program_id(0), channels, height, width, T, LANES
    )
    m_channel = channel < channels
    m_out = m_channel & (col < width)
    blocks = tl.cdiv(width, LANES[0]) * tl.cdiv(height, T)
    images = tl.num_programs(0) // blocks
    o_branch = images.to(tl.int64) * height * width * channels
    step = width * channels
    b_grad = load_rows(p_grad + o_tile, row, step, height, m_out, T)
    p_out += o_tile
    for b in tl.static_range(len(BRANCHES)):
        if b == 0:
            acc = load_rows(p_y + o_tile, row, step, height, m_out, T)
        else:
            acc = convolve(
                zeros(T, LANES),
                p_x + o_tile,
                p_taps + BRANCHES[b][2] * channels,
                channels,
                height,
                width,
                channel,
                row,
                col,
                BRANCHES[b][0],
                BRANCHES[b][1],
                False,
                T,
            )
        p_factor = p_factors + b * channels + channel
        factor_step = len(BRANCHES) * channels
        p = tl.load(p_factor, mask=m_channel, other=0)
        q = tl.load(p_factor + factor_step, mask=m_channel, other=0)
        o = tl.load(p_factor + 2 * factor_step, mask=m_channel, other=0)
        for t in tl.static_range(T):
            b_out = (p * b_grad[t] - q * acc[t] - o).to(p_out.dtype.element_ty)
            tl.store(p_out + t * step, b_out, mask=m_out & (row + t < height))
        p_out += o_branch


@jit(do_not_specialize=SIZES)
def _unpack_kernel(
    p_parts,
    grads,
    splits,
    channels,
    BRANCHES: tl.constexpr,
    ALL_TAPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Gradients of the weights, (C, k * k) each, from parts.

    parts (splits, ALL_TAPS, C); grid (blocks of channels, ALL_TAPS).
    """
    channel, m_channel = _channels(channels)
    tap = tl.program_id(1)
    acc = tl.zeros((SPLITS, BLOCK), tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        o_part = (split.to(tl.int64) * ALL_TAPS + tap) * channels + channel[
            None
        ]
        b_part = tl.load(
            p_parts + o_part, mask=(split < splits) & m_channel[None], other=0
        )
        acc += b_part.to(tl.float64)
    b_grad = tl.sum(acc, 0)
    for b in tl.static_range(len(BRANCHES)):
        count = BRANCHES[b][0] * BRANCHES[b][0]
        own = tap - BRANCHES[b][2]
        if (own >= 0) & (own < count):
            tl.store(
                grads[b] + channel * count + own,
                b_grad.to(grads[b].dtype.element_ty),
                mask=m_channel,
            )


class _Plan:
    """What the kernels know when they are compiled, of branches."""

    def __init__(self, sizes: tuple[int, ...], dilations: tuple[int, ...]):
        firsts = [sum(k**2 for k in sizes[:b]) for b in range(len(sizes))]
        self.branches = tuple(zip(sizes, dilations, firsts, strict=True))
        self.taps = sum(k**2 for k in sizes)
        self.size = max((k - 1) * d + 1 for k, d, _ in self.branches)


@lru_cache
def _plan(sizes: tuple, dilations: tuple) -> _Plan:
    """The plan of branches; its ``size`` is that of a kernel for all."""
    return _Plan(sizes, dilations)


def _blocks(channels: int) -> int:
    return cdiv(channels, BLOCK.value)


class _Running(NamedTuple):
    """What batch norms keep; a list of each, a value for every branch."""

    means: list[Tensor]
    variances: list[Tensor]
    batches: list[Tensor]
    momenta: list[float]  # -1 for a cumulative average


def _measure(x, weights, dilations, running, group=None):
    """Measure the branches, and move what batch norms keep.

    Returns:
        tuple[Tensor]: Counts, means and sums of squared deviations from them,
        over all processes of a group, (branches, 3, C) in float64; the packed
        taps; the output of the first branch.
    """
    plan = _plan(tuple(w.shape[-1] for w in weights), tuple(dilations))
    channels, n = x.shape[1], len(weights)
    taps = x.new_empty(plan.taps, channels)
    first = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _pack_kernel[_blocks(channels), plan.taps](
            tuple(weights),
            tuple(running.batches),
            taps,
            channels,
            BRANCHES=plan.branches,
        )
        parts = _statistics(x, taps, first, plan.branches)
        if group is not None:
            local = _combine(parts)
            parts = local.new_empty(
                distributed.get_world_size(group), 3 * n, channels
            )
            distributed.all_gather([*parts], local.flatten(0, 1), group)
        statistics = _combine(parts, running)
    return statistics, taps, first


def _statistics(x, taps, first, branches):
    """Parts of the statistics; writes the output of the first branch.

    Returns:
        Tensor: (parts, branches * 3, C), float32.
    """
    if x.element_size() == 2 and x.numel():
        return banded.statistics(x, taps, first, branches)
    layout = Layout.of(x.shape, max(size for size, *_ in branches))
    tiles, blocks = layout.grid(x.shape)
    splits = num_splits(tiles, blocks, KNOBS['statistics'])
    shape = splits, 3 * len(branches), x.shape[1]
    parts = x.new_empty(shape, dtype=torch.float32)
    _statistics_kernel[splits, blocks](
        x,
        taps,
        first,
        parts,
        *x.shape[1:],
        tiles,
        BRANCHES=branches,
        T=layout.rows,
        LANES=layout.lanes,
    )
    return parts


def _combine(parts, running=None):
    """Statistics of the whole from those of parts (parts, branches * 3, C)."""
    splits, rows, channels = parts.shape
    out = parts.new_empty(rows // 3, 3, channels, dtype=torch.float64)
    *lists, momenta = (None, None, None, ())
    if running is not None:
        *lists, momenta = map(tuple, running)
    _combine_kernel[_blocks(channels), len(out)](
        parts,
        out,
        *lists,
        splits,
        channels,
        SPLITS=16,
        N=len(out),
        MOMENTA=momenta,
    )
    return out


def _forward(x, weights, scales, shifts, dilations, eps, statistics, taps):
    """The sum, of the merged kernel."""
    plan = _plan(tuple(w.shape[-1] for w in weights), tuple(dilations))
    channels = x.shape[1]
    merged = taps.new_empty(plan.size**2, channels)
    bias = taps.new_empty(channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _merge_kernel[_blocks(channels), plan.size](
            taps,
            tuple(scales),
            tuple(shifts),
            statistics,
            merged,
            bias,
            channels,
            SIZE=plan.size,
            BRANCHES=plan.branches,
            EPS=tuple(eps),
        )
        return convolve_maps(x[None], merged, ((plan.size, 1, 0),), bias)


def _backward(
    grad,
    x,
    first,
    taps,
    statistics,
    weights,
    scales,
    dilations,
    eps,
    group=None,
    other=None,
):
    """Gradients of x, of scales and shifts (2, branches, C), and of weights.

    Another gradient of x is added to that, if there is one.

    Those of scales and shifts are this process's share, as in
    torch.nn.SyncBatchNorm.
    """
    sizes = tuple(weight.shape[-1] for weight in weights)
    plan = _plan(sizes, tuple(dilations))
    branches, channels = plan.branches, x.shape[1]
    layout = Layout.of(x.shape, max(sizes))
    tiles, blocks = layout.grid(x.shape)
    with torch.cuda.device_of(x):
        frame = weight_grad(x, grad, plan.size, 1)
        sums = frame.new_empty(len(branches) + 1, channels)
        norm_grads = scales[0].new_empty(2, len(branches), channels)
        factors = frame.new_empty(
            3, len(branches), channels, dtype=torch.float32
        )
        _sums_kernel[_blocks(channels), len(branches)](
            taps,
            frame,
            statistics,
            tuple(scales),
            sums,
            norm_grads,
            factors,
            channels,
            SIZE=plan.size,
            BRANCHES=branches,
            EPS=tuple(eps),
            LOCAL=group is None,
        )
        if group is not None:
            distributed.all_reduce(sums, group=group)
            _factors_kernel[_blocks(channels), len(branches)](
                tuple(scales),
                statistics,
                sums,
                factors,
                channels,
                N=len(branches),
                EPS=tuple(eps),
            )
        # (branches, B, C, H, W), maps in channels_last
        grad_ys = x.new_empty(
            len(branches), len(x), *x.shape[2:], channels
        ).permute(0, 1, 4, 2, 3)
        operands = x, first, grad, taps, factors, grad_ys
        if x.numel() and x.element_size() == 2:
            banded.branch_grads(*operands, branches)
        elif x.numel():
            _branch_grads_kernel[tiles, blocks](
                *operands,
                *x.shape[1:],
                BRANCHES=branches,
                T=layout.rows,
                LANES=layout.lanes,
            )
        grad_x = convolve_maps(grad_ys, taps, branches, flip=True, other=other)
        parts = weight_grads(x, grad_ys, branches)
        grads = [torch.empty_like(weight) for weight in weights]
        _unpack_kernel[_blocks(channels), plan.taps](
            parts,
            tuple(grads),
            len(parts),
            channels,
            BRANCHES=branches,
            ALL_TAPS=plan.taps,
            SPLITS=8,
        )
    return grad_x, norm_grads, grads


@custom_op(
    'mmoverlock::measure_branches',
    mutates_args=('means', 'variances', 'batches'),
)
def _measure_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    batches: Sequence[Tensor],
    momenta: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    running = _Running(means, variances, batches, momenta)
    return _measure(x, weights, dilations, running)


@_measure_branches.register_fake
def _(x, weights, dilations, means, variances, batches, momenta):
    channels = x.shape[1]
    taps = sum(weight.shape[-1] ** 2 for weight in weights)
    return (
        x.new_empty(len(weights), 3, channels, dtype=torch.float64),
        x.new_empty(taps, channels),
        torch.empty_like(x),
    )


@custom_op('mmoverlock::sum_of_branches')
def _sum_of_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    eps: Sequence[float],
    statistics: Tensor,
    taps: Tensor,
    first: Tensor,
) -> Tensor:
    return _forward(
        x, weights, scales, shifts, dilations, eps, statistics, taps
    )


@_sum_of_branches.register_fake
def _(x, *args):
    return torch.empty_like(x)


@custom_op('mmoverlock::sum_of_branches_backward', differentiable=False)
def _sum_of_branches_grads(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    taps: Tensor,
    statistics: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    dilations: Sequence[int],
    eps: Sequence[float],
) -> list[Tensor]:
    grad_x, norm_grads, grads = _backward(
        grad, x, first, taps, statistics, weights, scales, dilations, eps
    )
    return [grad_x, norm_grads, *grads]


@_sum_of_branches_grads.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    taps: Tensor,
    statistics: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    dilations: Sequence[int],
    eps: Sequence[float],
) -> list[Tensor]:
    norm_grads = scales[0].new_empty(2, len(scales), x.shape[1])
    return [
        torch.empty_like(grad),
        norm_grads,
        *map(torch.empty_like, weights),
    ]


def _setup(ctx, inputs, output):
    x, weights, scales, _, ctx.dilations, ctx.eps, statistics, *maps = inputs
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *reversed(maps), statistics, *weights, *scales)


def _saved(ctx: Any, grad: Tensor) -> tuple:
    x, first, taps, statistics, *parameters = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    n = ctx.count
    parameters = parameters[:n], parameters[n:]
    operands = grad, x, first, taps, statistics
    return *operands, *parameters, ctx.dilations, ctx.eps


def _differentiate(ctx, grad):
    if grad is None:
        return (None,) * 9
    grad_x, norm_grads, *grads = _sum_of_branches_grads(*_saved(ctx, grad))
    scales, shifts = norm_grads
    return grad_x, grads, [*scales], [*shifts], *(None,) * 5


_sum_of_branches.register_autograd(_differentiate, setup_context=_setup)


class _SynchronizedSum(torch.autograd.Function):
    """The same over the processes of a group, with one exchange each way."""

    @staticmethod
    def forward(
        ctx, x, dilations, eps, group, measured, *parameters
    ) -> Tensor:
        n = len(dilations)
        parameters = [parameters[i * n : (i + 1) * n] for i in range(3)]
        operands = x, *parameters, dilations, eps, *measured
        out = _forward(*operands[:-1])
        _setup(ctx, operands, out)
        ctx.group = group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad) -> tuple[Tensor | None, ...]:
        grad_x, norm_grads, grads = _backward(*_saved(ctx, grad), ctx.group)
        return grad_x, *(None,) * 4, *grads, *norm_grads.flatten(0, 1)


@torch.compiler.disable  # an exchange in the middle of a graph breaks it
def _synchronized_sum(x, norms, dilations, eps, running, group):
    with torch.no_grad():
        measured = _measure(x, norms[0], dilations, running, group)
    parameters = sum(norms, [])
    return _SynchronizedSum.apply(
        x, dilations, eps, group, measured, *parameters
    )


def sum_of_branches(
    x: Tensor,
    branches: Sequence,
    group: 'distributed.ProcessGroup | None' = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.sum_of_branches`."""
    x = autocast(x)
    fields = [list(field) for field in zip(*branches, strict=True)]
    norms, kept, (dilations, momenta, eps) = (
        [contiguous(*field) for field in fields[:3]],
        fields[3:6],
        fields[6:],
    )
    momenta = [-1.0 if momentum is None else momentum for momentum in momenta]
    if group is not None:
        running = _Running(*kept, momenta)
        return _synchronized_sum(x, norms, dilations, eps, running, group)
    with torch.no_grad():
        measured = _measure_branches(x, norms[0], dilations, *kept, momenta)
    return _sum_of_branches(x, *norms, dilations, eps, *measured)
