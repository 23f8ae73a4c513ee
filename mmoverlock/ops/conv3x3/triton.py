"""Kernels for maps in channels_last.

**Form.** A thread has a few channels of a strip: ``COLUMNS`` columns of the
map, some rows long. It walks down and has the rows that meet a kernel in
registers, so that a value is loaded once for all nine taps and once more in
the strips beside it. The row after the present one is being loaded in the
meantime. Lanes run along channels, then along strips, which may be of
different images: small maps fill the lanes, too.

**Forward.** A loaded row is added to the three rows of the output that see
it. Where the sums of squares are asked for, a program adds up those of strips
of one image.

**Backward**, one pass, in which the gradient g of the output is made while
it is loaded: ``grad * scale + y * coef``. The gradient of a value and what
the value adds to the nine gradients of the weight meet the same 3 x 3 values
of g, so those are in registers and x has no halo. GELU and its slope are
computed once a value.

What bounds them is the memory: 4 bytes a value forward and 6 to 8 backward,
in bfloat16, if rows and columns that strips share are found in the caches.
"""

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..activations import gelu, gelu_slope
from ..common import (
    cast_as_convolutions,
    cdiv,
    channels_last,
    contiguous,
    custom_op,
    next_power_of_2,
    saved_tensors,
)
from ..grn.triton import make_coefs
from ..launching import jit

# Arguments that come in too many values to compile for kinds of them.
SIZES = ('height', 'width', 'rows', 'strips', 'splits', 'shares')


