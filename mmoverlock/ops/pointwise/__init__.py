"""Products of the channels of every pixel with a matrix, in plain PyTorch.

As one node of autograd, for GPUs: the weights come rounded, those of many
products in one launch, and gradients of weights are in single precision at
once.
"""

from typing import Any

import torch
from torch import Tensor

from ..common import cast_as_convolutions, channels_last, custom_op


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last as (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def to_map(values: Tensor, like: Tensor) -> Tensor:
    """The opposite of :func:`rows`, with the size of another map."""
    batch, _, height, width = like.shape
    return values.view(batch, height, width, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def round_parameters(dtype: torch.dtype, *parameters: Tensor) -> list[Tensor]:
    """Parameters in the dtype of a map, in one launch; without gradients."""
    if all(parameter.dtype == dtype for parameter in parameters):
        return [parameter.detach() for parameter in parameters]
    rounded = [torch.empty_like(p, dtype=dtype) for p in parameters]
    torch._foreach_copy_(rounded, parameters)
    return rounded


def product_weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a weight (O, I, 1, 1) of a product of maps."""
    grad, x = rows(grad).mT, rows(x)
    if grad.is_cuda and weight.dtype == torch.float32 != grad.dtype:
        out = torch.mm(grad, x, out_dtype=torch.float32)
    else:
        out = torch.mm(grad.to(weight.dtype), x.to(weight.dtype))
    return out.view(weight.shape)


@custom_op('mmoverlock::pointwise_conv')
def _pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: Tensor,
    rounded_bias: Tensor | None,
) -> Tensor:
    factors = rows(x), rounded.flatten(1).mT
    if rounded_bias is None:
        return to_map(torch.mm(*factors), x)
    return to_map(torch.addmm(rounded_bias, *factors), x)


@_pointwise_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: Tensor,
    rounded_bias: Tensor | None,
) -> Tensor:
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height, width, weight.shape[0])
    return out.permute(0, 3, 1, 2)


@custom_op('mmoverlock::pointwise_conv_backward', differentiable=False)
def _pointwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: Tensor,
) -> list[Tensor]:
    """Gradients of x, weight and, if there is one, bias."""
    grad = channels_last(grad)
    grads = [
        to_map(rows(grad) @ rounded.flatten(1), x),
        product_weight_grad(grad, x, weight),
    ]
    if bias is not None:
        grads.append(rows(grad).sum(0, dtype=bias.dtype))
    return grads


@_pointwise_conv_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: Tensor,
) -> list[Tensor]:
    batch, channels, height, width = x.shape
    grad_x = x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    grads = [grad_x, weight.new_empty(weight.shape)]
    if bias is not None:
        grads.append(torch.empty_like(bias))
    return grads


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _pointwise_conv_backward(grad, *ctx.saved_tensors)
    return *[*grads, None][:3], None, None


_pointwise_conv.register_autograd(_differentiate, setup_context=_save)


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounded: Tensor,
    rounded_bias: Tensor | None,
) -> Tensor:
    """A 1x1 convolution whose weights have been rounded before.

    Args:
        x (Tensor): (B, C, H, W), best with its channels next to each other;
            it is cast as autocast does.
        weight (Tensor): (C', C, 1, 1), which gets the gradient.
        bias (Tensor, optional): (C', ), which gets the gradient.
        rounded, rounded_bias: The same in the dtype that x is cast to, see
            :func:`round_parameters`.

    Returns:
        Tensor: (B, C', H, W), in channels_last.
    """
    x = cast_as_convolutions(x)
    return _pointwise_conv(x, weight, bias, rounded, rounded_bias)


__all__ = ['pointwise_conv', 'round_parameters']
