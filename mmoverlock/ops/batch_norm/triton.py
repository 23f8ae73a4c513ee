"""Statistics of maps in channels_last, and batch norms that they make.

A channel's statistics are its number of values, their mean and the sum of
squared deviations from it. Those of parts are combined in double precision and
a fixed order: first over a process's map, then over processes (SyncBN), which
exchange once each way.

With N values a channel in all processes, n = (x - mean) r, r = 1 / sqrt(var +
eps), y = a n + b, and d the gradient of y::

    grad of x = a r (d - mean(d) - n mean(d n))

The gradients of a and b, sum(d n) and sum(d), are a process's share, as in
torch.nn.SyncBatchNorm.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from .. import partial_sums, tape, tiles
from ..backends import takes_triton
from ..common import (
    cdiv,
    channels_last,
    contiguous,
    once_differentiable,
    saved_tensors,
)
from ..launching import jit
from . import Norm

SIZES = ('positions', 'parts', 'step', 'splits', 'count')
KNOBS = dict(PARTS=64, BLOCK=16)  # a tile of statistics of parts
FACTS = tl.constexpr(5)  # scale, shift, mean, r, number of values


@triton.jit
def store_statistics(p_out, count, mean, squares, channels, m_channel):
    """Rows of number, mean and sum of squared deviations, by channel."""
    tl.store(p_out, tl.zeros_like(mean) + count, mask=m_channel)
    tl.store(p_out + channels, mean, mask=m_channel)
    tl.store(p_out + 2 * channels, squares, mask=m_channel)


@triton.jit
def move(p_running, b_new, momentum, m_channel):
    """Move running statistics toward those of a batch, float64."""
    b_old = tl.load(p_running, mask=m_channel, other=0)
    b_moved = b_old.to(tl.float64)
    b_moved += momentum * (b_new - b_moved)
    tl.store(p_running, b_moved.to(b_old.dtype), mask=m_channel)


@triton.jit
def combine(
    p_parts,
    n,
    parts,
    step,
    o_channel,
    m_channel,
    channels,
    PARTS: tl.constexpr,
):
    """Count (), mean and sum of squared deviations of map n, in float64.

    parts (parts, N * 3, C), ``step`` apart. Deviations are from the mean of
    the first part, then moved.
    """
    p_parts += n * 3 * channels
    p_mean = p_parts + channels + o_channel
    origin = tl.load(p_mean, mask=m_channel, other=0).to(tl.float64)
    count = tl.zeros((PARTS, 1), tl.float64)
    total = tl.zeros((PARTS, o_channel.shape[0]), tl.float64)
    squares = tl.zeros((PARTS, o_channel.shape[0]), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        m_part = (part < parts) & m_channel[None]
        o_part = part.to(tl.int64) * step
        b_count = tl.load(p_parts + o_part, mask=part < parts, other=0)
        p_part = p_mean[None] + o_part
        b_mean = tl.load(p_part, mask=m_part, other=0)
        b_squares = tl.load(p_part + channels, mask=m_part, other=0)
        b_count = b_count.to(tl.float64)
        deviation = b_mean.to(tl.float64) - origin[None]
        count += b_count
        total += b_count * deviation
        squares += b_squares.to(tl.float64) + b_count * deviation * deviation
    count = tl.sum(count)
    total = tl.sum(total, 0)
    shift = total / tl.maximum(count, 1.0)
    return count, origin + shift, tl.sum(squares, 0) - total * shift


@jit(do_not_specialize=SIZES)
def _combine_kernel(
    p_parts,
    p_out,
    parts,
    channels,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of a process from those of parts.

    parts (parts, N * 3, C), out (N * 3, C) in float64; grid (blocks of C, N).
    """
    o_channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    n = tl.program_id(1)
    step = tl.num_programs(1) * 3 * channels
    count, mean, squares = combine(
        p_parts, n, parts, step, o_channel, m_channel, channels, PARTS
    )
    p_out += n * 3 * channels + o_channel
    store_statistics(p_out, count, mean, squares, channels, m_channel)


