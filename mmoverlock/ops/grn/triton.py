"""Kernels for maps in channels_last.

With P positions and g the gradient of the result::

    n = |x| over an image,  m = mean of n over channels + eps,  r = n / m
    s = gamma r + 1,  out = x s + beta
    ds = sum of g x,  grad of gamma = ds r, over images
    dn = (gamma ds - mean over channels of gamma ds r) / m
    grad of x = g s + x dn / n

What is kept of norms, (B, 2, C), is r and 1 / (m n), or 0 where n is.

A map is read for its sums and read again for the result, in either
direction. One program an image makes what is (B, C) of those sums. Where there
are few positions, it does all, in one launch, and reads what caches still
have. The feed-forward network, whose convolution and products leave partial
sums behind, has the part between in common.
"""

from collections.abc import Callable
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
    few=256,  # positions, at most, of which one program an image does all
    values=8192,  # of a map that it has at a time
    warps=8,
)


@jit(do_not_specialize=SIZES)
def _sum_kernel(
    p_x,
    p_grad,
    p_norm,
    p_sums,
    positions,
    splits,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parts of sums over an image.

    x (B, P, C); sums (B, splits, C) of its squares or, with grad (B, P, C) and
    norm (B, 2, C), (B, splits, 2, C) of the gradients of gamma and beta; grid
    (B splits blocks of C, ).
    """
    part, o_channel, m_channel = tiles.place(channels, BLOCK)
    length = tl.cdiv(positions, splits)
    first = part % splits * length
    rows = tl.minimum(length, positions - first)
    image = (part // splits).to(tl.int64)
    o_x = (image * positions + first) * channels
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
        p_ratio = p_norm + image * 2 * channels + o_channel
        b_sum *= tl.load(p_ratio, mask=m_channel, other=0)
    tl.store(p_sums + o_sum, b_sum, mask=m_channel)


@triton.jit
def _apply(p_x, b_scale, p_other, b_coef, b_shift, p_out, o_x, m_x):
    """``out = x scale + other coef + shift``; what is None is not added."""
    b_out = tiles.load(p_x, o_x, m_x) * b_scale[None]
    if p_other is not None:
        b_out = tl.fma(tiles.load(p_other, o_x, m_x), b_coef[None], b_out)
    if b_shift is not None:
        b_out += b_shift[None]
    tiles.store(p_out, o_x, b_out, m_x)


@triton.jit
def store_scales(
    p_squares,
    p_gamma,
    p_norm,
    p_scale,
    image,
    is_first,
    parts,
    channels,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The share of an image in :func:`_scale_kernel`: its scale (C, ).

    If SQUARE, squares (B, parts, C) are yet to be squared. The first program
    of an image stores the norms.
    """
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
    b_ratio = b_norm / mean
    b_scale = tiles.load(p_gamma, o_channel, m_channel) * b_ratio + 1
    if is_first:
        # No infinite gradient where a map is zero.
        b_inverse = tl.where(b_norm > 0, 1 / (mean * b_norm), 0.0)
        p_own = p_norm + image * 2 * channels + o_channel
        tl.store(p_own, b_ratio, mask=m_channel)
        tl.store(p_own + channels, b_inverse, mask=m_channel)
    tl.store(p_scale + image * channels + o_channel, b_scale, mask=m_channel)
    return b_scale


@jit(do_not_specialize=('parts',))
def _scale_kernel(
    p_squares,
    p_gamma,
    p_norm,
    p_scale,
    parts,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Norms (B, 2, C), scales (B, C) of squares (B, parts, C); grid (B, )."""
    store_scales(
        p_squares,
        p_gamma,
        p_norm,
        p_scale,
        tl.program_id(0).to(tl.int64),
        True,
        parts,
        channels,
        False,
        ROWS,
        CHANNELS,
    )


@jit(do_not_specialize=('positions',))
def _forward_kernel(
    p_x,
    p_gamma,
    p_beta,
    p_norm,
    p_scale,
    p_out,
    positions,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """All of an image: x and out (B, P, C); grid (B, ).

    gamma and beta (C, ), norm (B, 2, C), scale (B, C).
    """
    image = tl.program_id(0).to(tl.int64)
    b_scale = store_scales(
        p_x,
        p_gamma,
        p_norm,
        p_scale,
        image,
        True,
        positions,
        channels,
        True,
        ROWS,
        CHANNELS,
    )
    o_channel = tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    b_shift = tiles.load(p_beta, o_channel, m_channel)
    o_image = image * positions * channels
    p_x += o_image
    p_out += o_image
    for first in range(0, positions, ROWS):
        o_x, m_x = tiles.rows(
            first, positions, channels, o_channel, m_channel, ROWS
        )
        _apply(p_x, b_scale, None, None, b_shift, p_out, o_x, m_x)


@triton.jit
def make_coefs(
    b_grad, share, p_gamma, p_norm, image, channels, o_channel, m_channel
):
    """``dn / n`` of an image, from its part ``ds r`` of the gradient of gamma.

    share is the sum over channels of gamma times that.
    """
    p_own = p_norm + image * 2 * channels + o_channel
    b_ratio = tl.load(p_own, mask=m_channel, other=0)
    b_inverse = tl.load(p_own + channels, mask=m_channel, other=0)
    ds = tl.where(b_ratio > 0, b_grad / b_ratio, 0.0)
    b_gamma = tiles.load(p_gamma, o_channel, m_channel)
    return (b_gamma * ds - share / channels) * b_inverse


@triton.jit
def _store_grads(
    b_grad, dt, p_gamma, p_norm, p_parts, image, channels, o_channel, m_channel
):
    """Store parts (B, 2, C) of the gradients of gamma and beta, of an image.

    Returns:
        Tensor: See :func:`make_coefs`.
    """
    p_part = p_parts + image * 2 * channels + o_channel
    tl.store(p_part, b_grad, mask=m_channel)
    tl.store(p_part + channels, dt, mask=m_channel)
    share = tl.sum(b_grad * tiles.load(p_gamma, o_channel, m_channel), 0)
    return make_coefs(
        b_grad, share, p_gamma, p_norm, image, channels, o_channel, m_channel
    )


@jit(do_not_specialize=('parts',))
def _scale_grad_kernel(
    p_sums,
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

    sums (B, parts, 2, C) and parts (B, 2, C) of the gradients of gamma and
    beta; norm (B, 2, C), coef (B, C).
    """
    image = tl.program_id(0).to(tl.int64)
    o_channel = tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    step = 2 * channels
    p_image = p_sums + image * parts * step
    b_grad = tiles.sum_rows(
        p_image, None, None, parts, step, o_channel, m_channel, ROWS
    )
    p_image += channels
    dt = tiles.sum_rows(
        p_image, None, None, parts, step, o_channel, m_channel, ROWS
    )
    b_coef = _store_grads(
        b_grad,
        dt,
        p_gamma,
        p_norm,
        p_parts,
        image,
        channels,
        o_channel,
        m_channel,
    )
    tl.store(p_coef + image * channels + o_channel, b_coef, mask=m_channel)


@jit(do_not_specialize=('positions',))
def _backward_kernel(
    p_x,
    p_grad,
    p_gamma,
    p_norm,
    p_scale,
    p_grad_x,
    p_parts,
    positions,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """All of an image: x, grad and grad_x (B, P, C); grid (B, ).

    norm (B, 2, C), scale (B, C); parts (B, 2, C) of the gradients of gamma and
    beta.
    """
    image = tl.program_id(0).to(tl.int64)
    o_channel = tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    o_image = image * positions * channels
    p_grad += o_image
    p_x += o_image
    p_grad_x += o_image
    ds = tl.zeros((ROWS, CHANNELS), tl.float32)
    dt = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, positions, ROWS):
        o_x, m_x = tiles.rows(
            first, positions, channels, o_channel, m_channel, ROWS
        )
        b_grad = tiles.load(p_grad, o_x, m_x)
        ds += b_grad * tiles.load(p_x, o_x, m_x)
        dt += b_grad
    o_out = image * channels + o_channel
    p_ratio = p_norm + image * channels + o_out
    b_grad = tl.sum(ds, 0) * tl.load(p_ratio, mask=m_channel, other=0)
    b_coef = _store_grads(
        b_grad,
        tl.sum(dt, 0),
        p_gamma,
        p_norm,
        p_parts,
        image,
        channels,
        o_channel,
        m_channel,
    )
    b_scale = tl.load(p_scale + o_out, mask=m_channel, other=0)
    for first in range(0, positions, ROWS):
        o_x, m_x = tiles.rows(
            first, positions, channels, o_channel, m_channel, ROWS
        )
        _apply(p_grad, b_scale, p_x, b_coef, None, p_grad_x, o_x, m_x)


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
    """:func:`_apply` to tiles.

    x, other and out (B, P, C), scale and coef (B, C), shift (C, ); grid (B
    count blocks of C, ), ``count`` an image.
    """
    image, o_channel, m_channel, o_x, m_x = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    o_image = image * channels + o_channel
    b_scale = tiles.load(p_scale, o_image, m_channel)
    b_coef = None
    b_shift = None
    if p_other is not None:
        b_coef = tiles.load(p_coef, o_image, m_channel)
    if p_shift is not None:
        b_shift = tiles.load(p_shift, o_channel, m_channel)
    _apply(p_x, b_scale, p_other, b_coef, b_shift, p_out, o_x, m_x)


def _sums(
    x: Tensor, grad: Tensor | None = None, norm: Tensor | None = None
) -> Tensor:
    """Parts of what :func:`_sum_kernel` sums."""
    batch, channels, height, width = x.shape
    positions = height * width
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
        norm,
        sums,
        positions,
        splits,
        channels,
        ROWS=rows,
        BLOCK=block,
        num_warps=tiles.KNOBS['warps'],
    )
    return sums


def _is_small(x: Tensor) -> bool:
    """Whether one program an image does all."""
    return x[0, 0].numel() <= KNOBS['few']


def _whole(channels: int, wide: bool = False) -> dict[str, int]:
    """The settings of a program that has all channels of an image.

    Of maps in single precision, which are wide, it has half as many rows.
    """
    block = next_power_of_2(channels)
    return dict(
        ROWS=max(1, KNOBS['values'] // block // (1 + wide)),
        CHANNELS=block,
        num_warps=KNOBS['warps'],
    )


def _launch(kernel: Callable, x: Tensor, *args) -> None:
    """Launch a kernel of which a program does all of an image of x."""
    batch, channels, height, width = x.shape
    form = _whole(channels, x.element_size() > 2)
    kernel[(batch,)](x, *args, height * width, channels, **form)


def empty_norms(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Memory of norms (B, 2, C) and scales (B, C)."""
    options = dict(dtype=torch.float32)
    return (
        x.new_empty(x.shape[0], 2, channels, **options),
        x.new_empty(x.shape[0], channels, **options),
    )


def scales(squares: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (B, 2, C) and scales (B, C), in one launch.

    Args:
        squares (Tensor): (B, parts, C), parts of sums of squares.
        gamma (Tensor): C values.
    """
    batch, parts, channels = squares.shape
    norm, scale = empty_norms(squares, channels)
    _scale_kernel[(batch,)](
        squares, gamma, norm, scale, parts, channels, **_whole(channels)
    )
    return norm, scale


def scale_grads(
    sums: Tensor, gamma: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The norm's share of the gradient of the map, in one launch.

    Args:
        sums (Tensor): (B, parts, 2 C), of the gradients of gamma and beta.
        gamma (Tensor): C values.
        norm (Tensor): (B, 2, C).

    Returns:
        tuple[Tensor, Tensor]: What the map is to be scaled by, (B, C), and
        parts (B, 2, C) of the gradients of gamma and beta.
    """
    batch, _, channels = norm.shape
    coef, partial = norm.new_empty(batch, channels), torch.empty_like(norm)
    _scale_grad_kernel[(batch,)](
        sums,
        gamma,
        norm,
        coef,
        partial,
        sums.shape[1],
        channels,
        **_whole(channels),
    )
    return coef, partial


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, and three where there are many positions.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        gamma, beta (Tensor): C values each, contiguous, of any dtype.
        y (Tensor, optional): Memory of the result, like x.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The result, norms (B, 2, C) and scales
        (B, C).
    """
    y = torch.empty_like(x) if y is None else y
    if not _is_small(x):
        norm, scale = scales(_sums(x), gamma)
        tiles.launch(_apply_kernel, x, x, scale, None, None, beta, y)
        return y, norm, scale
    norm, scale = empty_norms(x, x.shape[1])
    _launch(_forward_kernel, x, gamma, beta, norm, scale, y)
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
    if not _is_small(x):
        coef, partial = scale_grads(_sums(x, grad, norm), gamma, norm)
        tiles.launch(_apply_kernel, x, grad, scale, x, coef, None, grad_x)
        return grad_x, partial
    partial = torch.empty_like(norm)
    _launch(_backward_kernel, x, grad, gamma, norm, scale, grad_x, partial)
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
    return torch.empty_like(channels_last(x)), *empty_norms(x, x.shape[1])


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
