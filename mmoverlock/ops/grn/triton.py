"""Kernels for maps in channels_last.

With P positions and g the gradient of the result::

    n = |x| over an image,  m = mean of n over channels + eps
    s = gamma n / m + 1,  out = x s + beta
    ds = sum of g x,  dr = ds gamma
    dn = (dr - sum over channels of dr n / (m C)) / m
    grad of x = g s + x dn / n

A map is read for its sums and read again for the result, in either
direction. One program an image makes what is (B, C) of those sums, and the
sums themselves where there are few positions, which saves a launch. The
feed-forward network, whose convolution and products leave partial sums
behind, has this part in common.
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

EPS = tl.constexpr(1e-6)
SIZES = ('positions', 'count', 'splits')
KNOBS = dict(
    few=256,  # positions that one program an image adds up by itself
    values=8192,  # of a map that it has at a time
    warps=8,
)


@jit(do_not_specialize=SIZES)
def _sum_kernel(
    p_x,
    p_grad,
    p_sums,
    positions,
    splits,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parts of sums over an image.

    x (B, P, C); sums (B, splits, C) of its squares or, with grad (B, P, C),
    (B, splits, 2 C) of grad x and of grad; grid (B splits blocks of C, ).
    """
    part, o_channel, m_channel = tiles.place(channels, BLOCK)
    length = tl.cdiv(positions, splits)
    first = part % splits * length
    rows = tl.minimum(length, positions - first)
    o_x = ((part // splits).to(tl.int64) * positions + first) * channels
    p_x += o_x
    if p_grad is None:
        b_sum = tiles.sum_rows(
            p_x, p_x, None, rows, channels, o_channel, m_channel, ROWS
        )
        o_sum = part.to(tl.int64) * channels + o_channel
    else:
        p_grad += o_x
        b_sum = tiles.sum_rows(
            p_grad, p_x, None, rows, channels, o_channel, m_channel, ROWS
        )
        o_sum = part.to(tl.int64) * 2 * channels + o_channel
        b_shift = tiles.sum_rows(
            p_grad, None, None, rows, channels, o_channel, m_channel, ROWS
        )
        tl.store(p_sums + channels + o_sum, b_shift, mask=m_channel)
    tl.store(p_sums + o_sum, b_sum, mask=m_channel)


@triton.jit
def store_scales(
    p_squares,
    p_gamma,
    p_norm,
    p_scale,
    image,
    parts,
    channels,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The share of an image in :func:`_scale_kernel`."""
    p_image = p_squares + image * parts * channels
    p_factor = p_image if SQUARE else None
    o_channel = tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    b_norm = tl.sqrt(
        tiles.sum_rows(
            p_image,
            p_factor,
            None,
            parts,
            channels,
            o_channel,
            m_channel,
            ROWS,
        )
    )
    mean = tl.sum(b_norm, 0) / channels + EPS
    b_gamma = tiles.load(p_gamma, o_channel, m_channel)
    b_scale = b_gamma * b_norm / mean + 1
    o_out = image * channels + o_channel
    tl.store(p_norm + o_out, b_norm, mask=m_channel)
    tl.store(p_scale + o_out, b_scale, mask=m_channel)


@jit(do_not_specialize=('parts',))
def _scale_kernel(
    p_squares,
    p_gamma,
    p_norm,
    p_scale,
    parts,
    channels,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Norms and scales (B, C) from parts of squares; grid (B, ).

    squares (B, parts, C), which are those of a map if SQUARE.
    """
    store_scales(
        p_squares,
        p_gamma,
        p_norm,
        p_scale,
        tl.program_id(0).to(tl.int64),
        parts,
        channels,
        SQUARE,
        ROWS,
        CHANNELS,
    )


@jit(do_not_specialize=('parts',))
def _scale_grad_kernel(
    p_sums,
    p_x,
    p_gamma,
    p_norm,
    p_coef,
    p_parts,
    parts,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The norm's share of the gradient of x, ``x coef``; grid (B, ).

    sums (B, parts, 2 C) of the gradients ds of the scale and dt of the shift;
    with x (B, parts, C), they are made of it and of the gradient of the
    result, in place of sums. norm and coef (B, C); parts (B, 2, C) of the
    gradients of gamma and beta.
    """
    image = tl.program_id(0).to(tl.int64)
    o_channel = tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    if p_x is None:
        step = 2 * channels
        p_image = p_sums + image * parts * step
        ds = tiles.sum_rows(
            p_image, None, None, parts, step, o_channel, m_channel, ROWS
        )
        p_image += channels
    else:
        step = channels
        p_image = p_sums + image * parts * step
        p_x += image * parts * step
        ds = tiles.sum_rows(
            p_image, p_x, None, parts, step, o_channel, m_channel, ROWS
        )
    dt = tiles.sum_rows(
        p_image, None, None, parts, step, o_channel, m_channel, ROWS
    )
    o_out = image * channels + o_channel
    b_norm = tl.load(p_norm + o_out, mask=m_channel, other=0)
    mean = tl.sum(b_norm, 0) / channels + EPS
    dr = ds * tiles.load(p_gamma, o_channel, m_channel)
    dn = (dr - tl.sum(dr * b_norm, 0) / (mean * channels)) / mean
    # No infinite gradient where a map is zero.
    b_coef = tl.where(b_norm > 0, dn / b_norm, 0.0)
    tl.store(p_coef + o_out, b_coef, mask=m_channel)
    p_part = p_parts + image * 2 * channels + o_channel
    tl.store(p_part, ds * b_norm / mean, mask=m_channel)
    tl.store(p_part + channels, dt, mask=m_channel)


@jit(do_not_specialize=SIZES)
def _apply_kernel(
    p_x,
    p_scale,
    p_other,
    p_coef,
    p_shift,
    p_out,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = x scale[image] + other coef[image] + shift``.

    x, other and out (B, P, C), scale and coef (B, C), shift (C, ); what is
    None is not added; grid (B count blocks of C, ), ``count`` an image.
    """
    image, o_channel, m_channel, o_x, m_x = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    o_image = image * channels + o_channel
    b_out = tiles.load(p_x, o_x, m_x)
    b_out *= tiles.load(p_scale, o_image, m_channel)[None]
    if p_other is not None:
        b_coef = tiles.load(p_coef, o_image, m_channel)[None]
        b_out = tl.fma(tiles.load(p_other, o_x, m_x), b_coef, b_out)
    if p_shift is not None:
        b_out += tiles.load(p_shift, o_channel, m_channel)[None]
    tiles.store(p_out, o_x, b_out, m_x)


def _sums(x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Parts of sums over images, or the maps where there are few positions.

    Returns:
        tuple[Tensor, Tensor | None, int]: What is summed; its other factor;
        how many.
    """
    batch, channels, height, width = x.shape
    positions = height * width
    if positions <= KNOBS['few']:
        return (x, None, positions) if grad is None else (grad, x, positions)
    rows, block = tiles.form(channels)
    blocks = cdiv(channels, block)
    slots = partial_sums.programs(x.device, tiles.KNOBS['resident'])
    splits = min(cdiv(positions, rows), cdiv(slots, batch * blocks))
    # No part is empty.
    splits = cdiv(positions, cdiv(positions, splits))
    size = channels if grad is None else 2 * channels
    sums = x.new_empty(batch, splits, size, dtype=torch.float32)
    _sum_kernel[(batch * splits * blocks,)](
        x,
        grad,
        sums,
        positions,
        splits,
        channels,
        ROWS=rows,
        BLOCK=block,
        num_warps=tiles.KNOBS['warps'],
    )
    return sums, None, splits


def _whole(channels: int) -> dict[str, int]:
    """The settings of a program that has all channels of an image."""
    block = next_power_of_2(channels)
    return dict(
        ROWS=max(1, KNOBS['values'] // block),
        CHANNELS=block,
        num_warps=KNOBS['warps'],
    )


def scales(
    squares: Tensor, gamma: Tensor, channels: int, parts: int, square: bool
) -> tuple[Tensor, Tensor]:
    """Norms and scales, (B, C), in one launch.

    Args:
        squares (Tensor): B x parts x C values, parts of sums of squares.
        gamma (Tensor): C values.
        channels (int): C.
        parts (int): Of an image.
        square (bool): Whether ``squares`` are values, yet to be squared.
    """
    norm, scale = (
        squares.new_empty(len(squares), channels, dtype=torch.float32)
        for _ in range(2)
    )
    _scale_kernel[(len(squares),)](
        squares,
        gamma,
        norm,
        scale,
        parts,
        channels,
        SQUARE=square,
        **_whole(channels),
    )
    return norm, scale


def scale_grads(
    sums: Tensor, x: Tensor | None, gamma: Tensor, norm: Tensor, parts: int
) -> tuple[Tensor, Tensor]:
    """The norm's share of the gradient of the map, in one launch.

    Args:
        sums (Tensor): B x parts x 2 C values, of the gradients of scale and
            shift; or the gradient of the result, (B, C, H, W).
        x (Tensor, optional): The map, in the latter case.
        gamma (Tensor): C values.
        norm (Tensor): (B, C).
        parts (int): Of an image.

    Returns:
        tuple[Tensor, Tensor]: What the map is to be scaled by, (B, C), and
        parts (B, 2, C) of the gradients of gamma and beta.
    """
    batch, channels = norm.shape
    coef = torch.empty_like(norm)
    partial = norm.new_empty(batch, 2, channels)
    _scale_grad_kernel[(batch,)](
        sums,
        x,
        gamma,
        norm,
        coef,
        partial,
        parts,
        channels,
        **_whole(channels),
    )
    return coef, partial


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches, and one more where there are many positions.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        gamma, beta (Tensor): C values each, contiguous, of any dtype.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The result, norms and scales, (B, C).
    """
    y = torch.empty_like(x)
    sums, _, parts = _sums(x, None)
    norm, scale = scales(sums, gamma, x.shape[1], parts, sums is x)
    tiles.launch(_apply_kernel, x, x, scale, None, None, beta, y)
    return y, norm, scale


def backward(
    grad: Tensor, x: Tensor, gamma: Tensor, norm: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`forward`.

    Returns:
        tuple[Tensor, Tensor]: The gradient of x, and partial sums for
        :func:`partial_sums.add`, (B, 2, C), of gamma and beta.
    """
    grad_x = torch.empty_like(x)
    sums, other, parts = _sums(x, grad)
    coef, partial = scale_grads(sums, other, gamma, norm, parts)
    tiles.launch(_apply_kernel, x, grad, scale, x, coef, None, grad_x)
    return grad_x, partial


@custom_op('mmoverlock::response_norm')
def _response_norm(
    x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`forward`."""
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return _empty_outputs(x, gamma, beta)
    return forward(x, gamma.contiguous(), beta.contiguous())


@_response_norm.register_fake
def _empty_outputs(
    x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    norm, scale = (
        x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2)
    )
    return torch.empty_like(channels_last(x)), norm, scale


@custom_op('mmoverlock::response_norm_backward', differentiable=False)
def _response_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, norm: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta, the latter in the dtype of gamma."""
    x, gamma = channels_last(x), gamma.contiguous()
    grad_gamma, grad_beta = (torch.empty_like(gamma) for _ in range(2))
    if not x.numel():
        return torch.empty_like(x), grad_gamma.zero_(), grad_beta.zero_()
    grad_x, partial = backward(channels_last(grad), x, gamma, norm, scale)
    partial_sums.add((partial, grad_gamma, grad_beta))
    return grad_x, grad_gamma, grad_beta


@_response_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gamma: Tensor, norm: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gamma = gamma.contiguous()
    return (
        torch.empty_like(channels_last(x)),
        torch.empty_like(gamma),
        torch.empty_like(gamma),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gamma, beta = inputs
    ctx.save_for_backward(x, gamma, *output[1:])
    ctx.beta_dtype = beta.dtype
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, *_
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    grad_x, grad_gamma, grad_beta = _response_norm_backward(
        grad, *saved_tensors(ctx)
    )
    return grad_x, grad_gamma, grad_beta.to(ctx.beta_dtype)


_response_norm.register_autograd(_differentiate, setup_context=_save)


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """See :func:`mmoverlock.ops.response_norm`."""
    return _response_norm(channels_last(x), gamma, beta)[0]