@triton.jit
def load_norm(p_norms, n: tl.constexpr, o_channel, m_channel, channels):
    """Scale, shift, mean and r of norm n; norms (N, 5, C)."""
    p_norm = p_norms + n * FACTS * channels + o_channel
    b_scale = tl.load(p_norm, mask=m_channel, other=0)
    b_shift = tl.load(p_norm + channels, mask=m_channel, other=0)
    b_mean = tl.load(p_norm + 2 * channels, mask=m_channel, other=0)
    b_rstd = tl.load(p_norm + 3 * channels, mask=m_channel, other=0)
    return b_scale, b_shift, b_mean, b_rstd


@triton.jit
def load_normal(
    p_x, o_x, m_x, p_norms, n: tl.constexpr, o_channel, m_channel, channels
):
    """A map normalized by norm n, and then scaled and shifted."""
    b_scale, b_shift, b_mean, b_rstd = load_norm(
        p_norms, n, o_channel, m_channel, channels
    )
    b_x = (tiles.load(p_x, o_x, m_x) - b_mean[None]) * b_rstd[None]
    return b_x, tl.fma(b_x, b_scale[None], b_shift[None])


@triton.jit
def store_norm_grad(
    p_grad,
    d,
    b_n,
    o_x,
    m_x,
    p_norms,
    p_sums,
    n: tl.constexpr,
    o_channel,
    m_channel,
    channels,
):
    """Gradient of the map of norm n from those, d, of the norm's result.

    sums (2 N, C), of all processes: of d n and d for each norm.
    """
    b_scale, _, _, b_rstd = load_norm(
        p_norms, n, o_channel, m_channel, channels
    )
    p_count = p_norms + (n * FACTS + 4) * channels + o_channel
    values = tl.load(p_count, mask=m_channel, other=1)
    p_sum = p_sums + 2 * n * channels
    b_product = tiles.load(p_sum, o_channel, m_channel) / values
    b_sum = tiles.load(p_sum + channels, o_channel, m_channel) / values
    d = d - tl.fma(b_n, b_product[None], b_sum[None])
    tiles.store(p_grad, o_x, d * (b_scale * b_rstd)[None], m_x)


