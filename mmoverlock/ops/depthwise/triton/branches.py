"""A sum of batch-normalized depthwise convolutions, in training mode.

``out = sum over b of norm_b(conv_b(x))``. With y = conv_b(x), mean m,
reciprocal standard deviation r, scale s:

- statistics: one launch, which only counts what branches make, see
  statistics.py (a large kernel of 16-bit maps has a launch of its own);
- value: one convolution, the kernels ``s r w`` added in the frame of the
  largest one, with the bias ``sum of shift - s r m``;
- backward: with g the gradient of out, the gradient of y is

      dy = s r (g - mean(g) - z mean(g z)),   z = (y - m) r
         = p g - q y - o,   p = s r,   q = s r^2 mean(g z),
                            o = p mean(g) - q m

  ``mean(g z) = r (mean(g y) - m mean(g))`` and ``sum of g y`` is ``w`` times
  the gradient that a plain convolution's weight would have, so one weight
  gradient in the largest frame, times the taps of every branch as soon as
  programs have their part of it, gives all that p, q and o need. Then
  dy of every branch is made from x and g in one pass, and the gradients of
  x and of all weights read those. (Composing ``conv^T conv`` into one kernel
  would be wrong near the border, where y ends, and takes more taps.)

Processes that share statistics (SyncBN) exchange those of all branches once,
and sum(g) and sum(g z) once, before p, q and o: a launch more each way.

What is kept for the backward pass is x and the output of the first branch,
whose kernel is the largest. There are four launches forward and six backward,
and for a large kernel one more, forward and, in 16 bits, backward; batches are
counted and running statistics moved by the way. Sums are made of partial sums
in a fixed order, those for norms in double precision in the end, so results
are deterministic.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from ...batch_norm.triton import combine, gather, move, store_statistics
from ...common import (
    cdiv,
    contiguous,
    custom_op,
    next_power_of_2,
    once_differentiable,
    saved_tensors,
)
from ...launching import jit
from ...partial_sums import add
from .branch_grads import branch_grads
from .common import SIZES, autocast, tap_at
from .conv2d import convolve_maps
from .statistics import measure
from .tap_grads import inner_products, tap_grads

KNOBS = dict(copied=2048)  # values that a program rounds
CANDIDATES = dict(copied=(1024, 2048, 4096))  # for benchmarks/gpu_tune.py
BLOCK = tl.constexpr(32)  # channels of kernels that finish sums
FEW = tl.constexpr(8)  # the same where every row of a kernel finishes them


@triton.jit
def _channels(channels, BLOCK: tl.constexpr):
    """A block of channels (BLOCK, ) and which of them there are."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return channel, channel < channels


