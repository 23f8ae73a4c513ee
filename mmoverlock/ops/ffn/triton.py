"""The feed-forward network of a block, for GPUs.

With H positions, D hidden channels, g the gradient of the result::

    h = W1 x + b1
    y = f + conv(f) + b,  f = gelu(h)
    n = |y| over an image,  r = n / (mean of n over channels + eps)
    out = k (W2 (y s + beta) + b2) + identity w + b3,  s = gamma r + 1

Forward, the hidden map is written twice and read twice: ``h`` by the first
product, ``y`` and its sums of squares by the convolution, and the second
product scales what it loads, by what it makes of these sums where they are
few. Backward it is kept as ``y`` and as ``h``, which is made again where a
product takes no longer than writing it. The gradient of ``y s + beta`` is
written once by a product that also sums it and its product with ``y``, which
is all that the norm needs, and the convolution's gradient turns it into that
of ``y`` while loading, by what it makes of these sums where they are few.
Products without a scale are those of PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from .. import partial_sums
from ..common import (
    channels_last,
    custom_op,
    saved_tensors,
)
from ..conv3x3 import triton as conv
from ..grn import triton as response_norm
from ..pointwise import product_weight_grad, round_parameters, rows, to_map
from ..pointwise.triton import WeightGrad, product, weight_grads
from ..residual import triton as scaled_residual

KNOBS = dict(
    # Channels of x, at most, where h is made again: that product is bound by
    # memory.
    repeated=160,
    # Partial sums, at most, that every program reads, in place of a launch
    # that adds them. The product reads those of squares: 16 bytes a channel,
    # beside 256 or 384 of the map and the weight; there are 1 or 2 in
    # classification, 15 to 60 in detection. The convolution reads those of
    # gradients: 12 to 24 bytes a channel of an image, beside 290 to 1180 of
    # maps; there are 1 at 7 x 7, 4 at 14 x 14.
    parts=4,
)


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
    identity: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    keep: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result; h, y, the norms and the scales; what was rounded.

    That is both weights and the first bias. They are empty if they are what
    they were, and so is h if it will be made again.
    """
    x = channels_last(x)
    if not x.numel():
        return _empty_outputs(x, weight1, weight2, bias1, identity)
    rounded = round_parameters(x.dtype, weight1, weight2, bias1)
    h = _expand(x, rounded[0], rounded[2])
    y, squares = conv.forward(
        h, conv_weight, conv_bias, gelu=True, residual=residual, squares=True
    )
    batch, parts, channels = squares.shape
    response = None
    if parts > KNOBS['parts']:
        norm, scale = response_norm.scales(squares, gamma)
    else:
        norm, scale = response_norm.empty_norms(squares, channels)
        response = squares, gamma, norm
    out, _ = product(
        y,
        rounded[1],
        bias2,
        scale,
        beta,
        keep=keep,
        identity=None if identity is None else channels_last(identity),
        gain=gain,
        offset=offset,
        response=response,
    )
    if x.shape[1] <= KNOBS['repeated']:
        h = x.new_empty(0)
    if x.dtype == weight1.dtype:
        rounded = [x.new_empty(0) for _ in rounded]
    return out, h, y, norm, scale, *rounded


def _expand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return to_map(torch.addmm(bias, rows(x), weight.flatten(1).mT), x)


def _empty_outputs(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor,
    identity: Tensor | None,
) -> tuple[Tensor, ...]:
    batch, _, height, width = x.shape
    dtypes = x.dtype if identity is None else identity.dtype, x.dtype, x.dtype
    out, h, y = (
        x.new_empty(batch, height, width, channels, dtype=dtype)
        for channels, dtype in zip(
            (len(weight2), len(weight1), len(weight1)), dtypes, strict=True
        )
    )
    norm, scale = response_norm.empty_norms(x, len(weight1))
    same = x.dtype == weight1.dtype
    rounded = (
        x.new_empty(0) if same else torch.empty_like(weight, dtype=x.dtype)
        for weight in (weight1, weight2, bias1)
    )
    out, h, y = (t.permute(0, 3, 1, 2) for t in (out, h, y))
    if x.shape[1] <= KNOBS['repeated']:
        h = x.new_empty(0)
    return out, h, y, norm, scale, *rounded


