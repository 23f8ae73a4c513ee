"""Kernels for maps in channels_last.

**Form.** A thread has a few channels of a strip: ``COLUMNS`` columns of the
map, some rows long. It walks down and has the rows that meet a kernel in
registers, so that a value is loaded once for all nine taps and once more in
the strips beside it. The row after the present one is being loaded in the
meantime. Lanes run along channels, then along strips, which may be of
different images: small maps fill the lanes, too.

**Forward.** A loaded row is added to the three rows of the output that see
it. Where the sums of squares are asked for, every strip writes its own.

**Backward**, one pass, in which the gradient g of the output is made while
it is loaded: ``grad * scale + y * coef``. The gradient of a value and what
the value adds to the nine gradients of the weight meet the same 3 x 3 values
of g, so those are in registers and x has no halo. GELU and its slope are
computed once a value.

What bounds them is the memory: 4 bytes a value forward and 6 to 8 backward,
in bfloat16, if rows and columns that strips share are found in the caches.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums
from ..common import (
    cast_as_convolutions,
    cdiv,
    channels_last,
    custom_op,
    next_power_of_2,
)

# Arguments that come in too many values to compile for kinds of them.
SIZES = ('height', 'width', 'rows', 'strips')
MIN_ROWS = 3  # of a strip, where the map has them
BLOCKS = 16, 64  # fewest and most channels of a program


class Form(NamedTuple):
    """What a program works on."""

    channels: int  # of a thread, next to each other
    columns: int  # of a strip
    warps: int
    resident: int  # programs that a multiprocessor has registers for

    @property
    def registers(self):
        """Of a thread."""
        return 65536 // (32 * self.warps * self.resident) // 8 * 8


FORWARD = Form(channels=2, columns=7, warps=4, resident=4)
BACKWARD = Form(channels=2, columns=4, warps=4, resident=3)


@triton.jit
def _strip(strip, height, width, rows, COLUMNS: tl.constexpr):
    """Images, first rows and first columns of strips."""
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, rows)
    col = strip % across * COLUMNS
    row = strip // across % down * rows
    return strip // across // down, row, col


@triton.jit
def _normal(x):
    """The cumulative distribution of the normal distribution.

    It is ``1 / (1 + 2 ** -p(x))`` with an odd function p that is fitted well
    by a polynomial: ``x * _normal(x)`` is GELU to 4e-7 of max(1, abs(x)) and
    takes a third of the instructions that it takes with ``tl.erf``.
    """
    square = x * x
    p = tl.fma(square, -5.1301954e-09, 3.8180465e-07)
    p = tl.fma(square, p, -1.1404618e-05)
    p = tl.fma(square, p, 1.5906918e-04)
    p = tl.fma(square, p, 9.6586426e-05)
    p = tl.fma(square, p, -1.0483987e-01)
    p = tl.fma(square, p, -2.3022067)
    root = tl.rsqrt(1 + tl.exp2(x * p))
    return root * root


@triton.jit
def _gelu(x):
    return x * _normal(x)


@triton.jit
def _gelu_slope(x):
    bell = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    return tl.fma(x, bell, _normal(x))


@triton.jit
def _taps(weight, channel, channels, LANES: tl.constexpr):
    """The nine taps, each a tensor of the shape of the lanes."""
    taps = ()
    pointer = weight + tl.broadcast_to(channel * 9, LANES)
    inside = tl.broadcast_to(channel < channels, LANES)
    for k in tl.static_range(9):
        tap = tl.load(pointer + k, mask=inside, other=0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _row(x, step, ok, col, width, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Values in columns FIRST to LAST of a strip, 0 outside the map."""
    values = ()
    for j in tl.static_range(FIRST, LAST):
        inside = ok & (col + j >= 0) & (col + j < width)
        values = values + (tl.load(x + step * j, mask=inside, other=0),)
    return values


