"""Kernels for maps in channels_last, whose rows are the positions.

A program takes a few rows at a time, whole, in registers. Nothing but the map
is kept for the backward pass: it reads the map anyway, and makes mean and
deviation from it again, bit for bit, where reading them would add bytes. The
gradients of weight and bias come out of the same pass, as partial sums. So
4 bytes a value move forward and 6 backward, in bfloat16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums
from ..common import cdiv, channels_last, custom_op, next_power_of_2

VALUES = 16  # of a thread, at least
WARPS = 4
RESIDENT = 4  # programs that a multiprocessor has registers for
ROWS = 32  # at least, for every program that ends in partial sums


@triton.jit
def _normalize(x, real, channels, eps):
    """Normalized rows and their reciprocal deviations."""
    mean = tl.sum(x, 1)[:, None] / channels
    x = tl.where(real, x - mean, 0)
    rstd = tl.rsqrt(tl.sum(x * x, 1)[:, None] / channels + eps)
    return x * rstd, rstd


@triton.jit(do_not_specialize=('count',))
def _forward_kernel(
    x,
    weight,
    bias,
    y,
    count,
    channels,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = channel < channels
    real = (row < count) & inside
    at = row.to(tl.int64) * channels + channel
    value = tl.load(x + at, mask=real, other=0).to(tl.float32)
    scale = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    value, _ = _normalize(value, inside, channels, eps)
    value = tl.fma(value, scale, shift)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=('count',))
def _backward_kernel(
    grad,
    x,
    weight,
    other,
    grad_x,
    partial,
    count,
    channels,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``partial`` is (programs, 2, C): gradients of weight and bias.

    ``other``, if there is one, is added to the gradient of x.
    """
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK)[None]
    inside = channel < channels
    scale = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    grad_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, count, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        real = (row < count) & inside
        at = row.to(tl.int64) * channels + channel
        value = tl.load(x + at, mask=real, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=real, other=0).to(tl.float32)
        value, rstd = _normalize(value, inside, channels, eps)
        grad_scale = tl.fma(g, value, grad_scale)
        grad_shift += g
        g *= scale
        mean = tl.sum(g, 1)[:, None] / channels
        slope = tl.sum(g * value, 1)[:, None] / channels
        g = rstd * (g - mean - value * slope)
        if other is not None:
            g += tl.load(other + at, mask=real, other=0).to(tl.float32)
        tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=real)
    channel = tl.arange(0, BLOCK)
    partial += program.to(tl.int64) * 2 * channels + channel
    inside = channel < channels
    tl.store(partial, tl.sum(grad_scale, 0), mask=inside)
    tl.store(partial + channels, tl.sum(grad_shift, 0), mask=inside)


def _form(channels):
    """Rows and channels of a program."""
    block = next_power_of_2(channels)
    return max(1, 32 * WARPS * VALUES // block), block


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """One launch.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight, bias (Tensor): (C, ), contiguous, of any dtype.
        eps (float): Added to the variance.
    """
    y = torch.empty_like(x)
    channels = x.shape[1]
    count = x.numel() // channels
    rows, block = _form(channels)
    with torch.cuda.device_of(x):
        _forward_kernel[(cdiv(count, rows),)](
            x,
            weight,
            bias,
            y,
            count,
            channels,
            eps,
            ROWS=rows,
            BLOCK=block,
            num_warps=WARPS,
        )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch; arguments as in :func:`forward`.

    Args:
        other (Tensor, optional): (B, C, H, W), in channels_last: another
            gradient of x, which is added.

    Returns:
        tuple[Tensor, Tensor]: Gradient of x, and partial sums for
        :func:`partial_sums.add`, (parts, 2, C): of weight and bias.
    """
    grad_x = torch.empty_like(x)
    channels = x.shape[1]
    count = x.numel() // channels
    rows, block = _form(channels)
    parts = min(
        cdiv(count, max(rows, ROWS)),
        partial_sums.programs(x.device, RESIDENT),
    )
    partial = x.new_empty(parts, 2, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(parts,)](
            grad,
            x,
            weight,
            other,
            grad_x,
            partial,
            count,
            channels,
            eps,
            ROWS=rows,
            BLOCK=block,
            num_warps=WARPS,
        )
    return grad_x, partial


@custom_op('mmoverlock::layer_norm')
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return torch.empty_like(x)
    return forward(x, weight.contiguous(), bias.contiguous(), eps)


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(channels_last(x))


@custom_op('mmoverlock::layer_norm_backward', differentiable=False)
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    if not x.numel():
        zeros = torch.zeros_like(weight)
        return torch.empty_like(x), zeros, zeros.clone()
    x, weight = channels_last(x), weight.contiguous()
    grad_x, partial = backward(channels_last(grad), x, weight, eps)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    partial_sums.add((partial, grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias


@_layer_norm_backward.register_fake
def _(grad, x, weight, eps):
    return (
        torch.empty_like(channels_last(x)),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _save(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _layer_norm_backward(
        grad, x, weight, ctx.eps
    )
    return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None


_layer_norm.register_autograd(_differentiate, setup_context=_save)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """See :func:`mmoverlock.ops.layer_norm`."""
    return _layer_norm(channels_last(x), weight, bias, eps)
