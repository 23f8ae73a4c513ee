"""Large depthwise convolutions and their dilated companions, for GPUs.

**Form.** A multiply-add per tap and value in single precision, on tiles that
live in registers: every thread has a few columns (or channels) of ``T`` rows
of the output and, one column of the kernel at a time, loads the ``T + K - 1``
rows of the input below them once for ``T * K`` multiply-adds. Lanes run along
the channels of maps in channels_last (which layer norms leave behind), else
along columns, so one code reads both layouts in whole sectors.

Why not tensor cores: a kernel row as a banded (Toeplitz) matrix wastes half
of a product or more and needs both operands in another order than the maps
have, by way of shared memory, and for channels_last one product per channel.
On an H100 (67 TFLOP/s of single-precision arithmetic, some 800 TFLOP/s of
bfloat16 products, 3.3 TB/s) 17 x 17 taps take 8.6 ps a value at the
arithmetic rate and 1.2 ps of memory traffic in bfloat16: this form is bound
by arithmetic. Matrix products would lift that bound for half precision, NCHW
above all; single precision, whose products are no faster, gains nothing.

**Companions.** ``out = sum over b of norm_b(conv_b(x))``, in training mode:
with y = conv_b(x), mean m, reciprocal standard deviation r, scale s,

- statistics: one launch, in which every program makes the y of its tiles in
  registers, branch after branch, and only counts them;
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

What is kept for the backward pass is x. For n branches, 1 + 2 maps are read
or written forward and 3n + 7 backward (after the first branch, the statistics
and the last weight gradients, a launch per branch, find x in the cache), where
plain modules move some 8n and 12n and keep n of them.

Sums are made of partial sums in a fixed order, so results are deterministic.
Nothing here was measured on a GPU yet: benchmarks/gpu_depthwise.py would.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from triton import constexpr_function

TILES = (7, 10, 16)  # rows of a tile
SPARSE = tl.constexpr(3)  # dilation that is too large for rows to be shared
# Arguments that come in too many values to compile for kinds of them.
SIZES = ('height', 'width', 'items')
PROGRAMS = 2048  # of kernels that end in sums, where there is enough to do


@triton.jit
def _tile(
    x,
    strides,
    item,
    height,
    width,
    channel,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """First row and columns of a tile, and pointers into its first row."""
    blocks = tl.cdiv(width, LANES[0])
    tiles = tl.cdiv(height, T)
    col = item % blocks * LANES[0] + tl.arange(0, LANES[0])[:, None]
    row = item // blocks % tiles * T
    image = item // blocks // tiles
    return row, col, _at(x, strides, image, channel, row, col)


@triton.jit
def _at(x, strides, image, channel, row, col):
    """Pointers to a row of an image."""
    return (
        x
        + image.to(tl.int64) * strides[0]
        + row.to(tl.int64) * strides[2]
        + channel.to(tl.int64) * strides[1]
        + col.to(tl.int64) * strides[3]
    )


@triton.jit
def _wide(number):
    return tl.full((), 1, tl.int64) * number


@triton.jit
def _zeros(LENGTH: tl.constexpr, LANES: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(LENGTH):
        zeros = zeros + (tl.zeros(LANES, tl.float32),)
    return zeros


@triton.jit
def _convolve(
    acc,
    x,
    weight,
    strides,
    channels,
    height,
    width,
    channel,
    row,
    col,
    BRANCHES: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    """Add the convolution of branch B to a tile, a tuple of T rows.

    ``x`` points to its first row, ``weight`` to the taps of all branches.
    """
    K: tl.constexpr = BRANCHES[B][0]
    D: tl.constexpr = BRANCHES[B][1]
    REACH: tl.constexpr = K // 2 * D
    inside = channel < channels
    weight += BRANCHES[B][2] * channels + channel
    for s in range(K):
        shift = s * D - REACH
        ok = inside & (col + shift >= 0) & (col + shift < width)
        x_col = x + _wide(strides[3]) * shift
        if D < SPARSE:
            acc = _convolve_column(
                acc,
                x_col - _wide(strides[2]) * REACH,
                weight + s * channels,
                strides,
                channels,
                height,
                inside,
                ok,
                row - REACH,
                K,
                D,
                T,
            )
        else:  # hardly a row meets two taps
            for r in range(K):
                first = r * D - REACH
                tap = weight + (r * K + s) * channels
                tap = tl.load(tap, mask=inside, other=0)
                for t in tl.static_range(T):
                    y = row + first + t
                    x_row = x_col + _wide(strides[2]) * (first + t)
                    in_map = ok & (y >= 0) & (y < height)
                    value = tl.load(x_row, mask=in_map, other=0)
                    part = tl.fma(value.to(tl.float32), tap, acc[t])
                    acc = acc[:t] + (part,) + acc[t + 1 :]
    return acc


@triton.jit
def _convolve_column(
    acc,
    x,
    weight,
    strides,
    channels,
    height,
    inside,
    ok,
    row,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """Add what a column of a kernel contributes; ``row`` is the first."""
    taps = ()
    for r in tl.static_range(K):
        tap = weight + r * K * channels
        taps = taps + (tl.load(tap, mask=inside, other=0),)
    for i in tl.static_range(T + (K - 1) * D):
        if _is_read(i, K, D, T):
            in_map = ok & (row + i >= 0) & (row + i < height)
            x_row = x + _wide(strides[2]) * i
            value = tl.load(x_row, mask=in_map, other=0).to(tl.float32)
            for t in tl.static_range(T):
                if _meets(i - t, K, D):
                    part = tl.fma(value, taps[(i - t) // D], acc[t])
                    acc = acc[:t] + (part,) + acc[t + 1 :]
    return acc


@constexpr_function
def _meets(distance, size, dilation):
    """Whether a kernel has a tap so many rows behind its first one."""
    return distance % dilation == 0 and 0 <= distance // dilation < size


@constexpr_function
def _is_read(row, size, dilation, tile):
    return any(_meets(row - t, size, dilation) for t in range(tile))


@triton.jit(do_not_specialize=SIZES)
def _sum_kernel(
    x,
    weight,
    bias,
    out,
    channels,
    height,
    width,
    x_strides,
    out_strides,
    BRANCHES: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum of the convolutions of maps, one for each branch."""
    channel = tl.program_id(1) * LANES[1] + tl.arange(0, LANES[1])[None]
    row, col, x = _tile(
        x, x_strides[1:], tl.program_id(0), height, width, channel, T, LANES
    )
    acc = _zeros(T, LANES)
    for b in tl.static_range(len(BRANCHES)):
        acc = _convolve(
            acc,
            x + _wide(x_strides[0]) * b,
            weight,
            x_strides[1:],
            channels,
            height,
            width,
            channel,
            row,
            col,
            BRANCHES,
            b,
            T,
        )
    inside = (channel < channels) & (col < width)
    added = 0.0
    if bias is not None:
        added = tl.load(bias + channel, mask=channel < channels, other=0)
    row, col, out = _tile(
        out, out_strides, tl.program_id(0), height, width, channel, T, LANES
    )
    for t in tl.static_range(T):
        value = (acc[t] + added).to(out.dtype.element_ty)
        out_row = out + _wide(out_strides[2]) * t
        tl.store(out_row, value, mask=inside & (row + t < height))