@triton.jit
def _add_row(acc, row, left, middle, right):
    """Add what three taps make of a row to a row of the output."""
    sums = ()
    for j in tl.static_range(len(acc)):
        part = tl.fma(row[j], left, acc[j])
        part = tl.fma(row[j + 1], middle, part)
        sums = sums + (tl.fma(row[j + 2], right, part),)
    return sums


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    x,
    weight,
    bias,
    y,
    squares,
    channels,
    height,
    width,
    rows,
    strips,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    blocks = tl.cdiv(channels, LANES[1])
    program = tl.program_id(0)
    channel = program % blocks * LANES[1] + tl.arange(0, LANES[1])[None]
    strip = program // blocks * LANES[0] + tl.arange(0, LANES[0])[:, None]
    ok = (strip < strips) & (channel < channels)
    image, row, col = _strip(strip, height, width, rows, COLUMNS)
    taps = _taps(weight, channel, channels, LANES)
    start = tl.zeros(LANES, tl.float32)
    if bias is not None:
        pointer = bias + tl.broadcast_to(channel, LANES)
        start += tl.load(pointer, mask=ok, other=0).to(tl.float32)
    centre = taps[4]
    if RESIDUAL:
        centre += 1
    step = tl.cast(channels, tl.int64)
    line = step * width
    at = ((image * height + row) * width + col).to(tl.int64) * step + channel
    x += at
    y += at

    upper = ()
    lower = ()
    for _ in tl.static_range(COLUMNS):
        upper = upper + (start,)
        lower = lower + (start,)
    total = tl.zeros(LANES, tl.float32)
    coming = _row(x - line, step, ok & (row > 0), col, width, -1, COLUMNS + 1)
    for i in range(-1, rows + 1):
        current = ()
        for j in tl.static_range(COLUMNS + 2):
            value = coming[j].to(tl.float32)
            if GELU:
                value = _gelu(value)
            current = current + (value,)
        below = row + i + 1
        coming = _row(
            x + line * (i + 1),
            step,
            ok & (below < height) & (i < rows),
            col,
            width,
            -1,
            COLUMNS + 1,
        )
        out = _add_row(upper, current, taps[6], taps[7], taps[8])
        upper = _add_row(lower, current, taps[3], centre, taps[5])
        lower = ()
        for _ in tl.static_range(COLUMNS):
            lower = lower + (start,)
        lower = _add_row(lower, current, taps[0], taps[1], taps[2])
        # The row above is complete.
        real = ok & (i > 0) & (row + i <= height)
        target = y + line * (i - 1)
        for j in tl.static_range(COLUMNS):
            inside = real & (col + j < width)
            stored = out[j].to(y.dtype.element_ty)
            tl.store(target + step * j, stored, mask=inside)
            if squares is not None:
                value = tl.where(inside, stored.to(tl.float32), 0)
                total = tl.fma(value, value, total)
    if squares is not None:
        tl.store(squares + strip.to(tl.int64) * step + channel, total, mask=ok)


