"""Kernels for maps in channels_last, whose rows are the positions.

A program takes a few rows at a time, whole, in registers. Nothing but the map
is kept for the backward pass: it reads the map anyway, and makes mean and
deviation from it again, bit for bit, where reading them would add bytes. The
gradients of weight and bias come out of the same pass, as partial sums. So
4 bytes a value move forward and 6 backward, in bfloat16.

A result is written in NCHW where it is asked for, and a gradient that is in
NCHW is read as it is, without copies. Programs then have more rows, which are
what is side by side in memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..common import (
    cdiv,
    channels_last,
    custom_op,
    next_power_of_2,
    saved_tensors,
)
from ..launching import jit

KNOBS = dict(
    values=16,  # of a thread, at least
    warps=4,
    resident=4,  # programs that a multiprocessor has registers for
    rows=32,  # at least, for every program that ends in partial sums
    nchw_rows=16,  # at least, of maps in NCHW: 32 bytes in 16 bits
)


@triton.jit
def normalize(b_x, m_x, channels, eps):
    """Normalized rows (ROWS, C) and their reciprocal deviations (ROWS, 1)."""
    mean = tl.sum(b_x, 1)[:, None] / channels
    b_x = tl.where(m_x, b_x - mean, 0)
    rstd = tl.rsqrt(tl.sum(b_x * b_x, 1)[:, None] / channels + eps)
    return b_x * rstd, rstd


@triton.jit
def _locate_in_nchw(
    first,
    count,
    channels,
    positions,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets and mask (BLOCK, ROWS) of rows in a map (B, C, positions).

    The mask is that of images: of as many positions as 16 divides, all 16 are
    in one, so that threads load and store several at once.
    """
    o_row = first + tl.arange(0, ROWS)[None]
    o_channel = tl.arange(0, BLOCK)[:, None]
    image = o_row // positions
    o_x = (image.to(tl.int64) * channels + o_channel) * positions
    m_x = (image < count // positions) & (o_channel < channels)
    return o_x + o_row % positions, m_x


@jit(do_not_specialize=('count',))
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    count,
    channels,
    positions,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``y = (x - mean) rstd weight + bias``, ``rstd = (var + eps)^-1/2``.

    x and y (count, C), weight and bias (C, ); grid (tiles of ROWS, ). If there
    are ``positions`` of an image, y is (B, C, positions).
    """
    first = tl.program_id(0) * ROWS
    o_row = first + tl.arange(0, ROWS)[:, None]
    o_channel = tl.arange(0, BLOCK)[None]
    m_channel = o_channel < channels
    m_x = (o_row < count) & m_channel
    o_x = o_row.to(tl.int64) * channels + o_channel
    b_x = tiles.load(p_x, o_x, m_x)
    b_weight = tiles.load(p_weight, o_channel, m_channel)
    b_bias = tiles.load(p_bias, o_channel, m_channel)
    b_x, _ = normalize(b_x, m_channel, channels, eps)
    b_y = tl.fma(b_x, b_weight, b_bias)
    if positions is None:
        tiles.store(p_y, o_x, b_y, m_x)
    else:
        o_y, m_y = _locate_in_nchw(
            first, count, channels, positions, ROWS, BLOCK
        )
        tiles.store(p_y, o_y, tl.trans(b_y), m_y)


@triton.jit
def _load_unpooled(
    p_grad,
    o_row,
    m_x,
    o_channel,
    channels,
    height,
    width,
    REGIONS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The gradient (ROWS, BLOCK) of means over regions, which may overlap.

    Region i of S an axis begins at floor(i H / S) and ends before ceil((i + 1)
    H / S); DOWN and ACROSS at most meet in a row and in a column. grad (B,
    REGIONS^2, C), of the channels that are not negative; rows (ROWS, 1).
    """
    image = (o_row // (height * width)).to(tl.int64)
    y = o_row // width % height
    x = o_row % width
    m_grad = m_x & (o_channel >= 0)
    acc = tl.zeros(m_x.shape, tl.float32)
    for down in tl.static_range(DOWN):
        i = y * REGIONS // height + down
        rows = tl.cdiv((i + 1) * height, REGIONS) - i * height // REGIONS
        for across in tl.static_range(ACROSS):
            j = x * REGIONS // width + across
            columns = tl.cdiv((j + 1) * width, REGIONS) - j * width // REGIONS
            met = (i <= ((y + 1) * REGIONS - 1) // height) & (
                j <= ((x + 1) * REGIONS - 1) // width
            )
            region = (image * REGIONS + i) * REGIONS + j
            o_grad = region * channels + o_channel
            acc += tiles.load(p_grad, o_grad, m_grad & met) / (rows * columns)
    return acc


@jit(do_not_specialize=('count', 'height', 'width'))
def _backward_kernel(
    p_grad,
    p_x,
    p_weight,
    p_other,
    p_gain,
    p_pooled,
    p_grad_x,
    p_parts,
    count,
    channels,
    positions,
    eps,
    unpooled,
    height,
    width,
    REGIONS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients, with z the normalized x and ``dz = grad weight``::

        grad_x = rstd (dz - mean(dz) - z mean(dz z)) + other gain

    grad, x, grad_x and, if there is one, other (count, C); parts (programs,
    2, C) of the gradients of weight, the sum over positions of ``grad z``, and
    of bias, that of ``grad``; with a gain (C, ), (programs, 4, C), also those
    of ``other x`` and ``other``; grid (programs, ). If there is ``pooled``,
    all but the first ``unpooled`` channels of grad are added to what
    :func:`_load_unpooled` makes of it. If there are ``positions`` of an image,
    grad is (B, C, positions).
    """
    program = tl.program_id(0)
    o_channel = tl.arange(0, BLOCK)[None]
    m_channel = o_channel < channels
    b_weight = tiles.load(p_weight, o_channel, m_channel)
    b_grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    b_grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    if p_gain is not None:
        b_gain = tiles.load(p_gain, o_channel, m_channel)
        b_grad_gain = tl.zeros((ROWS, BLOCK), tl.float32)
        b_grad_offset = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, count, tl.num_programs(0) * ROWS):
        o_row = first + tl.arange(0, ROWS)[:, None]
        m_x = (o_row < count) & m_channel
        o_x = o_row.to(tl.int64) * channels + o_channel
        if positions is None:
            b_x = tiles.load(p_x, o_x, m_x)
            b_grad = tiles.load(p_grad, o_x, m_x)
        else:  # Triton lays sums out as what is loaded last, here x
            o_grad, m_grad = _locate_in_nchw(
                first, count, channels, positions, ROWS, BLOCK
            )
            b_grad = tl.trans(tiles.load(p_grad, o_grad, m_grad))
            b_x = tiles.load(p_x, o_x, m_x)
        if p_pooled is not None:
            b_grad += _load_unpooled(
                p_pooled,
                o_row,
                m_x,
                o_channel - unpooled,
                channels - unpooled,
                height,
                width,
                REGIONS,
                DOWN,
                ACROSS,
            )
        b_z, rstd = normalize(b_x, m_channel, channels, eps)
        b_grad_weight = tl.fma(b_grad, b_z, b_grad_weight)
        b_grad_bias += b_grad
        b_dz = b_grad * b_weight
        mean = tl.sum(b_dz, 1)[:, None] / channels
        slope = tl.sum(b_dz * b_z, 1)[:, None] / channels
        b_grad_x = rstd * (b_dz - mean - b_z * slope)
        if p_other is not None:
            b_other = tiles.load(p_other, o_x, m_x)
            if p_gain is not None:
                b_grad_gain = tl.fma(b_other, b_x, b_grad_gain)
                b_grad_offset += b_other
                b_other *= b_gain
            b_grad_x += b_other
        tiles.store(p_grad_x, o_x, b_grad_x, m_x)
    o_channel = tl.arange(0, BLOCK)
    SUMS: tl.constexpr = 2 if p_gain is None else 4
    p_parts += program.to(tl.int64) * SUMS * channels + o_channel
    m_channel = o_channel < channels
    tl.store(p_parts, tl.sum(b_grad_weight, 0), mask=m_channel)
    p_parts += channels
    tl.store(p_parts, tl.sum(b_grad_bias, 0), mask=m_channel)
    if p_gain is not None:
        p_parts += channels
        tl.store(p_parts, tl.sum(b_grad_gain, 0), mask=m_channel)
        p_parts += channels
        tl.store(p_parts, tl.sum(b_grad_offset, 0), mask=m_channel)


def _form(channels: int, is_nchw: bool, most: int) -> tuple[int, int, int]:
    """Rows, channels and warps (at most so many, in NCHW) of a program."""
    block, warps = next_power_of_2(channels), KNOBS['warps']
    rows = max(1, 32 * warps * KNOBS['values'] // block)
    times = max(1, min(KNOBS['nchw_rows'] // rows, most // warps) * is_nchw)
    return rows * times, block, warps * times


def _empty(x: Tensor, contiguous: bool) -> Tensor:
    """A result of a map in channels_last."""
    layout = torch.contiguous_format if contiguous else torch.preserve_format
    return torch.empty_like(x, memory_format=layout)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    contiguous: bool = False,
) -> Tensor:
    """One launch.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight, bias (Tensor): (C, ), contiguous, of any dtype.
        eps (float): Added to the variance.
        contiguous (bool): Whether the result is in NCHW. Defaults to False.
    """
    y = _empty(x, contiguous)
    _, channels, height, width = x.shape
    count = x.numel() // channels
    rows, block, warps = _form(channels, contiguous, 32)
    _forward_kernel[(cdiv(count, rows),)](
        x,
        weight,
        bias,
        y,
        count,
        channels,
        height * width if contiguous else None,
        eps,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    other: Tensor | None = None,
    gain: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch; arguments as in :func:`forward`.

    Args:
        grad (Tensor): (B, C, H, W), in channels_last or NCHW.
        other (Tensor, optional): (B, C, H, W), in channels_last: another
            gradient of x, which is added.
        gain (Tensor, optional): C values, contiguous: the scale of x where
            ``other`` is the gradient of x scaled and shifted.
        pooled (Tensor, optional): (B, P, S, S), in channels_last: another
            gradient, of the adaptive average of the last channels of y.

    Returns:
        tuple[Tensor, Tensor]: Gradient of x, and partial sums for
        :func:`partial_sums.add`, (parts, 2 or 4, C): of weight and bias, of
        gain and the shift beside it.
    """
    grad_x = torch.empty_like(x)
    _, channels, height, width = x.shape
    count = x.numel() // channels
    regions = unpooled = 0
    if pooled is not None:
        regions, unpooled = pooled.shape[2], channels - pooled.shape[1]
    is_nchw = not grad.is_contiguous(memory_format=torch.channels_last)
    rows, block, warps = _form(channels, is_nchw, 16)
    resident = KNOBS['resident'] * KNOBS['warps'] // warps
    parts = min(
        cdiv(count, max(rows, KNOBS['rows'])),
        partial_sums.programs(x.device, resident),
    )
    sums = 2 if gain is None else 4
    partial = x.new_empty(parts, sums, channels, dtype=torch.float32)
    _backward_kernel[(parts,)](
        grad,
        x,
        weight,
        other,
        gain,
        pooled,
        grad_x,
        partial,
        count,
        channels,
        height * width if is_nchw else None,
        eps,
        unpooled,
        height,
        width,
        REGIONS=regions,
        DOWN=regions // height + 2,
        ACROSS=regions // width + 2,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps * (1 if gain is None else 2),
    )
    return grad_x, partial


@custom_op('mmoverlock::layer_norm')
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, contiguous: bool
) -> Tensor:
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return _empty(x, contiguous)
    return forward(x, weight.contiguous(), bias.contiguous(), eps, contiguous)


@_layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, contiguous: bool
) -> Tensor:
    return _empty(channels_last(x), contiguous)


@custom_op('mmoverlock::layer_norm_backward', differentiable=False)
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    if not x.numel():
        zeros = torch.zeros_like(weight)
        return torch.empty_like(x), zeros, zeros.clone()
    x, weight = channels_last(x), weight.contiguous()
    if not grad.is_contiguous():
        grad = channels_last(grad)
    grad_x, partial = backward(grad, x, weight, eps)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    partial_sums.add((partial, grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias


@_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(channels_last(x)),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = saved_tensors(ctx)
    grad_x, grad_weight, grad_bias = _layer_norm_backward(
        grad, x, weight, ctx.eps
    )
    return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None, None


_layer_norm.register_autograd(_differentiate, setup_context=_save)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    contiguous: bool = False,
) -> Tensor:
    """See :func:`mmoverlock.ops.layer_norm`."""
    return _layer_norm(channels_last(x), weight, bias, eps, contiguous)
