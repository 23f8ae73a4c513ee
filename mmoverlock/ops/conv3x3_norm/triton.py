"""The kernels of the convolution and the norm, with one backward pass.

The norm's gradient of y is added to the one that comes from elsewhere while it
is made, and one launch adds the partial sums of all four gradients.
"""

from typing import Any

import torch
from torch import Tensor

from .. import partial_sums
from ..common import (
    channels_last,
    contiguous,
    custom_op,
    saved_tensors,
)
from ..conv3x3 import triton as conv
from ..layernorm import triton as norm


@custom_op('mmoverlock::conv_norm')
def _conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return torch.empty_like(x), torch.empty_like(x)
    weight, bias = contiguous(weight, bias)
    y, _ = conv.forward(x, weight, bias, residual=residual)
    return y, norm.forward(y, scale.contiguous(), shift.contiguous(), eps)


@_conv_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    return torch.empty_like(x), torch.empty_like(x)


@custom_op('mmoverlock::conv_norm_backward', differentiable=False)
def _conv_norm_backward(
    grad_y: Tensor | None,
    grad_z: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias if there is one, scale and shift."""
    x = channels_last(x)
    parameters = [t for t in (weight, bias, scale, shift) if t is not None]
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters)]
    grads = [torch.empty_like(t) for t in parameters]
    grad_bias = None if bias is None else grads[1]
    if grad_y is not None:
        grad_y = channels_last(grad_y)
    grad, norm_parts = norm.backward(
        channels_last(grad_z), y, scale.contiguous(), eps, grad_y
    )
    grad_x, parts = conv.backward(
        grad, x, weight.contiguous(), residual=residual
    )
    partial_sums.add((parts, grads[0], grad_bias), (norm_parts, *grads[-2:]))
    return [grad_x, *grads]


@_conv_norm_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_z: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> list[Tensor]:
    tensors = channels_last(x), weight, bias, scale, shift
    return [torch.empty_like(t) for t in tensors if t is not None]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps, ctx.residual = inputs
    ctx.save_for_backward(tensors[0], output[0], *tensors[1:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_z is None:
        return (None,) * 7
    x, y, weight, bias, *_ = saved_tensors(ctx)
    if grad_z is None:
        grad_z = torch.zeros_like(y)
    grads = _conv_norm_backward(
        grad_y, grad_z, *saved_tensors(ctx), ctx.eps, ctx.residual
    )
    if bias is None:
        grads.insert(2, None)
    return *grads, None, None


_conv_norm.register_autograd(_differentiate, setup_context=_save)


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmoverlock.ops.conv_norm`."""
    x = channels_last(x)
    return _conv_norm(x, weight, bias, scale, shift, eps, residual)