@triton.jit
def _grads(grad, y, scale, coef):
    """A row of the gradient of the output."""
    row = ()
    for j in tl.static_range(len(grad)):
        value = grad[j].to(tl.float32)
        if scale is not None:
            value *= scale
        if coef is not None:
            value = tl.fma(y[j].to(tl.float32), coef, value)
        row = row + (value,)
    return row


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad,
    x,
    y,
    scale,
    coef,
    weight,
    grad_x,
    partial,
    channels,
    height,
    width,
    rows,
    strips,
    splits,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``partial`` is (splits, SUMS, C): of the taps, of g and of grad_x."""
    blocks = tl.cdiv(channels, LANES[1])
    split = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * LANES[1]
    channel += tl.arange(0, LANES[1])[None]
    taps = _taps(weight, channel, channels, LANES)
    centre = taps[4]
    if RESIDUAL:
        centre += 1
    step = tl.cast(channels, tl.int64)
    line = step * width
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros(LANES, tl.float32),)

    for first in range(split * LANES[0], strips, splits * LANES[0]):
        strip = first + tl.arange(0, LANES[0])[:, None]
        ok = (strip < strips) & (channel < channels)
        image, row, col = _strip(strip, height, width, rows, COLUMNS)
        at = (image * height + row) * width + col
        at = at.to(tl.int64) * step + channel
        factor = None
        other = None
        if scale is not None:
            factor = tl.load(scale + image * step + channel, mask=ok, other=0)
        if coef is not None:
            other = tl.load(coef + image * step + channel, mask=ok, other=0)
        g_row = grad + at
        x_row = x + at
        y_row = grad + at
        if coef is not None:
            y_row = y + at
        out_row = grad_x + at

        # The rows of g above, at and below the present one.
        ok_row = ok & (row > 0)
        coming = _row(g_row - line, step, ok_row, col, width, -1, COLUMNS + 1)
        coming_y = coming
        if coef is not None:
            coming_y = _row(
                y_row - line, step, ok_row, col, width, -1, COLUMNS + 1
            )
        above = _grads(coming, coming_y, factor, other)
        coming = _row(g_row, step, ok, col, width, -1, COLUMNS + 1)
        coming_y = coming
        if coef is not None:
            coming_y = _row(y_row, step, ok, col, width, -1, COLUMNS + 1)
        here = _grads(coming, coming_y, factor, other)
        ok_row = ok & (row + 1 < height)
        coming = _row(g_row + line, step, ok_row, col, width, -1, COLUMNS + 1)
        coming_y = coming
        if coef is not None:
            coming_y = _row(
                y_row + line, step, ok_row, col, width, -1, COLUMNS + 1
            )
        for i in range(rows):
            below = _grads(coming, coming_y, factor, other)
            real = ok & (row + i < height)
            current = _row(
                x_row + line * i, step, real, col, width, 0, COLUMNS
            )
            # Of the next row.
            ok_row = ok & (row + i + 2 < height) & (i + 1 < rows)
            coming = _row(
                g_row + line * (i + 2),
                step,
                ok_row,
                col,
                width,
                -1,
                COLUMNS + 1,
            )
            coming_y = coming
            if coef is not None:
                coming_y = _row(
                    y_row + line * (i + 2),
                    step,
                    ok_row,
                    col,
                    width,
                    -1,
                    COLUMNS + 1,
                )
            for j in tl.static_range(COLUMNS):
                value = current[j].to(tl.float32)
                near = (
                    below[j + 2],
                    below[j + 1],
                    below[j],
                    here[j + 2],
                    here[j + 1],
                    here[j],
                    above[j + 2],
                    above[j + 1],
                    above[j],
                )
                result = near[4] * centre
                for k in tl.static_range(9):
                    if k != 4:
                        result = tl.fma(near[k], taps[k], result)
                if GELU:
                    result *= _gelu_slope(value)
                    value = _gelu(value)
                inside = real & (col + j < width)
                tl.store(
                    out_row + line * i + step * j,
                    result.to(grad_x.dtype.element_ty),
                    mask=inside,
                )
                more = ()
                for k in tl.static_range(9):
                    more = more + (tl.fma(value, near[k], sums[k]),)
                more = more + (sums[9] + tl.where(inside, near[4], 0),)
                if SUMS == 11:
                    more = more + (sums[10] + tl.where(inside, result, 0),)
                sums = more
            above = here
            here = below

    channel = tl.program_id(0) % blocks * LANES[1] + tl.arange(0, LANES[1])
    partial += split.to(tl.int64) * SUMS * channels + channel
    for k in tl.static_range(SUMS):
        tl.store(
            partial + k * channels,
            tl.sum(sums[k], 0),
            mask=channel < channels,
        )


class Plan(NamedTuple):
    """How a map is cut."""

    lanes: tuple[int, int]  # strips and channels of a program
    rows: int  # of a strip
    strips: int  # of an image
    blocks: int  # of channels
    splits: int  # programs for a block that run at a time


@lru_cache(1024)
def plan(shape: tuple, form: Form, slots: int) -> Plan:
    """How to cut a map.

    Args:
        shape (tuple): (B, C, H, W).
        form (Form): Of the kernel.
        slots (int): Programs that run at a time.
    """
    batch, channels, height, width = shape
    least, most = BLOCKS
    block = min(max(next_power_of_2(channels), least), most)
    lanes = 32 * form.warps * form.channels // block, block
    blocks = cdiv(channels, block)
    across = cdiv(width, form.columns)
    splits = max(1, slots // blocks)  # no program waits for another one

    def cut(down):
        rows = cdiv(height, down)
        return rows, cdiv(height, rows) * across

    def cost(down):  # rows that are loaded, in the longest program
        rows, strips = cut(down)
        tiles = cdiv(batch * strips, lanes[0])
        return cdiv(tiles, splits) * (rows + 2)

    downs = range(1, max(1, height // MIN_ROWS) + 1)
    return Plan(lanes, *cut(min(downs, key=cost)), blocks, splits)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: bool = True,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One launch.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight (Tensor): (C, 1, 3, 3), contiguous, of any dtype.
        bias (Tensor, optional): (C, ), of any dtype.
        gelu, residual (bool): See :func:`mmoverlock.ops.residual_conv`.
        squares (bool): Whether to return the sums of squares.

    Returns:
        tuple[Tensor, Tensor | None]: (B, C, H, W) as ``x``, and the partial
        sums of its squares, (B, strips, C), in single precision.
    """
    y = torch.empty_like(x)
    slots = partial_sums.programs(x.device, FORWARD.resident)
    lanes, rows, strips, blocks, _ = plan(tuple(x.shape), FORWARD, slots)
    batch, channels, height, width = x.shape
    sums = None
    if squares:
        sums = x.new_empty(batch, strips, channels, dtype=torch.float32)
    grid = (cdiv(batch * strips, lanes[0]) * blocks,)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x,
            weight,
            bias,
            y,
            sums,
            channels,
            height,
            width,
            rows,
            batch * strips,
            GELU=gelu,
            RESIDUAL=residual,
            COLUMNS=FORWARD.columns,
            LANES=lanes,
            num_warps=FORWARD.warps,
            maxnreg=FORWARD.registers,
        )
    return y, sums


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    scale: Tensor | None = None,
    coef: Tensor | None = None,
    gelu: bool = False,
    residual: bool = True,
    sum_grad_x: bool = False,
) -> tuple[Tensor, Tensor]:
    """One launch; the gradient of the output is ``grad * scale + y * coef``.

    Args:
        grad (Tensor): (B, C, H, W), in channels_last as all maps.
        x, weight: As in :func:`forward`.
        y (Tensor, optional): The output, where there is a ``coef``.
        scale, coef (Tensor, optional): (B, C), contiguous, in single
            precision.
        gelu, residual (bool): As in :func:`forward`.
        sum_grad_x (bool): Whether to sum the gradient of ``x``, which is the
            gradient of a bias of the layer before.

    Returns:
        tuple[Tensor, Tensor]: Gradient of x, and partial sums for
        :func:`partial_sums.add`, (parts, 10 or 11, C): the gradients of the
        taps, of the bias, and the sum of the gradient of x.
    """
    grad_x = torch.empty_like(x)
    slots = partial_sums.programs(x.device, BACKWARD.resident)
    cut = plan(tuple(x.shape), BACKWARD, slots)
    lanes, rows, strips, blocks, splits = cut
    batch, channels, height, width = x.shape
    splits = min(cdiv(batch * strips, lanes[0]), splits)
    sums = 10 + sum_grad_x
    partial = x.new_empty(splits, sums, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(splits * blocks,)](
            grad,
            x,
            None if coef is None else y,
            scale,
            coef,
            weight,
            grad_x,
            partial,
            channels,
            height,
            width,
            rows,
            batch * strips,
            splits,
            GELU=gelu,
            RESIDUAL=residual,
            SUMS=sums,
            COLUMNS=BACKWARD.columns,
            LANES=lanes,
            num_warps=BACKWARD.warps,
            maxnreg=BACKWARD.registers,
        )
    return grad_x, partial


