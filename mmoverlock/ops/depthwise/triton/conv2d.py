"""A large depthwise convolution, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...common import (
    contiguous,
    custom_op,
    saved_tensors,
)
from ...launching import jit
from ...partial_sums import add
from . import banded
from .common import (
    SIZES,
    autocast,
    channels_of,
    convolve,
    layout_of,
    tile_of,
    zeros,
)
from .tap_grads import tap_grads


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
    BRANCHES: tl.constexpr,
    FLIP: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum of the convolutions of maps, one for each branch.

    ``out[n] = bias + other[n] + sum over b and tap of taps[b, tap] x[b, n +
    tap]``, what is None left out

    x (branches, B, H, W, C), taps (all taps, C), bias (C, ), other and out (B,
    H, W, C); grid (tiles, blocks of channels).
    """
    row, col, o_row = tile_of(
        tl.program_id(0), height, width, channels, T, COLUMNS
    )
    channel, m_channel = channels_of(tl.program_id(1), channels, CHANNELS)
    o_branch = tl.cast(images, tl.int64) * height * width * channels
    acc = zeros(T, (COLUMNS, CHANNELS))
    for b in tl.static_range(len(BRANCHES)):
        acc = convolve(
            acc,
            p_x + b * o_branch + o_row,
            p_taps + BRANCHES[b][2] * channels,
            height,
            width,
            channel,
            m_channel,
            row,
            col,
            channels,
            BRANCHES[b][0],
            BRANCHES[b][1],
            FLIP,
            T,
        )
    o_tile = o_row + col * channels + channel
    m_out = m_channel & (col < width)
    b_bias = 0.0
    if p_bias is not None:
        b_bias = tl.load(p_bias + channel, mask=m_channel, other=0)
        b_bias = b_bias.to(tl.float32)
    for t in tl.static_range(T):
        m_row = m_out & (row + t < height)
        o_out = o_tile + t * width * channels
        b_out = acc[t] + b_bias
        if p_other is not None:
            b_out += tl.load(p_other + o_out, mask=m_row, other=0)
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_row)


def convolve_maps(
    x: Tensor,
    taps: Tensor,
    branches: tuple,
    bias: Tensor | None = None,
    flip: bool = False,
    other: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum over branches of maps, each convolved with its taps.

    Args:
        x (Tensor): (branches, B, C, H, W), each map in channels_last.
        taps (Tensor): (all taps, C), in the dtype of x.
        branches (tuple): Size, dilation and first tap of each.
        bias (Tensor, optional): (C, ).
        flip (bool): Whether the taps of each come in reversed order, which
            makes it the gradient of a convolution. Defaults to False.
        other (Tensor, optional): (B, C, H, W) in channels_last, which is
            added.
        dtype (torch.dtype, optional): Of the result. Defaults to that of x.

    Returns:
        Tensor: (B, C, H, W) in channels_last.
    """
    out = torch.empty_like(x[0], dtype=dtype)
    if out.numel() and banded.takes(x, branches[0]):
        if len(branches) > 1:
            rest = x[1:], taps, branches[1:], None, flip, other
            other = convolve_maps(*rest, dtype=torch.float32)
        size, _, first = branches[0]
        taps = taps[first : first + size**2]
        banded.convolve_map(x[0], out, taps, size, bias, flip, other)
    elif out.numel():
        layout = layout_of(out.shape)
        _conv2d_kernel[layout.tiles, layout.blocks](
            x,
            taps,
            bias,
            other,
            out,
            *out.shape[1:],
            len(out),
            BRANCHES=branches,
            FLIP=flip,
            **layout.constants,
        )
    return out


def convolve_merged(
    x: Tensor, taps: Tensor, merged: Sequence[Tensor]
) -> Tensor:
    """A map (B, C, H, W) in channels_last, convolved as by merged branches.

    Args:
        x (Tensor): The map.
        taps (Tensor): (k^2, C), in its dtype, of the weight.
        merged (Sequence[Tensor]): Weight (C, 1, k, k) and bias (C, ).
    """
    weight, bias = merged
    return convolve_maps(x[None], taps, ((weight.shape[-1], 1, 0),), bias)


@custom_op('mmoverlock::depthwise_conv2d')
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> Tensor:
    return convolve_maps(x[None], *_taps(weight, dilation, x.dtype), bias)


def _taps(
    weight: Tensor, dilation: int, dtype: torch.dtype
) -> tuple[Tensor, tuple]:
    """Taps (k^2, C), which may be how they are stored, and their branch."""
    taps = weight.flatten(1).mT.to(dtype).contiguous()
    return taps, ((weight.shape[-1], dilation, 0),)


@_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return torch.empty_like(x)


@custom_op('mmoverlock::depthwise_conv2d_backward', differentiable=False)
def _conv2d_grads(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty unless the two are needed."""
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_bias = weight.new_empty(0)
    if needed[0]:
        taps, branches = _taps(weight, dilation, x.dtype)
        grad_x = convolve_maps(grad[None], taps, branches, None, flip=True)
    if needed[1]:
        branches = ((weight.shape[-1], dilation, 0),)
        grad_weight = torch.empty_like(weight)
        grad_bias = weight.new_empty(len(weight))
        parts = tap_grads(x, grad[None], branches, with_sum=True)
        add((parts, grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias


@_conv2d_grads.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if needed[0] else x.new_empty(0),
        weight.new_empty(weight.shape if needed[1] else 0),
        weight.new_empty(len(weight) if needed[1] else 0),
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = saved_tensors(ctx)
    grad = grad.contiguous(memory_format=torch.channels_last)
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad[-4:]
    grads = _conv2d_grads(
        grad, x, weight, ctx.dilation, [of_x, of_weight or of_bias]
    )
    return (
        grads[0] if of_x else None,
        grads[1] if of_weight else None,
        grads[2].to(ctx.bias_dtype) if of_bias else None,
        None,
    )


_conv2d.register_autograd(_backward, setup_context=_setup)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """See :func:`mmoverlock.ops.depthwise_conv2d`."""
    return _conv2d(autocast(x), *contiguous(weight, bias), dilation)
