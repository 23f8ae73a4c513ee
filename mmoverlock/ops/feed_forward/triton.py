"""The feed-forward network of a block, for GPUs.

With H positions, D hidden channels, g the gradient of the result::

    h = W1 x + b1
    y = f + conv(f) + b,  f = gelu(h)
    n = |y| over an image,  r = n / (mean of n over channels + eps)
    out = W2 (y s + beta) + b2,  s = gamma r + 1

Forward, the hidden map is written twice and read twice: ``h`` by the first
product, ``y`` and its sums of squares by the convolution, and the second
product scales what it loads. Backward it is kept as ``h`` and ``y``; the
gradient of ``y s + beta`` is written once by a product that also sums it and
its product with ``y``, which is all that the norm needs, and the convolution's
gradient turns it into that of ``y`` while loading. Products without a scale
are those of PyTorch.
"""

import torch
from torch import Tensor

from .. import partial_sums
from ..common import channels_last, custom_op
from ..pointwise.triton import product, weight_grad
from ..residual_conv import triton as conv
from ..response_norm import triton as response_norm


def _rows(x):
    """(B, C, H, W) in channels_last as (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _map(rows, like):
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _rounded(dtype, *parameters):
    """Parameters in the dtype of a map, in one launch."""
    if all(parameter.dtype == dtype for parameter in parameters):
        return parameters
    rounded = [torch.empty_like(p, dtype=dtype) for p in parameters]
    torch._foreach_copy_(rounded, parameters)
    return rounded


def _weight_grad(grad, x, weight):
    """Gradient of a weight (O, I, 1, 1) of a product without a scale."""
    grad, x = _rows(grad).mT, _rows(x)
    if grad.is_cuda and weight.dtype == torch.float32 != grad.dtype:
        out = torch.mm(grad, x, out_dtype=torch.float32)
    else:
        out = torch.mm(grad.to(weight.dtype), x.to(weight.dtype))
    return out.view(weight.shape)


@custom_op('mmoverlock::feed_forward')
def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and h, y, the norms and the scales for the gradient."""
    x = channels_last(x)
    if not x.numel():
        return _empty_outputs(x, weight1, weight2)
    weight1, bias1, weight2 = _rounded(x.dtype, weight1, bias1, weight2)
    h = torch.addmm(bias1, _rows(x), weight1.flatten(1).mT)
    h = _map(h, x)
    y, squares = conv.forward(
        h, conv_weight, conv_bias, gelu=True, residual=residual, squares=True
    )
    with torch.cuda.device_of(x):
        norm, scale = response_norm.scales(
            squares, gamma, y.shape[1], squares.shape[1], square=False
        )
    out, _ = product(y, weight2, bias2, scale, beta)
    return out, h, y, norm, scale


def _empty_outputs(x, weight1, weight2):
    batch, _, height, width = x.shape
    out, h, y = (
        x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
        for channels in (len(weight2), len(weight1), len(weight1))
    )
    norm, scale = (
        x.new_empty(batch, len(weight1), dtype=torch.float32) for _ in range(2)
    )
    return out, h, y, norm, scale


@feed_forward.register_fake
def _(
    x,
    weight1,
    bias1,
    conv_weight,
    conv_bias,
    gamma,
    beta,
    weight2,
    bias2,
    residual,
):
    return _empty_outputs(x, weight1, weight2)


@custom_op('mmoverlock::feed_forward_backward', differentiable=False)
def _feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    y: Tensor,
    norm: Tensor,
    scale: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> list[Tensor]:
    """Gradients of the first nine arguments of :func:`feed_forward`."""
    if beta is None:
        raise NotImplementedError('a fused model has no gradients')
    parameters = (
        weight1,
        bias1,
        conv_weight,
        conv_bias,
        gamma,
        beta,
        weight2,
        bias2,
    )
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters)]
    x, grad = channels_last(x), channels_last(grad)
    rounded1, rounded2 = _rounded(x.dtype, weight1, weight2)
    grad_scaled, sums = product(grad, rounded2, transposed=True, factor=y)
    grads = [torch.empty_like(t) for t in parameters[1:6]]
    grad_bias1, grad_conv_weight, grad_conv_bias, grad_gamma, grad_beta = grads
    with torch.cuda.device_of(x):
        coef, parts = response_norm.scale_grads(
            sums, None, gamma, norm, sums.shape[1]
        )
    partial_sums.add((parts, grad_gamma, grad_beta))
    grad_weight2, grad_bias2 = weight_grad(
        grad, y, weight2, bias2, scale, beta
    )
    grad_h, parts = conv.backward(
        grad_scaled,
        h,
        conv_weight,
        y,
        scale,
        coef,
        gelu=True,
        residual=residual,
        sum_grad_x=True,
    )
    partial_sums.add((parts, grad_conv_weight, grad_conv_bias, grad_bias1))
    grad_x = _map(_rows(grad_h) @ rounded1.flatten(1), x)
    grad_weight1 = _weight_grad(grad_h, x, weight1)
    return [grad_x, grad_weight1, *grads, grad_weight2, grad_bias2]


@_feed_forward_backward.register_fake
def _(grad, x, h, y, norm, scale, *parameters_and_residual):
    return [
        torch.empty_like(channels_last(x)),
        *map(torch.empty_like, parameters_and_residual[:-1]),
    ]


def _save(ctx, inputs, output):
    x, *parameters, ctx.residual = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], *parameters)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    grads = _feed_forward_backward(grad, *ctx.saved_tensors, ctx.residual)
    return *grads, None


feed_forward.register_autograd(_differentiate, setup_context=_save)