@custom_op('mmoverlock::residual_conv')
def _residual_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: bool,
    squares: bool,
) -> tuple[Tensor, Tensor]:
    """The second result has no elements where it is not asked for."""
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return _empty_outputs(x, weight, bias, gelu, residual, squares)
    y, sums = forward(x, weight.contiguous(), bias, gelu, residual, squares)
    if sums is None:
        return y, x.new_empty(0, dtype=torch.float32)
    return y, sums.sum(1)


@_residual_conv.register_fake
def _(x, weight, bias, gelu, residual, squares):
    return _empty_outputs(
        channels_last(x), weight, bias, gelu, residual, squares
    )


def _empty_outputs(x, weight, bias, gelu, residual, squares):
    shape = x.shape[:2] if squares else (0,)
    return torch.empty_like(x), x.new_zeros(shape, dtype=torch.float32)


@custom_op('mmoverlock::residual_conv_backward', differentiable=False)
def _residual_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    coef: Tensor | None,
    gelu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    if not x.numel():
        return (
            torch.empty_like(x),
            torch.zeros_like(weight),
            weight.new_zeros(len(weight)),
        )
    x = channels_last(x)
    grad_x, partial = backward(
        channels_last(grad),
        x,
        weight.contiguous(),
        y,
        None,
        coef,
        gelu,
        residual,
    )
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = weight.new_empty(len(weight))
    partial_sums.add((partial, grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias


@_residual_conv_backward.register_fake
def _(grad, x, weight, y, coef, gelu, residual):
    return (
        torch.empty_like(channels_last(x)),
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight)),
    )


def _save(ctx, inputs, output):
    x, weight, bias, ctx.gelu, ctx.residual, squares = inputs
    ctx.save_for_backward(x, weight, output[0] if squares else None)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_squares):
    x, weight, y = ctx.saved_tensors
    coef = None
    if y is not None and grad_squares is not None:
        coef = 2 * grad_squares.float().contiguous()
    if grad is None:
        if coef is None:
            return (None,) * 6
        grad = torch.zeros_like(x)
    grad_x, grad_weight, grad_bias = _residual_conv_backward(
        grad, x, weight, y, coef, ctx.gelu, ctx.residual
    )
    if ctx.bias_dtype is None:
        grad_bias = None
    else:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None


_residual_conv.register_autograd(_differentiate, setup_context=_save)


def residual_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: bool = True,
    squares: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`mmoverlock.ops.residual_conv`."""
    x = channels_last(cast_as_convolutions(x))
    y, sums = _residual_conv(x, weight, bias, gelu, residual, squares)
    return (y, sums) if squares else y
