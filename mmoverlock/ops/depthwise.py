"""Depthwise convolution, with the gradients that PyTorch is slow at on CPUs.

There, the weight gradient of a large kernel takes ten times as long as the
convolution itself, and so does anything with a dilated kernel of more than
3 x 3 taps. Other devices run PyTorch's own convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """Depthwise convolution with stride 1 that keeps the size of the map.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, k, k), k odd.
        bias (Tensor, optional): (C, ).
        dilation (int): Distance between the taps. Defaults to 1.

    Returns:
        Tensor: (B, C, H, W).
    """
    if x.device.type == 'cpu' and (weight.shape[-1] > 3 or dilation > 1):
        return _DepthwiseConv2d.apply(x, weight, bias, dilation)
    return _conv2d(x, weight, bias, dilation)


def _conv2d(x, weight, bias, dilation):
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(x, weight, bias, 1, padding, dilation, len(weight))


def _conv2d_as_dense(x, weight, bias, dilation):
    """Run a dilated kernel as an undilated one with zeros between taps."""
    size = weight.shape[-1]
    if dilation > 1 and size > 3:
        size = (size - 1) * dilation + 1
        dense = weight.new_zeros(len(weight), 1, size, size)
        dense[..., ::dilation, ::dilation] = weight
        weight, dilation = dense, 1
    return _conv2d(x, weight, bias, dilation)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _conv2d_as_dense(x, weight, bias, dilation)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)  # another one under autocast
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            flipped = weight.flip(2, 3)
            grad_x = _conv2d_as_dense(grad, flipped, None, ctx.dilation)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(x, grad, weight.shape[-1], ctx.dilation)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _weight_grad(x: Tensor, grad: Tensor, size: int, dilation: int) -> Tensor:
    """Gradient of the weight: the input convolved with the gradient.

    The sum over positions of ``grad[n] * x[n + dilation * tap]`` is, over
    taps, a convolution of x whose kernel is the gradient map, one for each
    image and channel, and whose stride is the dilation.
    """
    batch, channels, height, width = x.shape
    pad = size // 2 * dilation
    x = F.pad(x, (pad, pad, pad, pad))
    x = x.reshape(1, batch * channels, *x.shape[2:])
    kernels = grad.reshape(batch * channels, 1, height, width)
    taps = F.conv2d(x, kernels, stride=dilation, groups=batch * channels)
    return taps.view(batch, channels, 1, size, size).sum(0)