class Form(NamedTuple):
    """The share of a program."""

    channels: int  # of a thread, next to each other
    columns: int  # of a strip
    warps: int
    resident: int  # programs that a multiprocessor has registers for

    @property
    def registers(self) -> int:
        """Of a thread."""
        return 65536 // (32 * self.warps * self.resident) // 8 * 8

    def of_channels(self, channels: int) -> 'Form':
        """The same of a program that has so many channels, a power of 2."""
        warps = max(self.warps, channels // (32 * self.channels))
        resident = max(1, self.warps * self.resident // warps)
        return self._replace(warps=warps, resident=resident)


KNOBS = dict(
    forward=Form(channels=2, columns=7, warps=4, resident=4),
    backward=Form(channels=2, columns=4, warps=4, resident=3),
    min_rows=3,  # of a strip, where the map has them
    channels=(16, 64),  # fewest and most of a program
)


@triton.jit
def _strip(strip, height, width, rows, COLUMNS: tl.constexpr):
    """Images, first rows and first columns of strips, each (STRIPS, 1)."""
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, rows)
    col = strip % across * COLUMNS
    row = strip // across % down * rows
    return strip // across // down, row, col


@triton.jit
def _load_taps(p_weight, o_channel, channels, LANES: tl.constexpr):
    """The nine taps, each of the shape of the lanes."""
    taps = ()
    p_taps = p_weight + tl.broadcast_to(o_channel * 9, LANES)
    m_taps = tl.broadcast_to(o_channel < channels, LANES)
    for k in tl.static_range(9):
        b_tap = tl.load(p_taps + k, mask=m_taps, other=0)
        taps = taps + (b_tap.to(tl.float32),)
    return taps


@triton.jit
def _load_row(
    p_x, step, m_row, col, width, FIRST: tl.constexpr, LAST: tl.constexpr
):
    """Values in columns FIRST to LAST of a strip, 0 outside the map."""
    row = ()
    for j in tl.static_range(FIRST, LAST):
        m_x = m_row & (col + j >= 0) & (col + j < width)
        row = row + (tl.load(p_x + step * j, mask=m_x, other=0),)
    return row


@triton.jit
def _add_row(acc, row, left, middle, right):
    """Add what three taps make of a row to a row of the output."""
    sums = ()
    for j in tl.static_range(len(acc)):
        part = tl.fma(row[j], left, acc[j])
        part = tl.fma(row[j + 1], middle, part)
        sums = sums + (tl.fma(row[j + 2], right, part),)
    return sums


@jit(do_not_specialize=SIZES)
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_squares,
    channels,
    height,
    width,
    rows,
    strips,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``y[n] = bias + f(x[n]) + sum over taps of weight[tap] f(x[n + tap])``.

    f is GELU or the identity, and is added if RESIDUAL; with ACTIVATE, GELU
    of that is stored. x and y (B, H, W, C), weight (C, 9), bias (C, ); squares
    (strips / GROUP, C), the sums over GROUP strips of the squares of y; grid
    (blocks of LANES[0] of all strips blocks of LANES[1] of C, ). A block has
    the shape of LANES, and is of one row and one column of every strip.
    """
    blocks = tl.cdiv(channels, LANES[1])
    program = tl.program_id(0)
    o_channel = program % blocks * LANES[1] + tl.arange(0, LANES[1])[None]
    strip = program // blocks * LANES[0] + tl.arange(0, LANES[0])[:, None]
    m_lane = (strip < strips) & (o_channel < channels)
    image, row, col = _strip(strip, height, width, rows, COLUMNS)
    taps = _load_taps(p_weight, o_channel, channels, LANES)
    b_start = tl.zeros(LANES, tl.float32)
    if p_bias is not None:
        o_bias = tl.broadcast_to(o_channel, LANES)
        b_start += tiles.load(p_bias, o_bias, m_lane)
    center = taps[4]
    if RESIDUAL:
        center += 1
    step = tl.cast(channels, tl.int64)
    line = step * width
    o_x = ((image * height + row) * width + col).to(tl.int64) * step
    o_x += o_channel
    p_x += o_x
    p_y += o_x

    # Rows of the output that lack one row and two rows of the input.
    upper = ()
    lower = ()
    for _ in tl.static_range(COLUMNS):
        upper = upper + (b_start,)
        lower = lower + (b_start,)
    total = tl.zeros(LANES, tl.float32)
    coming = _load_row(
        p_x - line, step, m_lane & (row > 0), col, width, -1, COLUMNS + 1
    )
    for i in range(-1, rows + 1):
        current = ()
        for j in tl.static_range(COLUMNS + 2):
            b_x = coming[j].to(tl.float32)
            if GELU:
                b_x = gelu(b_x)
            current = current + (b_x,)
        below = row + i + 1
        coming = _load_row(
            p_x + line * (i + 1),
            step,
            m_lane & (below < height) & (i < rows),
            col,
            width,
            -1,
            COLUMNS + 1,
        )
        out = _add_row(upper, current, taps[6], taps[7], taps[8])
        upper = _add_row(lower, current, taps[3], center, taps[5])
        lower = ()
        for _ in tl.static_range(COLUMNS):
            lower = lower + (b_start,)
        lower = _add_row(lower, current, taps[0], taps[1], taps[2])
        # The row above is complete.
        m_row = m_lane & (i > 0) & (row + i <= height)
        p_row = p_y + line * (i - 1)
        for j in tl.static_range(COLUMNS):
            m_y = m_row & (col + j < width)
            b_y = out[j]
            if ACTIVATE:
                b_y = gelu(b_y)
            b_y = b_y.to(p_y.dtype.element_ty)
            tl.store(p_row + step * j, b_y, mask=m_y)
            if p_squares is not None:
                b_wide = tl.where(m_y, b_y.to(tl.float32), 0)
                total = tl.fma(b_wide, b_wide, total)
    if p_squares is not None:
        PARTS: tl.constexpr = LANES[0] // GROUP
        part = program // blocks * PARTS + tl.arange(0, PARTS)[:, None]
        m_sum = (part < strips // GROUP) & (o_channel < channels)
        b_sum = tl.sum(tl.reshape(total, (PARTS, GROUP, LANES[1])), 1)
        tl.store(p_squares + part * step + o_channel, b_sum, mask=m_sum)


@triton.jit
def _grads(grad, y, b_scale, b_coef):
    """A row of the gradient of the output, ``grad scale + y coef``."""
    row = ()
    for j in tl.static_range(len(grad)):
        b_grad = grad[j].to(tl.float32)
        if b_scale is not None:
            b_grad *= b_scale
        if b_coef is not None:
            b_grad = tl.fma(y[j].to(tl.float32), b_coef, b_grad)
        row = row + (b_grad,)
    return row


@jit(do_not_specialize=SIZES)
def _backward_kernel(
    p_grad,
    p_x,
    p_y,
    p_scale,
    p_coef,
    p_sums,
    p_shares,
    p_gamma,
    p_norm,
    p_weight,
    p_keep,
    p_grad_x,
    p_kept,
    p_parts,
    channels,
    height,
    width,
    rows,
    strips,
    splits,
    shares,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients, with ``g = grad scale[image] + y coef[image]``::

        grad_x[n] = f'(x[n]) (g[n] + sum over taps of weight[tap] g[n - tap])
        grad_weight[tap] = sum over n of f(x[n]) g[n - tap]

    f, RESIDUAL and blocks as in the forward kernel. grad, x, y and grad_x
    (B, H, W, C), scale and coef (B, C), weight (C, 9); parts (splits, SUMS, C)
    of the sums for the nine taps, of g and, for 11 SUMS, of grad_x; grid
    (splits blocks of LANES[1] of C, ). If there is a keep (B, ), kept (B, H,
    W, C) is grad_x times it. With sums (B, PARTS, 2, C), shares (B, shares),
    gamma (C, ) and norm (B, 2, C), which GRN behind y left, they make coef.
    """
    blocks = tl.cdiv(channels, LANES[1])
    split = tl.program_id(0) // blocks
    o_channel = tl.program_id(0) % blocks * LANES[1]
    o_channel += tl.arange(0, LANES[1])[None]
    taps = _load_taps(p_weight, o_channel, channels, LANES)
    center = taps[4]
    if RESIDUAL:
        center += 1
    step = tl.cast(channels, tl.int64)
    line = step * width
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros(LANES, tl.float32),)

    for first in range(split * LANES[0], strips, splits * LANES[0]):
        strip = first + tl.arange(0, LANES[0])[:, None]
        m_lane = (strip < strips) & (o_channel < channels)
        image, row, col = _strip(strip, height, width, rows, COLUMNS)
        o_x = (image * height + row) * width + col
        o_x = o_x.to(tl.int64) * step + o_channel
        b_scale = None
        b_coef = None
        if p_scale is not None:
            p_image = p_scale + image * step
            b_scale = tl.load(p_image + o_channel, mask=m_lane, other=0)
        if p_coef is not None:
            p_image = p_coef + image * step
            b_coef = tl.load(p_image + o_channel, mask=m_lane, other=0)
        if p_sums is not None:
            p_image = p_sums + image * PARTS * 2 * step
            b_coef = tl.zeros(LANES, tl.float32)
            for i in tl.static_range(PARTS):
                p_part = p_image + i * 2 * step + o_channel
                b_coef += tl.load(p_part, mask=m_lane, other=0)
            o_share = tl.arange(0, SHARES)[None]
            m_share = (strip < strips) & (o_share < shares)
            p_share = p_shares + image * shares + o_share
            b_share = tl.load(p_share, mask=m_share, other=0)
            b_coef = make_coefs(
                b_coef,
                tl.sum(b_share, 1)[:, None],
                p_gamma,
                p_norm,
                image,
                step,
                o_channel,
                m_lane,
            )
        if p_keep is not None:
            b_keep = tl.load(p_keep + image, mask=strip < strips, other=0)
            p_kept_row = p_kept + o_x
        p_grad_row = p_grad + o_x
        p_x_row = p_x + o_x
        p_y_row = p_grad + o_x
        if p_y is not None:
            p_y_row = p_y + o_x
        p_out_row = p_grad_x + o_x

        # The rows of g above, at and below the present one.
        m_row = m_lane & (row > 0)
        coming = _load_row(
            p_grad_row - line, step, m_row, col, width, -1, COLUMNS + 1
        )
        coming_y = coming
        if p_y is not None:
            coming_y = _load_row(
                p_y_row - line, step, m_row, col, width, -1, COLUMNS + 1
            )
        above = _grads(coming, coming_y, b_scale, b_coef)
        coming = _load_row(
            p_grad_row, step, m_lane, col, width, -1, COLUMNS + 1
        )
        coming_y = coming
        if p_y is not None:
            coming_y = _load_row(
                p_y_row, step, m_lane, col, width, -1, COLUMNS + 1
            )
        here = _grads(coming, coming_y, b_scale, b_coef)
        m_row = m_lane & (row + 1 < height)
        coming = _load_row(
            p_grad_row + line, step, m_row, col, width, -1, COLUMNS + 1
        )
        coming_y = coming
        if p_y is not None:
            coming_y = _load_row(
                p_y_row + line, step, m_row, col, width, -1, COLUMNS + 1
            )
        for i in range(rows):
            below = _grads(coming, coming_y, b_scale, b_coef)
            m_here = m_lane & (row + i < height)
            current = _load_row(
                p_x_row + line * i, step, m_here, col, width, 0, COLUMNS
            )
            # Of the next row.
            m_row = m_lane & (row + i + 2 < height) & (i + 1 < rows)
            coming = _load_row(
                p_grad_row + line * (i + 2),
                step,
                m_row,
                col,
                width,
                -1,
                COLUMNS + 1,
            )
            coming_y = coming
            if p_y is not None:
                coming_y = _load_row(
                    p_y_row + line * (i + 2),
                    step,
                    m_row,
                    col,
                    width,
                    -1,
                    COLUMNS + 1,
                )
            for j in tl.static_range(COLUMNS):
                b_x = current[j].to(tl.float32)
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
                b_grad_x = near[4] * center
                for k in tl.static_range(9):
                    if k != 4:
                        b_grad_x = tl.fma(near[k], taps[k], b_grad_x)
                if GELU:
                    b_grad_x *= gelu_slope(b_x)
                    b_x = gelu(b_x)
                m_x = m_here & (col + j < width)
                tl.store(
                    p_out_row + line * i + step * j,
                    b_grad_x.to(p_grad_x.dtype.element_ty),
                    mask=m_x,
                )
                if p_keep is not None:
                    b_kept = b_grad_x * b_keep
                    tl.store(
                        p_kept_row + line * i + step * j,
                        b_kept.to(p_kept.dtype.element_ty),
                        mask=m_x,
                    )
                more = ()
                for k in tl.static_range(9):
                    more = more + (tl.fma(b_x, near[k], sums[k]),)
                more = more + (sums[9] + tl.where(m_x, near[4], 0),)
                if SUMS == 11:
                    more = more + (sums[10] + tl.where(m_x, b_grad_x, 0),)
                sums = more
            above = here
            here = below

    o_channel = tl.program_id(0) % blocks * LANES[1] + tl.arange(0, LANES[1])
    p_parts += split.to(tl.int64) * SUMS * channels + o_channel
    for k in tl.static_range(SUMS):
        tl.store(
            p_parts + k * channels,
            tl.sum(sums[k], 0),
            mask=o_channel < channels,
        )


