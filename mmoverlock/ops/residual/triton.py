"""Kernels for maps in channels_last: one pass forward, one backward.

6 bytes a value move forward and 4 to 8 backward, in bfloat16. Where nothing
scales x or y, its gradient is that of the sum, and nothing is written.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..common import (
    cdiv,
    channels_last,
    contiguous,
    custom_op,
    saved_tensors,
)
from ..launching import jit

SIZES = ('count', 'positions', 'splits')


@jit(do_not_specialize=SIZES)
def _forward_kernel(
    p_x,
    p_y,
    p_weight,
    p_bias,
    p_keep,
    p_out,
    count,
    positions,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = x weight + bias + y keep[image]``, without what is None.

    x, y and out (count, C), of which an image has ``positions``; weight and
    bias (C, ), keep (B, ); grid (tiles of ROWS blocks of C, ).
    """
    tile, o_channel, m_channel = tiles.place(channels, BLOCK)
    o_row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    m_row = o_row < count
    m_x = m_row & m_channel[None]
    o_x = o_row.to(tl.int64) * channels + o_channel[None]
    b_x = tiles.load(p_x, o_x, m_x)
    if p_weight is not None:
        b_x *= tiles.load(p_weight, o_channel, m_channel)[None]
    if p_bias is not None:
        b_x += tiles.load(p_bias, o_channel, m_channel)[None]
    b_y = tiles.load(p_y, o_x, m_x)
    if p_keep is not None:
        b_y *= tiles.load(p_keep, o_row // positions, m_row)
    tiles.store(p_out, o_x, b_x + b_y, m_x)


@jit(do_not_specialize=SIZES)
def _backward_kernel(
    p_grad,
    p_x,
    p_weight,
    p_keep,
    p_grad_x,
    p_grad_y,
    p_parts,
    count,
    positions,
    channels,
    splits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad_x = grad weight``, ``grad_y = grad keep[image]``, and sums.

    Each where there is its factor. grad, x, grad_x and grad_y (count, C);
    parts (splits, 2, C) of the gradients of weight, the sum over positions of
    ``grad x``, and of bias, that of ``grad``; grid (splits blocks of C, ).
    """
    split, o_channel, m_channel = tiles.place(channels, BLOCK)
    if p_weight is not None:
        b_weight = tiles.load(p_weight, o_channel, m_channel)[None]
        b_grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
        b_grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(split * ROWS, count, splits * ROWS):
        o_row = first + tl.arange(0, ROWS)[:, None]
        m_row = o_row < count
        m_x = m_row & m_channel[None]
        o_x = o_row.to(tl.int64) * channels + o_channel[None]
        b_grad = tiles.load(p_grad, o_x, m_x)
        if p_weight is not None:
            b_x = tiles.load(p_x, o_x, m_x)
            b_grad_weight = tl.fma(b_grad, b_x, b_grad_weight)
            b_grad_bias += b_grad
            tiles.store(p_grad_x, o_x, b_grad * b_weight, m_x)
        if p_keep is not None:
            b_grad *= tiles.load(p_keep, o_row // positions, m_row)
            tiles.store(p_grad_y, o_x, b_grad, m_x)
    if p_weight is not None:
        o_part = split.to(tl.int64) * 2 * channels + o_channel
        tl.store(p_parts + o_part, tl.sum(b_grad_weight, 0), mask=m_channel)
        p_parts += channels
        tl.store(p_parts + o_part, tl.sum(b_grad_bias, 0), mask=m_channel)


def forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """One launch.

    Args:
        x, y (Tensor): (B, C, H, W), in channels_last, not empty.
        weight, bias, keep (Tensor, optional): Contiguous, of any dtype.
    """
    out = torch.empty_like(x)
    channels = x.shape[1]
    count = x.numel() // channels
    rows, block = tiles.form(channels)
    grid = cdiv(count, rows) * cdiv(channels, block)
    _forward_kernel[(grid,)](
        x,
        y,
        weight,
        bias,
        keep,
        out,
        count,
        count // len(x),
        channels,
        ROWS=rows,
        BLOCK=block,
        num_warps=tiles.KNOBS['warps'],
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    y_dtype: torch.dtype,
    weight: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One launch; arguments as in :func:`forward`.

    Returns:
        tuple[Tensor | None, ...]: The gradient of x, where there is a weight;
        that of y, where there is ``keep``; and partial sums for
        :func:`partial_sums.add`, (parts, 2, C): of the weight and a bias.
    """
    grad_x = None if weight is None else torch.empty_like(x)
    grad_y = None if keep is None else torch.empty_like(x, dtype=y_dtype)
    channels = x.shape[1]
    count = x.numel() // channels
    rows, block = tiles.form(channels)
    blocks = cdiv(channels, block)
    slots = partial_sums.programs(x.device, tiles.KNOBS['resident'])
    splits = min(cdiv(count, rows), cdiv(slots, blocks))
    partial = None
    if weight is not None:
        partial = x.new_empty(splits, 2, channels, dtype=torch.float32)
    _backward_kernel[(splits * blocks,)](
        grad,
        x,
        weight,
        keep,
        grad_x,
        grad_y,
        partial,
        count,
        count // len(x),
        channels,
        splits,
        ROWS=rows,
        BLOCK=block,
        num_warps=tiles.KNOBS['warps'],
    )
    return grad_x, grad_y, partial


def _empty_gradients(
    x: Tensor,
    y_dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of x, weight, bias and y, each or None."""
    return (
        None if weight is None else torch.empty_like(x),
        None if weight is None else torch.empty_like(weight),
        None if bias is None else torch.empty_like(bias),
        None if keep is None else torch.empty_like(x, dtype=y_dtype),
    )


def _there(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@custom_op('mmoverlock::scaled_residual')
def _scaled_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return torch.empty_like(x)
    return forward(x, channels_last(y), *contiguous(weight, bias, keep))


@_scaled_residual.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    return torch.empty_like(channels_last(x))


@custom_op('mmoverlock::scaled_residual_backward', differentiable=False)
def _scaled_residual_backward(
    grad: Tensor,
    x: Tensor,
    y_dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, weight, bias and y, but for those that are None."""
    x = channels_last(x)
    weight, bias, keep = contiguous(weight, bias, keep)
    if not x.numel():
        gradients = _there(_empty_gradients(x, y_dtype, weight, bias, keep))
        return [gradient.zero_() for gradient in gradients]
    grad_x, grad_y, partial = backward(
        channels_last(grad), x, y_dtype, weight, keep
    )
    sums = [None if t is None else torch.empty_like(t) for t in (weight, bias)]
    if weight is not None:
        partial_sums.add((partial, *sums))
    return _there((grad_x, *sums, grad_y))


@_scaled_residual_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y_dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
) -> list[Tensor]:
    return _there(
        _empty_gradients(
            channels_last(x), y_dtype, *contiguous(weight, bias, keep)
        )
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, y, weight, bias, keep = inputs
    if weight is None:
        # Its shape is that of y and of the gradient.
        x = None
    ctx.save_for_backward(x, weight, bias, keep)
    ctx.y_dtype = y.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, keep = saved_tensors(ctx)
    gradients = iter(())
    if weight is not None or keep is not None:
        gradients = iter(
            _scaled_residual_backward(
                grad,
                grad if x is None else x,
                ctx.y_dtype,
                weight,
                bias,
                keep,
            )
        )
    grad_x, grad_weight, grad_bias, grad_y = (
        None if operand is None else next(gradients)
        for operand in (weight, weight, bias, keep)
    )
    if grad_x is None:
        grad_x = grad
    if grad_y is None:
        grad_y = grad.to(ctx.y_dtype)
    return grad_x, grad_y, grad_weight, grad_bias, None


_scaled_residual.register_autograd(_differentiate, setup_context=_save)


def scaled_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.scaled_residual`."""
    return _scaled_residual(
        channels_last(x), channels_last(y), weight, bias, keep
    )