@jit(do_not_specialize=SIZES)
def _statistics_kernel(
    maps,
    p_parts,
    positions,
    splits,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of parts of N maps.

    Maps (B, P, C), parts (B splits, N * 3, C); grid (B splits blocks of C, N).
    Differences from the first value are summed.
    """
    part, o_channel, m_channel, o_first, rows = tiles.part_of(
        positions, splits, channels, BLOCK
    )
    o_part = part * len(maps) + tl.program_id(1)
    p_part = p_parts + o_part * 3 * channels + o_channel
    for n in tl.static_range(len(maps)):
        if tl.program_id(1) == n:
            p_x = maps[n] + o_first
            b_first = tiles.load(p_x, o_channel, m_channel)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            squares = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, rows, ROWS):
                row = start + tl.arange(0, ROWS)[:, None]
                m_x = (row < rows) & m_channel[None]
                b_x = tiles.load(p_x, row * channels + o_channel[None], m_x)
                b_x = tl.where(m_x, b_x - b_first[None], 0.0)
                total += b_x
                squares = tl.fma(b_x, b_x, squares)
            b_sum = tl.sum(total, 0)
            shift = b_sum / rows
            b_squares = tl.sum(squares, 0) - b_sum * shift
            store_statistics(
                p_part, rows, b_first + shift, b_squares, channels, m_channel
            )


@jit(do_not_specialize=SIZES)
def _norms_kernel(
    p_parts,
    scales,
    shifts,
    means,
    variances,
    batches,
    p_norms,
    parts,
    step,
    channels,
    MOMENTA: tl.constexpr,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norms from statistics of parts; moves the running ones.

    parts (parts, N * 3, C), ``step`` apart, of a map or of processes; scales,
    shifts, means and variances (C, ) each, batches () each, norms (N, 5, C):
    scale, shift, mean, r, number of values; grid (blocks of C, N).
    """
    o_channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_channel = o_channel < channels
    count, mean, squares = combine(
        p_parts,
        tl.program_id(1),
        parts,
        step,
        o_channel,
        m_channel,
        channels,
        PARTS,
    )
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for n in tl.static_range(len(batches)):
            tl.store(batches[n], tl.load(batches[n]) + 1)
    p_norm = p_norms + tl.program_id(1) * FACTS * channels + o_channel
    tl.store(p_norm + 2 * channels, mean.to(tl.float32), mask=m_channel)
    for n in tl.static_range(len(MOMENTA)):
        if tl.program_id(1) == n:
            rstd = 1 / tl.sqrt(squares / count + EPS[n])
            b_scale = tiles.load(scales[n], o_channel, m_channel)
            b_shift = tiles.load(shifts[n], o_channel, m_channel)
            tl.store(p_norm, b_scale, mask=m_channel)
            tl.store(p_norm + channels, b_shift, mask=m_channel)
            p_rstd = p_norm + 3 * channels
            tl.store(p_rstd, rstd.to(tl.float32), mask=m_channel)
            b_count = tl.zeros_like(b_scale) + count.to(tl.float32)
            tl.store(p_rstd + channels, b_count, mask=m_channel)
            move(means[n] + o_channel, mean, MOMENTA[n], m_channel)
            variance = squares / tl.maximum(count - 1, 1.0)
            p_variance = variances[n] + o_channel
            move(p_variance, variance, MOMENTA[n], m_channel)


@jit(do_not_specialize=SIZES)
def _normalize_kernel(
    p_x,
    p_norms,
    p_out,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize maps (B, P, C) by norms (1, 5, C).

    Grid (B count blocks of C, ).
    """
    _, o_channel, m_channel, o_x, m_x = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    _, b_x = load_normal(
        p_x, o_x, m_x, p_norms, 0, o_channel, m_channel, channels
    )
    tiles.store(p_out, o_x, b_x, m_x)


@jit(do_not_specialize=SIZES)
def _products_kernel(
    p_grad,
    p_x,
    p_norms,
    p_parts,
    positions,
    splits,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parts of sums of d n and d.

    Maps (B, P, C), norms (1, 5, C), parts (B splits, 2, C); grid as in
    :func:`_statistics_kernel`.
    """
    part, o_channel, m_channel, o_first, rows = tiles.part_of(
        positions, splits, channels, BLOCK
    )
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        m_x = (row < rows) & m_channel[None]
        o_x = o_first + row * channels + o_channel[None]
        b_n, _ = load_normal(
            p_x, o_x, m_x, p_norms, 0, o_channel, m_channel, channels
        )
        d = tiles.load(p_grad, o_x, m_x)
        products = tl.fma(d, b_n, products)
        total += d
    p_part = p_parts + part * 2 * channels + o_channel
    tl.store(p_part, tl.sum(products, 0), mask=m_channel)
    tl.store(p_part + channels, tl.sum(total, 0), mask=m_channel)


@jit(do_not_specialize=SIZES)
def _grad_kernel(
    p_grad,
    p_x,
    p_norms,
    p_sums,
    p_grad_x,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a map (B, P, C) from that of its norm (1, 5, C).

    sums (2, C), of all processes; grid as in :func:`_normalize_kernel`.
    """
    _, o_channel, m_channel, o_x, m_x = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    b_n, _ = load_normal(
        p_x, o_x, m_x, p_norms, 0, o_channel, m_channel, channels
    )
    d = tiles.load(p_grad, o_x, m_x)
    store_norm_grad(
        p_grad_x,
        d,
        b_n,
        o_x,
        m_x,
        p_norms,
        p_sums,
        0,
        o_channel,
        m_channel,
        channels,
    )


def split(x: Tensor) -> tuple[int, int, dict]:
    """Cut images into parts, none of them empty, for a launch.

    Returns:
        tuple[int, int, dict]: Parts of an image; programs; settings of the
        kernel.
    """
    batch, channels, height, width = x.shape
    positions = height * width
    rows, block = tiles.form(channels)
    blocks = cdiv(channels, block)
    slots = partial_sums.programs(x.device, tiles.KNOBS['resident'])
    # Not min, which would make a graph for every size of a map.
    splits = torch.sym_min(cdiv(positions, rows), cdiv(slots, batch * blocks))
    splits = cdiv(positions, cdiv(positions, splits))
    settings = dict(ROWS=rows, BLOCK=block, num_warps=tiles.KNOBS['warps'])
    return splits, batch * splits * blocks, settings


def measure(
    maps: Sequence[Tensor],
    norms: Sequence[Norm],
    group: Any = None,
    batches: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Two launches; in a group, three and one exchange.

    Running statistics are moved and batches counted.

    Args:
        maps (Sequence[Tensor]): (B, C, H, W) each, in channels_last, not
            empty.
        norms (Sequence[Norm]): Of the maps.
        group (ProcessGroup, optional): The processes that have statistics in
            common. Defaults to None: this one has its own.
        batches (Sequence[Tensor]): () each, of other norms, to count.

    Returns:
        tuple[Tensor, Tensor]: Statistics of parts of this process's maps, (B
        splits, N * 3, C); facts of the norms, (N, 5, C): scales, shifts,
        means, reciprocal deviations and numbers of values.
    """
    parts = _statistics(maps)
    (whole,) = [parts] if group is None else gather([parts], group)
    return parts, _facts(whole, norms, batches)


def _statistics(maps: Sequence[Tensor]) -> Tensor:
    """Those of parts of maps of one shape, (B splits, N * 3, C)."""
    batch, channels, height, width = maps[0].shape
    positions, n = height * width, len(maps)
    splits, programs, settings = split(maps[0])
    parts = maps[0].new_empty(
        batch * splits, n * 3, channels, dtype=torch.float32
    )
    _statistics_kernel[programs, n](
        tuple(maps),
        parts,
        positions,
        splits,
        channels,
        **settings,
    )
    return parts


def _facts(
    parts: Tensor, norms: Sequence[Norm], batches: Sequence[Tensor] = ()
) -> Tensor:
    """Facts of norms (N, 5, C), whose running statistics are moved."""
    scales, shifts, means, variances, counts, momenta, eps = zip(
        *norms, strict=True
    )
    count, _, channels = parts.shape
    facts = torch.empty(
        len(norms),
        FACTS.value,
        channels,
        dtype=torch.float32,
        device=parts.device,
    )
    _norms_kernel[cdiv(channels, KNOBS['BLOCK']), len(norms)](
        parts,
        scales,
        shifts,
        means,
        variances,
        (*counts, *batches),
        facts,
        count,
        parts.stride(0),
        channels,
        MOMENTA=momenta,
        EPS=eps,
        **KNOBS,
    )
    return facts


def gather(parts: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Statistics of all processes from those of parts, in one exchange.

    Args:
        parts (Sequence[Tensor]): (parts, N * 3, C) each.
        group (ProcessGroup): The processes.

    Returns:
        list[Tensor]: (processes, N * 3, C) each, in double precision, with
        other values between the processes.
    """
    shapes = [each.shape[1:] for each in parts]
    sizes = [shape.numel() for shape in shapes]
    own = parts[0].new_empty(sum(sizes), dtype=torch.float64)
    for each, out in zip(parts, own.split(sizes), strict=True):
        combine_parts(each, out)
    world = distributed.get_world_size(group)
    whole = own.new_empty(world * len(own))
    tape.exchange(_all_gather, whole, own, group)
    whole = whole.unflatten(0, (world, -1))
    return [
        each.unflatten(1, shape)
        for each, shape in zip(whole.split(sizes, 1), shapes, strict=True)
    ]


def combine_parts(parts: Tensor, out: Tensor) -> None:
    """Statistics of a process (N * 3 C), from those of parts."""
    count, rows, channels = parts.shape
    _combine_kernel[cdiv(channels, KNOBS['BLOCK']), rows // 3](
        parts, out, count, channels, **KNOBS
    )


def _all_gather(whole: Tensor, own: Tensor, group: Any) -> None:
    """all_gather_single, which was all_gather_into_tensor."""
    run = getattr(distributed, 'all_gather_single', None)
    (run or distributed.all_gather_into_tensor)(whole, own, group)


def _all_reduce(sums: Tensor, group: Any) -> None:
    distributed.all_reduce(sums, group=group)


def total(sums: Tensor, group: Any = None) -> Tensor:
    """Sums over all processes; those of one process are left as they are."""
    if group is None:
        return sums
    sums = sums.clone()
    tape.exchange(_all_reduce, sums, group)
    return sums


def forward(
    maps: Sequence[Tensor], norms: Sequence[Norm], group: Any = None
) -> list[tuple[Tensor, Tensor]]:
    """Normalize maps: three launches each.

    In a group, four, and one exchange for all maps.

    Args:
        maps (Sequence[Tensor]): (B, C, H, W) each, of any shapes, in
            channels_last, not empty.
        norms, group: As in :func:`measure`.

    Returns:
        list[tuple[Tensor, Tensor]]: Of each, the result and its facts, (1, 5,
        C).
    """
    parts = [_statistics([x]) for x in maps]
    whole = parts if group is None else gather(parts, group)
    results = []
    for x, norm, each in zip(maps, norms, whole, strict=True):
        facts, y = _facts(each, [norm]), torch.empty_like(x)
        tiles.launch(_normalize_kernel, x, x, facts, y)
        results.append((y, facts))
    return results


def sum_products(grad: Tensor, x: Tensor, facts: Tensor) -> Tensor:
    """One launch: sums over parts of images, of d n and d.

    Args:
        grad (Tensor): d, (B, C, H, W), in channels_last as the next.
        x (Tensor): The map.
        facts (Tensor): Of its norm, (1, 5, C).

    Returns:
        Tensor: (B splits, 2, C), in single precision.
    """
    batch, channels, height, width = x.shape
    splits, programs, settings = split(x)
    parts = facts.new_empty(batch * splits, 2, channels)
    _products_kernel[(programs,)](
        grad,
        x,
        facts,
        parts,
        height * width,
        splits,
        channels,
        **settings,
    )
    return parts


def backward(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    facts: Sequence[Tensor],
    group: Any = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two launches a map and one for all; in a group, one exchange.

    Returns:
        list[tuple[Tensor, Tensor, Tensor]]: Of each map, the gradients of
        it, of scale and of shift.
    """
    jobs, sizes = [], [2 * x.shape[1] for x in maps]
    sums = facts[0].new_empty(sum(sizes))
    for grad, x, fact, out in zip(
        grads, maps, facts, sums.split(sizes), strict=True
    ):
        jobs.append((sum_products(grad, x, fact), *out.view(2, -1)))
    partial_sums.add_now(*jobs)
    results = []
    for grad, x, fact, whole, (_, *own) in zip(
        grads, maps, facts, total(sums, group).split(sizes), jobs, strict=True
    ):
        grad_x = torch.empty_like(x)
        tiles.launch(_grad_kernel, x, grad, x, fact, whole, grad_x)
        results.append((grad_x, *own))
    return results


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Norm, group: Any, *affine
    ) -> Tensor:
        ((y, facts),) = forward([x], [norm], group)
        ctx.group = group
        ctx.save_for_backward(x, facts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, facts = saved_tensors(ctx)
        ((grad, *grads),) = backward(
            [channels_last(grad)], [x], [facts], ctx.group
        )
        return grad, None, None, *grads


@torch.compiler.disable  # an exchange in the middle of a graph breaks it
def sync_batch_norm(x: Tensor, norm: Norm, group: Any = None) -> Tensor:
    """See :func:`mmoverlock.ops.batch_norm.sync_batch_norm`."""
    partial_sums.check_device(x)
    takes_triton('triton', x)
    check_map(x)
    norm = Norm(*contiguous(*norm[:2]), *norm[2:])
    return _BatchNorm.apply(channels_last(x), norm, group, *norm[:2])


def check_map(x: Tensor) -> None:
    """Check that there are values to norm.

    Raises:
        ValueError: If the map is empty.
    """
    if not x.numel():
        raise ValueError(
            'batch norms in training mode take no empty map, got one of shape '
            f'{tuple(x.shape)}'
        )