class Plan(NamedTuple):
    """A way to cut a map."""

    lanes: tuple[int, int]  # strips and channels of a program
    rows: int  # of a strip
    strips: int  # of an image
    blocks: int  # of channels
    splits: int  # programs for a block that run at a time


@lru_cache(1024)
def plan(
    shape: tuple, form: Form, slots: int, most: int | None = None
) -> Plan:
    """Choose a way to cut a map.

    Args:
        shape (tuple): (B, C, H, W).
        form (Form): Of the kernel.
        slots (int): Programs that run at a time.
        most (int, optional): Channels of a program, at most. Defaults to
            None: those of ``KNOBS``.
    """
    batch, channels, height, width = shape
    least, usual = KNOBS['channels']
    block = min(max(next_power_of_2(channels), least), most or usual)
    lanes = 32 * form.warps * form.channels // block, block
    blocks = cdiv(channels, block)
    across = cdiv(width, form.columns)
    splits = max(1, slots // blocks)  # no program waits for another one

    def cut(down: int) -> tuple[int, int]:
        rows = cdiv(height, down)
        return rows, cdiv(height, rows) * across

    def cost(down: int) -> int:  # rows that are loaded, in the longest program
        rows, strips = cut(down)
        tiles = cdiv(batch * strips, lanes[0])
        return cdiv(tiles, splits) * (rows + 2)

    downs = range(1, max(1, height // KNOBS['min_rows']) + 1)
    return Plan(lanes, *cut(min(downs, key=cost)), blocks, splits)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: bool = True,
    squares: bool = False,
    activate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One launch.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight (Tensor): (C, 1, 3, 3), contiguous, of any dtype.
        bias (Tensor, optional): (C, ), of any dtype.
        gelu, residual (bool): See :func:`mmoverlock.ops.residual_conv`.
        squares (bool): Whether to return the sums of squares.
        activate (bool): Whether the result is GELU of the convolution.

    Returns:
        tuple[Tensor, Tensor | None]: (B, C, H, W) as ``x``, and the partial
        sums of its squares, (B, parts, C), in single precision.
    """
    y = torch.empty_like(x)
    form = KNOBS['forward']
    slots = partial_sums.programs(x.device, form.resident)
    lanes, rows, strips, blocks, _ = plan(tuple(x.shape), form, slots)
    batch, channels, height, width = x.shape
    sums, group = None, 1
    if squares:
        group = gcd(lanes[0], strips)
        parts = strips // group
        sums = x.new_empty(batch, parts, channels, dtype=torch.float32)
    grid = (cdiv(batch * strips, lanes[0]) * blocks,)
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
        ACTIVATE=activate,
        COLUMNS=form.columns,
        LANES=lanes,
        GROUP=group,
        num_warps=form.warps,
        maxnreg=form.registers,
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
    keep: Tensor | None = None,
    kept: Tensor | None = None,
    response: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
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
        keep (Tensor, optional): (B, ), in single precision.
        kept (Tensor, optional): What takes the gradient of x times ``keep``.
        response (tuple[Tensor, Tensor, Tensor, Tensor], optional): What makes
            ``coef``: few parts of both sums that a product leaves, gamma and
            norms, see :func:`mmoverlock.ops.pointwise.triton.product`.

    Returns:
        tuple[Tensor, Tensor]: Gradient of x, and partial sums for
        :func:`partial_sums.add`, (parts, 10 or 11, C): the gradients of the
        taps, of the bias, and the sum of the gradient of x.
    """
    grad_x = torch.empty_like(x)
    form = KNOBS['backward']
    slots = partial_sums.programs(x.device, form.resident)
    cut = plan(tuple(x.shape), form, slots)
    lanes, rows, strips, blocks, splits = cut
    batch, channels, height, width = x.shape
    splits = min(cdiv(batch * strips, lanes[0]), splits)
    sums = 10 + sum_grad_x
    partial = x.new_empty(splits, sums, channels, dtype=torch.float32)
    parts, *others = response or (None, None, None, None)
    shares = 1 if parts is None else others[0].shape[1]
    _backward_kernel[(splits * blocks,)](
        grad,
        x,
        None if parts is coef is None else y,
        scale,
        coef,
        parts,
        *others,
        weight,
        keep,
        grad_x,
        kept,
        partial,
        channels,
        height,
        width,
        rows,
        batch * strips,
        splits,
        shares,
        GELU=gelu,
        RESIDUAL=residual,
        SUMS=sums,
        PARTS=0 if parts is None else parts.shape[1],
        SHARES=next_power_of_2(shares),
        COLUMNS=form.columns,
        LANES=lanes,
        num_warps=form.warps,
        maxnreg=form.registers,
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
    weight, bias = contiguous(weight, bias)
    y, sums = forward(x, weight, bias, gelu, residual, squares)
    if sums is None:
        return y, x.new_empty(0, dtype=torch.float32)
    return y, sums.sum(1)


@_residual_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: bool,
    squares: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(
        channels_last(x), weight, bias, gelu, residual, squares
    )


def _empty_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gelu: bool,
    residual: bool,
    squares: bool,
) -> tuple[Tensor, Tensor]:
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
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    coef: Tensor | None,
    gelu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(channels_last(x)),
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight)),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.gelu, ctx.residual, squares = inputs
    ctx.save_for_backward(x, weight, output[0] if squares else None)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_squares: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, y = saved_tensors(ctx)
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