@jit(do_not_specialize=('total',))
def _pack_kernel(
    weights,
    batches,
    p_taps,
    sources,
    p_copies,
    counts,
    channels,
    total,
    BRANCHES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Taps of all branches, (C, k * k) each, to (all taps, C).

    Adds one to the number of batches, () each, of every branch, if they are
    there. Some more parameters, of ``counts`` values, are copied in the dtype
    of the taps. Grid (blocks of channels, all ``total`` taps and blocks of
    values).
    """
    channel, m_channel = _channels(channels, BLOCK)
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
            if len(batches) > 0:
                if (own == 0) & (tl.program_id(0) == 0):
                    tl.store(batches[b], tl.load(batches[b]) + 1)
    block = (tap - total) * tl.num_programs(0) + tl.program_id(0)
    for i in tl.static_range(len(p_copies)):
        blocks = tl.cdiv(counts[i], VALUES)
        if (block >= 0) & (block < blocks):
            o_value = block * VALUES + tl.arange(0, VALUES)
            m_value = o_value < counts[i]
            b_value = tl.load(sources[i] + o_value, mask=m_value)
            b_value = b_value.to(p_copies[i].dtype.element_ty)
            tl.store(p_copies[i] + o_value, b_value, mask=m_value)
        block -= blocks


@triton.jit
def _rstd(p_statistics, b: tl.constexpr, channel, channels, m_channel, EPS):
    """Mean and reciprocal standard deviation of branch b."""
    p_branch = p_statistics + 3 * b * channels + channel
    count = tl.load(p_branch, mask=m_channel, other=1)
    mean = tl.load(p_branch + channels, mask=m_channel, other=0)
    squares = tl.load(p_branch + 2 * channels, mask=m_channel, other=0)
    return count, mean, 1 / tl.sqrt(squares / count + EPS)


@jit(do_not_specialize=SIZES)
def _merge_kernel(
    p_parts,
    p_taps,
    scales,
    shifts,
    means,
    variances,
    batches,
    p_statistics,
    p_merged,
    p_bias,
    splits,
    channels,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BRANCHES: tl.constexpr,
    EPS: tl.constexpr,
    MOMENTA: tl.constexpr,
):
    """Statistics of all branches, and one kernel and one bias for them.

    Moves the running statistics.

    parts (splits, branches * 3, C), taps (all taps, C), scales, shifts, means
    and variances (C, ) each, batches () each, the number of batches with this
    one, statistics (branches, 3, C) in float64, merged (SIZE * SIZE, C), bias
    (C, ); COLUMNS is SIZE or more; MOMENTA has -1 for a cumulative average;
    grid (blocks of channels, SIZE), a program for a row of the merged kernel.
    Each makes the statistics again, which takes less time than a launch.
    """
    channel, m_channel = _channels(channels, FEW)
    r = tl.program_id(1)
    s = tl.arange(0, COLUMNS)[:, None]
    bias = tl.zeros((FEW,), tl.float64)
    row = tl.zeros((COLUMNS, FEW), tl.float64)
    for b in tl.static_range(len(BRANCHES)):
        count, mean, squares = combine(
            p_parts,
            b,
            splits,
            len(BRANCHES) * 3 * channels,
            channel,
            m_channel,
            channels,
            SPLITS,
        )
        scale = tl.load(scales[b] + channel, mask=m_channel, other=0)
        shift = tl.load(shifts[b] + channel, mask=m_channel, other=0)
        factor = scale.to(tl.float64) * (1 / tl.sqrt(squares / count + EPS[b]))
        bias += shift.to(tl.float64) - mean * factor
        tap, met = tap_at(
            r, s, BRANCHES[b][0], BRANCHES[b][1], BRANCHES[b][2], SIZE
        )
        p_tap = p_taps + tap * channels + channel[None]
        b_tap = tl.load(p_tap, mask=met & m_channel[None], other=0)
        row += b_tap.to(tl.float64) * factor[None]
        if r == 0:
            p_out = p_statistics + b * 3 * channels + channel
            store_statistics(p_out, count, mean, squares, channels, m_channel)
            momentum = tl.full((), MOMENTA[b], tl.float64)
            if MOMENTA[b] < 0:
                momentum = 1 / tl.load(batches[b]).to(tl.float64)
            variance = squares / tl.maximum(count - 1, 1)
            move(means[b] + channel, mean, momentum, m_channel)
            move(variances[b] + channel, variance, momentum, m_channel)
    if r == 0:
        tl.store(p_bias + channel, bias.to(tl.float32), mask=m_channel)
    o_row = (r * SIZE + s) * channels + channel[None]
    b_row = row.to(tl.float32).to(p_merged.dtype.element_ty)
    tl.store(p_merged + o_row, b_row, mask=(s < SIZE) & m_channel[None])


@jit(do_not_specialize=SIZES)
def _sums_kernel(
    p_parts,
    p_statistics,
    scales,
    p_sums,
    p_grads,
    p_factors,
    splits,
    channels,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """``sum(g z)`` of every branch, and ``sum(g)``.

    parts (splits, N + 1, C), of ``sum(g y)`` of every branch and of sum(g),
    sums (N + 1, C) in float64; grads (2, N, C), of scales and shifts: the same
    in their dtype; and, if the sums are LOCAL to this process, factors; grid
    (blocks of channels, N).
    """
    channel, m_channel = _channels(channels, BLOCK)
    p_part = p_parts + channel[None]
    p_own = p_part + tl.program_id(1) * channels
    products = tl.zeros((SPLITS, BLOCK), tl.float64)
    totals = tl.zeros((SPLITS, BLOCK), tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        m_part = (split < splits) & m_channel[None]
        o_part = split.to(tl.int64) * ((N + 1) * channels)
        b_product = tl.load(p_own + o_part, mask=m_part, other=0)
        b_total = tl.load(p_part + N * channels + o_part, mask=m_part, other=0)
        products += b_product.to(tl.float64)
        totals += b_total.to(tl.float64)
    product = tl.sum(products, 0)
    total = tl.sum(totals, 0)
    for b in tl.static_range(N):
        if tl.program_id(1) == b:
            _, mean, rstd = _rstd(
                p_statistics, b, channel, channels, m_channel, EPS[b]
            )
            product = rstd * (product - mean * total)
            o_row = b * channels + channel
            tl.store(p_sums + o_row, product, mask=m_channel)
            p_out = p_grads + o_row
            b_grad = product.to(p_grads.dtype.element_ty)
            tl.store(p_out, b_grad, mask=m_channel)
            p_out += N * channels
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
                    N,
                    EPS[b],
                )
    if tl.program_id(1) == 0:
        p_last = p_sums + N * channels + channel
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
    channel, m_channel = _channels(channels, BLOCK)
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
    channel, m_channel = _channels(channels, BLOCK)
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


class _Plan:
    """Facts of branches that kernels are compiled for."""

    def __init__(self, sizes: tuple[int, ...], dilations: tuple[int, ...]):
        firsts = [sum(k**2 for k in sizes[:b]) for b in range(len(sizes))]
        self.branches = tuple(zip(sizes, dilations, firsts, strict=True))
        self.taps = sum(k**2 for k in sizes)
        self.size = max((k - 1) * d + 1 for k, d, _ in self.branches)


@lru_cache
def _plan(sizes: tuple, dilations: tuple) -> _Plan:
    """The plan of branches; its ``size`` is that of a kernel for all."""
    return _Plan(sizes, dilations)


class _Running(NamedTuple):
    """State of batch norms, a list of each, a value for every branch."""

    means: list[Tensor]
    variances: list[Tensor]
    batches: list[Tensor]
    momenta: list[float]  # -1 for a cumulative average


class Measured(NamedTuple):
    """Results of measuring a map and all its branches."""

    # Counts, means and sums of squared deviations from them, over all
    # processes of a group, (branches, 3, C) in float64
    statistics: Tensor
    taps: Tensor  # (all taps, C), in the dtype of the map
    first: Tensor  # the output of the first branch
    kernel: Tensor  # (size^2, C), of all branches together, and the bias
    bias: Tensor


def _pack(
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    batches: Sequence[Tensor],
    dilations: Sequence[int],
    sources: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
) -> Tensor:
    """Taps (all taps, C) in a dtype; sources are copied, batches counted."""
    plan = _plan(tuple(w.shape[-1] for w in weights), tuple(dilations))
    channels = len(weights[0])
    taps = weights[0].new_empty(plan.taps, channels, dtype=dtype)
    counts = [t.numel() for t in sources]
    width = cdiv(channels, BLOCK.value)
    blocks = sum(cdiv(count, KNOBS['copied']) for count in counts)
    _pack_kernel[width, plan.taps + cdiv(blocks, width)](
        tuple(weights),
        tuple(batches),
        taps,
        tuple(sources),
        tuple(copies),
        tuple(counts),
        channels,
        plan.taps,
        BRANCHES=plan.branches,
        VALUES=KNOBS['copied'],
    )
    return taps


def pack(
    dtype: torch.dtype,
    branches: Sequence,
    others: Sequence[Tensor] = (),
    stacked: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Bring parameters into the form that kernels read, in one launch.

    Batches of the branches' norms are counted.

    Args:
        dtype (torch.dtype): Of the map.
        branches (Sequence[Branch] | Sequence[Tensor]): Contiguous; or weight
            and bias of what they are merged to.
        others (Sequence[Tensor]): Contiguous.
        stacked (Sequence[Tensor]): Contiguous and of one shape.

    Returns:
        tuple[Tensor, list[Tensor]]: Taps for :func:`forward`; the others and,
        in one tensor behind them, those that are stacked. All are in that
        dtype and without gradients.
    """
    with torch.no_grad():
        results, sources, copies = [t.detach() for t in others], [], []
        if any(t.dtype != dtype for t in others):
            sources = results
            copies = [torch.empty_like(t, dtype=dtype) for t in sources]
            results = [*copies]
        if stacked:
            shape = len(stacked), *stacked[0].shape
            results.append(stacked[0].new_empty(shape, dtype=dtype))
            sources = [*sources, *stacked]
            copies += results[-1].unbind()
        if isinstance(branches[0], Tensor):
            weights, batches, dilations = branches[:1], (), (1,)
        else:
            weights, *_, batches, dilations, _, _ = columns(branches)
        taps = _pack(dtype, weights, batches, dilations, sources, copies)
        return taps, results


def _measure(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    eps: Sequence[float],
    running: _Running,
    group: Any = None,
    taps: Tensor | None = None,
) -> Measured:
    """Measure and merge the branches, and move what batch norms keep."""
    if taps is None:
        taps = _pack(x.dtype, weights, running.batches, dilations)
    plan = _plan(tuple(w.shape[-1] for w in weights), tuple(dilations))
    channels, n = x.shape[1], len(weights)
    first = torch.empty_like(x)
    statistics = x.new_empty(n, 3, channels, dtype=torch.float64)
    kernel = x.new_empty(plan.size**2, channels)
    bias = x.new_empty(channels, dtype=torch.float32)
    parts = measure(x, taps, first, plan.branches)
    if group is not None:
        (parts,) = gather([parts], group)
    _merge_kernel[cdiv(channels, FEW.value), plan.size](
        parts,
        taps,
        *map(tuple, (scales, shifts, *running[:3])),
        statistics,
        kernel,
        bias,
        len(parts),
        channels,
        SPLITS=64,
        SIZE=plan.size,
        COLUMNS=next_power_of_2(plan.size),
        BRANCHES=plan.branches,
        EPS=tuple(eps),
        MOMENTA=tuple(running.momenta),
        num_warps=8,
        maxnreg=168,
    )
    return Measured(statistics, taps, first, kernel, bias)


def _forward(x: Tensor, measured: Measured) -> Tensor:
    """The sum, of the merged kernel."""
    size = isqrt(len(measured.kernel))
    return convolve_maps(
        x[None], measured.kernel, ((size, 1, 0),), measured.bias
    )


def _backward(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    taps: Tensor,
    statistics: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    dilations: Sequence[int],
    eps: Sequence[float],
    group: Any = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of x, of scales and shifts (2, branches, C), and of weights.

    Another gradient of x is added to that, if there is one. Those of scales
    and shifts are this process's share, as in torch.nn.SyncBatchNorm.
    """
    sizes = tuple(weight.shape[-1] for weight in weights)
    plan = _plan(sizes, tuple(dilations))
    branches, channels = plan.branches, x.shape[1]
    n = len(branches)
    grid = cdiv(channels, BLOCK.value), n
    sums = statistics.new_empty(n + 1, channels)
    norm_grads = scales[0].new_empty(2, n, channels)
    factors = statistics.new_empty(3, n, channels, dtype=torch.float32)
    parts = inner_products(x, grad, taps, branches, plan.size)
    _sums_kernel[grid](
        parts,
        statistics,
        tuple(scales),
        sums,
        norm_grads,
        factors,
        len(parts),
        channels,
        SPLITS=64,
        N=n,
        EPS=tuple(eps),
        LOCAL=group is None,
    )
    if group is not None:
        distributed.all_reduce(sums, group=group)
        _factors_kernel[grid](
            tuple(scales),
            statistics,
            sums,
            factors,
            channels,
            N=n,
            EPS=tuple(eps),
        )
    # (branches, B, C, H, W), maps in channels_last
    grad_ys = x.new_empty(n, len(x), *x.shape[2:], channels)
    grad_ys = grad_ys.permute(0, 1, 4, 2, 3)
    branch_grads(x, first, grad, taps, factors, grad_ys, branches)
    grad_x = convolve_maps(grad_ys, taps, branches, flip=True, other=other)
    parts = tap_grads(x, grad_ys, branches)
    grads = [torch.empty_like(weight) for weight in weights]
    add((parts, *grads))
    return grad_x, norm_grads, grads


def columns(tuples: Sequence[tuple]) -> list[list]:
    """Lists of the fields of some tuples of one kind."""
    return [list(field) for field in zip(*tuples, strict=True)]


def forward(
    x: Tensor, branches: Sequence, taps: Tensor, group: Any = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The sum, and the tensors that :func:`backward` needs.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        branches (Sequence[Branch]): Contiguous.
        taps (Tensor): What :func:`pack` makes of them.
        group (ProcessGroup, optional): The processes that have statistics in
            common. Defaults to None: this one has its own.
    """
    *norms, means, variances, batches, dilations, momenta, eps = columns(
        branches
    )
    running = _Running(means, variances, batches, momenta)
    measured = _measure(x, *norms, dilations, eps, running, group, taps)
    return _forward(x, measured), measured[:3]


def backward(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    branches: Sequence,
    group: Any = None,
    other: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Gradients of x, added to another one, and of every branch's parameters.

    Those of scales and shifts are this process's share.
    """
    weights, scales, *_, dilations, _, eps = columns(branches)
    statistics, taps, first = kept
    settings = weights, scales, dilations, eps, group, other
    grad, norms, weights = _backward(
        grad, x, first, taps, statistics, *settings
    )
    return grad, [*zip(weights, *norms, strict=True)]


@custom_op(
    'mmoverlock::measure_branches',
    mutates_args=('means', 'variances', 'batches'),
)
def _measure_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    eps: Sequence[float],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    batches: Sequence[Tensor],
    momenta: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    running = _Running(means, variances, batches, momenta)
    return _measure(x, weights, scales, shifts, dilations, eps, running)


@_measure_branches.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(tuple(w.shape[-1] for w in weights), tuple(dilations))
    channels = x.shape[1]
    return (
        x.new_empty(len(weights), 3, channels, dtype=torch.float64),
        x.new_empty(plan.taps, channels),
        torch.empty_like(x),
        x.new_empty(plan.size**2, channels),
        x.new_empty(channels, dtype=torch.float32),
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
    kernel: Tensor,
    bias: Tensor,
) -> Tensor:
    return _forward(x, Measured(statistics, taps, first, kernel, bias))


@_sum_of_branches.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
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


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weights, scales, _, ctx.dilations, ctx.eps, *measured, _, _ = inputs
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *reversed(measured), *weights, *scales)


def _saved(ctx: Any, grad: Tensor) -> tuple:
    x, first, taps, statistics, *parameters = saved_tensors(ctx)
    grad = grad.contiguous(memory_format=torch.channels_last)
    n = ctx.count
    parameters = parameters[:n], parameters[n:]
    operands = grad, x, first, taps, statistics
    return *operands, *parameters, ctx.dilations, ctx.eps


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 11
    grad_x, norm_grads, *grads = _sum_of_branches_grads(*_saved(ctx, grad))
    scales, shifts = norm_grads
    return grad_x, grads, [*scales], [*shifts], *(None,) * 7


_sum_of_branches.register_autograd(_differentiate, setup_context=_setup)


class _SynchronizedSum(torch.autograd.Function):
    """The same over the processes of a group, with one exchange each way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dilations: Sequence[int],
        eps: Sequence[float],
        group: Any,
        measured: Measured,
        *parameters: Tensor,
    ) -> Tensor:
        n = len(dilations)
        parameters = [parameters[i * n : (i + 1) * n] for i in range(3)]
        operands = x, *parameters, dilations, eps, *measured
        out = _forward(x, measured)
        _setup(ctx, operands, out)
        ctx.group = group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, norm_grads, grads = _backward(*_saved(ctx, grad), ctx.group)
        return grad_x, *(None,) * 4, *grads, *norm_grads.flatten(0, 1)


@torch.compiler.disable  # an exchange in the middle of a graph breaks it
def _synchronized_sum(
    x: Tensor,
    norms: list[list[Tensor]],
    dilations: Sequence[int],
    eps: Sequence[float],
    running: _Running,
    group: Any,
) -> Tensor:
    with torch.no_grad():
        measured = _measure(x, *norms, dilations, eps, running, group)
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
    fields = columns(branches)
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
        measured = _measure_branches(x, *norms, dilations, eps, *kept, momenta)
    return _sum_of_branches(x, *norms, dilations, eps, *measured)