@feed_forward.register_fake
def _(
    x: Tensor, weight1: Tensor, bias1: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, weight1, args[4], bias1, args[6])


@custom_op('mmoverlock::feed_forward_backward', differentiable=False)
def _feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    y: Tensor,
    norm: Tensor,
    scale: Tensor,
    rounded1: Tensor,
    rounded2: Tensor,
    rounded_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    identity: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    keep: Tensor | None,
    residual: bool,
) -> list[Tensor]:
    """Gradients of the first nine arguments of :func:`feed_forward`.

    With a gain, those of identity, gain and, if there is one, offset follow;
    without one, that of an identity is ``grad``.
    """
    if beta is None:
        raise NotImplementedError('a fused model has no gradients')
    parameters = [
        weight1,
        bias1,
        conv_weight,
        conv_bias,
        gamma,
        beta,
        weight2,
        bias2,
    ]
    others = _scaled(identity, gain, offset)
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters, *others)]
    x, grad = channels_last(x), channels_last(grad)
    grads = [torch.empty_like(t) for t in parameters[1:]]
    grad_bias1, grad_conv_weight, grad_conv_bias, grad_gamma, grad_beta = (
        grads[:5]
    )
    jobs, grad_others = [], []
    if others:
        grad_identity, _, parts = scaled_residual.backward(
            grad, channels_last(identity), grad.dtype, gain
        )
        grad_others = [torch.empty_like(t) for t in others[1:]]
        jobs.append((parts, *grad_others))
        grad_others.insert(0, grad_identity)
    grad = grad.to(x.dtype)
    if not rounded1.numel():
        rounded1, rounded2, rounded_bias = weight1, weight2, bias1
    if not h.numel():
        h = _expand(x, rounded1, rounded_bias)
    grad_scaled, sums = product(
        grad, rounded2, transposed=True, factor=(y, gamma, norm), keep=keep
    )
    parts, _ = sums
    coef, response = None, (*sums, gamma, norm)
    # In single precision, the convolution has no registers for these.
    if parts.shape[1] > KNOBS['parts'] or x.element_size() > 2:
        coef, parts = response_norm.scale_grads(parts, gamma, norm)
        response = None
    parts = parts.view(-1, 2, norm.shape[2])
    jobs.append((parts, grad_gamma, grad_beta))
    second = WeightGrad(grads[5:], rows(grad), rows(y), scale, beta, keep)
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
        response=response,
    )
    jobs.append((parts, grad_conv_weight, grad_conv_bias, grad_bias1))
    partial_sums.add(*jobs, make=weight_grads, operands=[second])
    grad_x = to_map(rows(grad_h) @ rounded1.flatten(1), x)
    grad_weight1 = product_weight_grad(grad_h, x, weight1)
    return [grad_x, grad_weight1, *grads, *grad_others]


def _scaled(
    identity: Tensor | None, gain: Tensor | None, offset: Tensor | None
) -> list[Tensor]:
    """The operands of the sum that get gradients of their own."""
    if gain is None:
        return []
    return [t for t in (identity, gain, offset) if t is not None]


@_feed_forward_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    y: Tensor,
    norm: Tensor,
    scale: Tensor,
    rounded1: Tensor,
    rounded2: Tensor,
    rounded_bias: Tensor,
    *args,
) -> list[Tensor]:
    *parameters, identity, gain, offset, _, _ = args
    tensors = channels_last(x), *parameters
    if gain is not None:
        identity = channels_last(identity)
    tensors += tuple(_scaled(identity, gain, offset))
    return [torch.empty_like(tensor) for tensor in tensors]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *parameters, identity, gain, offset, keep, ctx.residual = inputs
    ctx.set_materialize_grads(False)
    ctx.has_identity = identity is not None
    ctx.save_for_backward(
        x,
        *output[1:],
        *parameters,
        None if gain is None else identity,
        gain,
        offset,
        keep,
    )


def _differentiate(
    ctx: Any, grad: Tensor | None, *_
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    grads = _feed_forward_backward(grad, *saved_tensors(ctx), ctx.residual)
    others = [*grads[9:], None, None, None][:3]
    if ctx.has_identity and others[0] is None:
        others[0] = grad
    return *grads[:9], *others, None, None


feed_forward.register_autograd(_differentiate, setup_context=_save)