@triton.jit(do_not_specialize=SIZES)
def _statistics_kernel(
    x,
    weight,
    out,
    channels,
    height,
    width,
    items,
    x_strides,
    BRANCHES: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """Number of values, mean and sum of squared deviations from it.

    Of every channel of every branch; ``out`` is (splits, branches, 3, C).
    Every lane sums differences from the first value that it saw.
    """
    split = tl.program_id(0)
    channel = tl.program_id(1) * LANES[1] + tl.arange(0, LANES[1])[None]
    inside = channel < channels
    out += _wide(split) * len(BRANCHES) * 3 * channels + channel
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
            row, col, x_row = _tile(
                x, x_strides, item, height, width, channel, T, LANES
            )
            acc = _convolve(
                _zeros(T, LANES),
                x_row,
                weight,
                x_strides,
                channels,
                height,
                width,
                channel,
                row,
                col,
                BRANCHES,
                b,
                T,
            )
            first = tl.where(count == 0, acc[0], first)
            for t in tl.static_range(T):
                ok = (col < width) & (row + t < height)
                difference = tl.where(ok, acc[t] - first, 0.0)
                count += tl.where(ok, 1.0, 0.0)
                total += difference
                squares += difference * difference
        share = total / tl.maximum(count, 1.0)
        squares -= total * share
        number = tl.sum(count, 0)[None]
        mean = tl.sum(count * (first + share), 0)[None]
        mean /= tl.maximum(number, 1.0)
        deviation = first + share - mean
        squares = tl.sum(squares + count * deviation * deviation, 0)[None]
        tl.store(out, number, mask=inside)
        tl.store(out + channels, mean, mask=inside)
        tl.store(out + 2 * channels, squares, mask=inside)
        out += 3 * channels


@triton.jit(do_not_specialize=SIZES)
def _branch_grads_kernel(
    x,
    grad,
    weight,
    factors,
    out,
    channels,
    height,
    width,
    x_strides,
    grad_strides,
    out_strides,
    BRANCHES: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """``p * grad - q * y - o`` for every branch; factors (3, branches, C)."""
    item = tl.program_id(0)
    channel = tl.program_id(1) * LANES[1] + tl.arange(0, LANES[1])[None]
    inside = channel < channels
    row, col, x = _tile(x, x_strides, item, height, width, channel, T, LANES)
    row, col, grad = _tile(
        grad, grad_strides, item, height, width, channel, T, LANES
    )
    row, col, out = _tile(
        out, out_strides[1:], item, height, width, channel, T, LANES
    )
    g = ()
    for t in tl.static_range(T):
        ok = inside & (col < width) & (row + t < height)
        value = tl.load(grad + _wide(grad_strides[2]) * t, mask=ok, other=0)
        g = g + (value.to(tl.float32),)
    for b in tl.static_range(len(BRANCHES)):
        acc = _convolve(
            _zeros(T, LANES),
            x,
            weight,
            x_strides,
            channels,
            height,
            width,
            channel,
            row,
            col,
            BRANCHES,
            b,
            T,
        )
        step = len(BRANCHES) * channels
        factor = factors + channel + b * channels
        p = tl.load(factor, mask=inside, other=0)
        q = tl.load(factor + step, mask=inside, other=0)
        o = tl.load(factor + 2 * step, mask=inside, other=0)
        for t in tl.static_range(T):
            ok = inside & (col < width) & (row + t < height)
            value = (p * g[t] - q * acc[t] - o).to(out.dtype.element_ty)
            out_row = out + _wide(out_strides[0]) * b
            out_row += _wide(out_strides[3]) * t
            tl.store(out_row, value, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _weight_grad_kernel(
    x,
    grad,
    out,
    channels,
    height,
    width,
    items,
    x_strides,
    grad_strides,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums of ``grad[n] * x[n + tap]``; a program for a column of the kernel.

    ``out`` is (splits, K, K, C).
    """
    REACH: tl.constexpr = K // 2 * D
    split = tl.program_id(0)
    channel = tl.program_id(1) * LANES[1] + tl.arange(0, LANES[1])[None]
    s = tl.program_id(2)
    shift = s * D - REACH
    inside = channel < channels
    acc = _zeros(K, LANES)
    for item in range(split, items, tl.num_programs(0)):
        row, col, x_row = _tile(
            x, x_strides, item, height, width, channel, T, LANES
        )
        row, col, grad_row = _tile(
            grad, grad_strides, item, height, width, channel, T, LANES
        )
        x_row += _wide(x_strides[3]) * shift
        x_row -= _wide(x_strides[2]) * REACH
        ok = inside & (col + shift >= 0) & (col + shift < width)
        g = ()
        for t in tl.static_range(T):
            in_map = inside & (col < width) & (row + t < height)
            value = tl.load(
                grad_row + _wide(grad_strides[2]) * t, mask=in_map, other=0
            )
            g = g + (value.to(tl.float32),)
        for i in tl.static_range(T + (K - 1) * D):
            if _is_read(i, K, D, T):
                y = row + i - REACH
                value = tl.load(
                    x_row + _wide(x_strides[2]) * i,
                    mask=ok & (y >= 0) & (y < height),
                    other=0,
                ).to(tl.float32)
                for r in tl.static_range(K):
                    if 0 <= i - r * D and i - r * D < T:
                        part = tl.fma(value, g[i - r * D], acc[r])
                        acc = acc[:r] + (part,) + acc[r + 1 :]
    out += (_wide(split) * K * K + s) * channels + channel
    for r in tl.static_range(K):
        total = tl.sum(acc[r], 0)[None]
        tl.store(out + r * K * channels, total, mask=inside)


class _Layout(NamedTuple):
    """How a map is cut into tiles."""

    rows: int
    lanes: tuple[int, int]  # columns, channels

    @classmethod
    def of(cls, x: Tensor, size: int) -> '_Layout':
        """For a kernel of so many rows."""
        _, channels, height, width = x.shape
        rows = _best(
            TILES, lambda t: _cdiv(height, t) * (t * size + 4 * (t + size))
        )
        if _is_channels_last(x):
            block = _best((32, 16), lambda n: _cdiv(channels, n) * n)
            return cls(rows, (256 // block, block))
        block = _best((32, 16, 8), lambda n: _cdiv(width, n) * n)
        return cls(rows, (block, 128 // block))

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Tiles, and blocks of channels."""
        batch, channels, height, width = x.shape
        columns, block = self.lanes
        tiles = batch * _cdiv(height, self.rows) * _cdiv(width, columns)
        return tiles, _cdiv(channels, block)


def _cdiv(number, divisor):
    return -(-number // divisor)


def _best(values, cost):
    """The first one of the least cost."""
    return min(values, key=cost)


def _is_channels_last(x):
    return x.shape[1] > 1 and x.stride(1) == 1


def _check(x):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            "backend 'triton' takes float32, float16 and bfloat16, "
            f'got {x.dtype}'
        )
    if x.device.type != 'cuda' and isinstance(_sum_kernel, triton.JITFunction):
        raise ValueError(
            f"backend 'triton' takes maps on a GPU, got one on {x.device}"
        )


@lru_cache
def _branches(sizes: tuple, dilations: tuple) -> tuple:
    """Size, dilation and first tap of every branch."""
    squares = [size**2 for size in sizes]
    starts = [sum(squares[:b]) for b in range(len(sizes))]
    return tuple(zip(sizes, dilations, starts, strict=True))


class _Frame(NamedTuple):
    """The smallest kernel that holds the kernels of all branches."""

    size: int  # K
    places: Tensor  # of every tap, its index in the frame
    branch: Tensor  # of every tap
    # (branches, K^2): the tap there, or the number of taps if there is none
    table: Tensor


@lru_cache
def _frame(sizes: tuple, dilations: tuple, device: torch.device) -> _Frame:
    spans = zip(sizes, dilations, strict=True)
    size = max((k - 1) * d + 1 for k, d in spans)
    grid = torch.arange(size**2).view(size, size)
    taps = sum(k**2 for k in sizes)
    table = torch.full((len(sizes), size**2), taps)
    places, branch = [], []
    for b, (k, d, start) in enumerate(_branches(sizes, dilations)):
        first = size // 2 - k // 2 * d
        window = slice(first, first + (k - 1) * d + 1, d)
        places.append(grid[window, window].flatten())
        branch += [b] * k**2
        table[b, places[-1]] = torch.arange(start, start + k**2)
    tensors = torch.cat(places), torch.tensor(branch), table
    return _Frame(size, *(tensor.to(device) for tensor in tensors))


def _convolve_and_add(x, taps, bias, sizes, dilations):
    """Sum over branches b of x[b] convolved with its taps.

    ``x`` is (branches, B, C, H, W) and ``taps`` (C, all taps).
    """
    out = torch.empty_like(x[0])
    if not out.numel():
        return out
    layout = _Layout.of(x[0], max(sizes))
    with torch.cuda.device_of(x):
        _sum_kernel[layout.grid(x[0])](
            x,
            taps.float().mT.contiguous(),
            bias,
            out,
            *out.shape[1:],
            x.stride(),
            out.stride(),
            BRANCHES=_branches(sizes, dilations),
            T=layout.rows,
            LANES=layout.lanes,
        )
    return out


def _splits(tiles, others):
    """Into how many sums to split one over so many tiles."""
    return max(1, min(tiles, _cdiv(PROGRAMS, others)))


def _statistics(x, taps, sizes, dilations):
    """Counts, means and sums of squared deviations from them, of convolutions.

    (branches, 3, C), in double precision.
    """
    layout = _Layout.of(x, max(sizes))
    tiles, blocks = layout.grid(x)
    splits = _splits(tiles, blocks)
    sums = taps.new_empty(
        splits, len(sizes), 3, x.shape[1], dtype=torch.float32
    )
    with torch.cuda.device_of(x):
        _statistics_kernel[splits, blocks](
            x,
            taps.float().mT.contiguous(),
            sums,
            *x.shape[1:],
            tiles,
            x.stride(),
            BRANCHES=_branches(sizes, dilations),
            T=layout.rows,
            LANES=layout.lanes,
        )
    return _combine(sums.double())


def _combine(parts):
    """Statistics of the whole from those of parts, (parts, branches, 3, C)."""
    counts, means, squares = parts.unbind(2)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    squares = squares + counts * (means - mean).square()
    return torch.stack((count, mean, squares.sum(0)), 1)


def _gather(statistics, group):
    """Statistics over all processes of a group."""
    parts = [
        torch.empty_like(statistics)
        for _ in range(distributed.get_world_size(group))
    ]
    distributed.all_gather(parts, statistics, group)
    return _combine(torch.stack(parts))


def _weight_grad(x, grad, size, dilation):
    """Gradient of the taps, (C, size^2), in double precision."""
    layout = _Layout.of(x, size)
    tiles, blocks = layout.grid(x)
    splits = _splits(tiles, blocks * size)
    channels = x.shape[1]
    sums = x.new_empty(splits, size**2, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_grad_kernel[splits, blocks, size](
            x,
            grad,
            sums,
            *x.shape[1:],
            tiles,
            x.stride(),
            grad.stride(),
            K=size,
            D=dilation,
            T=layout.rows,
            LANES=layout.lanes,
        )
    return sums.sum(0, dtype=torch.float64).mT


def _format_of(x):
    if _is_channels_last(x):
        return torch.channels_last
    return torch.contiguous_format


@custom_op('mmoverlock::depthwise_conv2d', mutates_args=())
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> Tensor:
    _check(x)
    sizes = weight.shape[-1:]
    return _convolve_and_add(
        x[None], weight.flatten(1), bias, tuple(sizes), (dilation,)
    )


@_conv2d.register_fake
def _(x, weight, bias, dilation):
    return torch.empty_like(x)


@custom_op('mmoverlock::depthwise_weight_grad', mutates_args=())
def _conv2d_weight_grad(
    x: Tensor, grad: Tensor, weight: Tensor, dilation: int
) -> Tensor:
    taps = _weight_grad(x, grad, weight.shape[-1], dilation)
    return taps.to(weight.dtype).contiguous().view(weight.shape)


@_conv2d_weight_grad.register_fake
def _(x, grad, weight, dilation):
    return weight.new_empty(weight.shape)


def _conv2d_setup(ctx, inputs, output):
    x, weight, bias, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv2d_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_format_of(x))
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _conv2d(grad, weight.flip(2, 3), None, ctx.dilation)
    if ctx.needs_input_grad[1]:
        grad_weight = _conv2d_weight_grad(x, grad, weight, ctx.dilation)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None


_conv2d.register_autograd(_conv2d_backward, setup_context=_conv2d_setup)


def _forward(x, taps, scale, shift, sizes, dilations, eps, group=None):
    """See :func:`sum_of_branches`; taps (C, all taps), scale and shift (n, C).

    Also returns what :func:`_statistics` does, over all processes.
    """
    _check(x)
    sizes, dilations = tuple(sizes), tuple(dilations)
    statistics = _statistics(x, taps, sizes, dilations)
    if group is not None:
        statistics = _gather(statistics, group)
    factor = scale * _rstd(statistics, eps)
    # One kernel and one bias for all of them.
    frame = _frame(sizes, dilations, x.device)
    taps = F.pad(taps * factor.mT[:, frame.branch], (0, 1))
    merged = taps[:, frame.table].sum(1)
    bias = (shift - statistics[:, 1] * factor).sum(0).float()
    out = _convolve_and_add(x[None], merged, bias, (frame.size,), (1,))
    return out, statistics


def _backward(
    grad, x, taps, scale, statistics, sizes, dilations, eps, group=None
):
    """Gradients of x, taps, scale and shift; the names are the formula's.

    The last three are this process's share, as in torch.nn.SyncBatchNorm.
    """
    sizes, dilations = tuple(sizes), tuple(dilations)
    branches = _branches(sizes, dilations)
    count, mean, _ = statistics.unbind(1)
    rstd = _rstd(statistics, eps)
    frame = _frame(sizes, dilations, x.device)
    products = taps * _weight_grad(x, grad, frame.size, 1)[:, frame.places]
    squares = [size**2 for size in sizes]
    grad_y = torch.stack([part.sum(1) for part in products.split(squares, 1)])
    total = grad.sum((0, 2, 3), dtype=torch.float32).double()
    grad_scale = rstd * (grad_y - mean * total)
    # Of this process; p, q and o take those over all of them.
    sums = torch.cat((grad_scale, total[None]))
    if group is not None:
        distributed.all_reduce(sums, group=group)
    p = scale * rstd
    q = p * rstd * sums[:-1] / count
    o = p * sums[-1] / count - q * mean

    grad_ys = torch.empty(
        (len(branches) * len(x), *x.shape[1:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=_format_of(x),
    ).unflatten(0, (len(branches), len(x)))
    if x.numel():
        layout = _Layout.of(x, max(sizes))
        with torch.cuda.device_of(x):
            _branch_grads_kernel[layout.grid(x)](
                x,
                grad,
                taps.float().mT.contiguous(),
                torch.stack((p, q, o)).float(),
                grad_ys,
                *x.shape[1:],
                x.stride(),
                grad.stride(),
                grad_ys.stride(),
                BRANCHES=branches,
                T=layout.rows,
                LANES=layout.lanes,
            )
    flipped = [part.flip(1) for part in taps.split(squares, 1)]
    grad_x = _convolve_and_add(
        grad_ys, torch.cat(flipped, 1), None, sizes, dilations
    )
    grad_taps = [
        _weight_grad(x, part, k, d)
        for part, (k, d, _) in zip(grad_ys, branches, strict=True)
    ]
    return (
        grad_x,
        torch.cat(grad_taps, 1).to(taps.dtype).contiguous(),
        grad_scale.to(scale.dtype),
        total.expand_as(scale).to(scale.dtype),
    )


@custom_op('mmoverlock::sum_of_branches', mutates_args=())
def _sum_of_branches(
    x: Tensor,
    taps: Tensor,
    scale: Tensor,
    shift: Tensor,
    sizes: list[int],
    dilations: list[int],
    eps: list[float],
) -> tuple[Tensor, Tensor]:
    return _forward(x, taps, scale, shift, sizes, dilations, eps)


@_sum_of_branches.register_fake
def _(x, taps, scale, shift, sizes, dilations, eps):
    statistics = x.new_empty(len(sizes), 3, x.shape[1], dtype=torch.float64)
    return torch.empty_like(x), statistics


@custom_op('mmoverlock::sum_of_branches_backward', mutates_args=())
def _sum_of_branches_grads(
    grad: Tensor,
    x: Tensor,
    taps: Tensor,
    scale: Tensor,
    statistics: Tensor,
    sizes: list[int],
    dilations: list[int],
    eps: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(grad, x, taps, scale, statistics, sizes, dilations, eps)


@_sum_of_branches_grads.register_fake
def _(grad, x, taps, scale, statistics, sizes, dilations, eps):
    return (
        torch.empty_like(grad),
        taps.new_empty(taps.shape),
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape),
    )


def _rstd(statistics, eps):
    count, _, squares = statistics.unbind(1)
    return (squares / count + _column(tuple(eps), count.device)).rsqrt()


@lru_cache
def _column(numbers: tuple, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]


def _sum_of_branches_setup(ctx, inputs, output):
    x, taps, scale, _, *ctx.settings = inputs
    ctx.save_for_backward(x, taps, scale, output[1])


def _sum_of_branches_backward(ctx, grad, _, backward=_sum_of_branches_grads):
    x = ctx.saved_tensors[0]
    grad = grad.contiguous(memory_format=_format_of(x))
    grads = backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None for _ in ctx.settings)


_sum_of_branches.register_autograd(
    _sum_of_branches_backward, setup_context=_sum_of_branches_setup
)


class _SynchronizedSum(torch.autograd.Function):
    """The same over the processes of a group, with one exchange each way."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_sum_of_branches_setup)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return _sum_of_branches_backward(ctx, grad, _, _backward)


# An exchange in the middle of a graph breaks it.
_synchronized_sum = torch.compiler.disable(_SynchronizedSum.apply)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """See :func:`mmoverlock.ops.depthwise_conv2d`."""
    return _conv2d(_autocast(x), weight, bias, dilation)


def sum_of_branches(
    x: Tensor,
    branches: Sequence,
    group: 'distributed.ProcessGroup | None' = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.sum_of_branches`."""
    operands = (
        _autocast(x),
        torch.cat([branch.weight.flatten(1) for branch in branches], 1),
        torch.stack([branch.scale for branch in branches]),
        torch.stack([branch.shift for branch in branches]),
        [branch.weight.shape[-1] for branch in branches],
        [branch.dilation for branch in branches],
        [branch.eps for branch in branches],
    )
    if group is None:
        out, statistics = _sum_of_branches(*operands)
    else:
        out, statistics = _synchronized_sum(*operands, group)
    with torch.no_grad():
        for branch, (count, mean, squares) in zip(
            branches, statistics, strict=True
        ):
            var = squares / (count - 1).clamp(min=1)
            for running, new in (
                (branch.running_mean, mean),
                (branch.running_var, var),
            ):
                running.lerp_(new.to(running.dtype), branch.momentum)
    return out


def _autocast(x):
    """What autocast does before a convolution; weights stay as they are."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
