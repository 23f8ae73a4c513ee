"""Depthwise convolution, with what PyTorch is slow at on CPUs done otherwise.

There, it is fast on maps in ``torch.channels_last``, with three exceptions:
kernels of some widths, of some dilations, and the weight gradient of kernels
larger than 3 x 3. GPUs run the kernels of the folder triton, where these can
run, or PyTorch's convolution. The figures are in benchmarks/NOTES.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import check_backend, takes_triton
from ..common import custom_op
from ..environment import apply, hides_sizes, is_compiling, is_exporting

SLOW_WIDTHS = range(11, 15)  # slower than the width behind them
MAX_DILATED_SPAN = 12  # between the outer taps of a dilated kernel
MAX_PADDING, MAX_STRIDE = 6, 3  # of a convolution with a large kernel
BAND = 16  # rows that a weight gradient takes at a time from ...
LARGE = 64  # ... maps of at least so many rows


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    residual: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """Depthwise convolution with stride 1 that keeps the size of the map.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, k, k), k odd.
        bias (Tensor, optional): (C, ).
        dilation (int): Distance between the taps. Defaults to 1.
        residual (bool): Whether to add ``x``. Defaults to False.
        backend (str): See
            :func:`mmoverlock.ops.backends.check_backend`. Defaults to 'auto'.

    Returns:
        Tensor: (B, C, H, W).
    """
    check_backend(backend)
    if takes_triton(backend, x, _convolve, x, weight, bias, dilation):
        y = _convolve(x, weight, bias, dilation)
        return x + y if residual else y
    if residual:
        if x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
            return x + depthwise_conv2d(
                x, weight, bias, dilation, backend='reference'
            )
        weight = weight + _identity(weight)  # one pass less
    if x.device.type != 'cpu' or (weight.shape[-1] == 3 and dilation == 1):
        return _conv2d(x, weight, bias, dilation)
    tensors = _autocast(x, weight, bias)
    return apply(_DepthwiseConv2d, *tensors, dilation)


def _convolve(*operands) -> Tensor:
    from .triton import depthwise_conv2d as convolve

    return convolve(*operands)


class Branch(NamedTuple):
    """A convolution and a batch norm in training mode; C channels."""

    weight: Tensor  # (C, 1, k, k)
    scale: Tensor  # (C, ): of the batch norm, as all that follows
    shift: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor  # (): their number
    dilation: int
    momentum: float | None  # None for a cumulative average
    eps: float


def sum_of_branches(
    x: Tensor,
    branches: Sequence[Branch],
    backend: str = 'auto',
    group: 'torch.distributed.ProcessGroup | None' = None,
) -> Tensor:
    """Sum of batch-normalized depthwise convolutions of one map.

    The running statistics and the number of batches are updated in place. For
    the backward pass only the map is kept; the convolutions are computed
    again.

    Args:
        x (Tensor): (B, C, H, W).
        branches (Sequence[Branch]): The convolutions.
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`; plain
            PyTorch is for CPUs. Defaults to 'auto'.
        group (ProcessGroup, optional): Processes whose maps have statistics
            in common, as in :class:`torch.nn.SyncBatchNorm`; 'triton' only.
            Defaults to None, this process alone.

    Returns:
        Tensor: (B, C, H, W).

    Raises:
        ValueError: If there is a group and the backend is 'auto'.
    """
    check_backend(backend)
    if takes_triton(backend, x):
        return sum_by_kernels(x, branches, group)
    if group is not None:
        raise ValueError(
            'there are no statistics over several processes in plain PyTorch'
        )
    torch._foreach_add_([branch.batches for branch in branches], 1)
    x, *weights = _autocast(x, *(branch.weight for branch in branches))
    settings = [(b[3], b[4], *b[6:]) for b in branches]
    tensors = [
        tensor
        for weight, branch in zip(weights, branches, strict=True)
        for tensor in (weight, branch.scale, branch.shift)
    ]
    return apply(_SumOfBranches, x, settings, *tensors)


def sum_by_kernels(*operands) -> Tensor:
    """:func:`sum_of_branches` of the backend 'triton'."""
    from .triton import sum_of_branches as sum_up

    return sum_up(*operands)


def _autocast(*tensors) -> Sequence[Tensor | None]:
    """Cast as autocast does before an operator of PyTorch, on a CPU."""
    if not torch.is_autocast_enabled('cpu'):
        return tensors
    dtype = torch.get_autocast_dtype('cpu')
    return [None if t is None else t.to(dtype) for t in tensors]


def _identity(weight: Tensor) -> Tensor:
    """The kernel that changes nothing."""
    kernel = torch.zeros_like(weight[0, 0])
    kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1
    return kernel


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    if _never_returns(x, weight):
        operands = (t if t is None else t.float() for t in (x, weight, bias))
        with torch.autocast('cpu', enabled=False):
            return _conv2d(*operands, dilation).to(x.dtype)
    x = _with_strides(x)
    padding = [side // 2 * dilation for side in weight.shape[2:]]
    return F.conv2d(x, weight, bias, 1, padding, dilation, len(weight))


def _never_returns(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may convolve forever.

    It does so with 32 columns and more on some CPUs (torch 2.13, AVX-512).
    """
    return (
        x.device.type == 'cpu'
        and x.element_size() == 2
        and len(weight) <= 16
        and weight.shape[-1] >= 15
    )


def _with_strides(x: Tensor) -> Tensor:
    """The map itself, whose strides inductor keeps.

    What it makes of a view of one image has a stride of 0 in the batch, which
    PyTorch's convolution does not take for channels_last.
    """
    batch, channels, height, width = x.shape
    if (
        batch != 1
        or x.requires_grad
        or not is_compiling()
        or is_exporting()
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return x
    strides = x.numel(), 1, width * channels, channels
    return x.as_strided(x.shape, strides)


def _conv2d_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    size = weight.shape[-1]
    if dilation == 1 and size in SLOW_WIDTHS:
        more = (SLOW_WIDTHS.stop - size) // 2
        return _conv2d(x, F.pad(weight, (more, more)), bias)
    if dilation > 1 and (size - 1) * dilation > MAX_DILATED_SPAN:
        return _conv2d_by_phase(x, weight, bias, dilation)
    return _conv2d(x, weight, bias, dilation)


def _conv2d_by_phase(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
) -> Tensor:
    """The pixels that a dilated kernel sees together, as maps of their own."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % dilation, 0, -height % dilation))
    # (B, H, d, W, d, C), then (B * d * d, H, W, C)
    x = x.permute(0, 2, 3, 1).unflatten(2, (-1, dilation))
    x = x.unflatten(1, (-1, dilation)).permute(0, 2, 4, 1, 3, 5)
    phases = x.shape[:3]
    x = x.flatten(0, 2).permute(0, 3, 1, 2)
    x = _conv2d(x, weight, bias)
    x = x.permute(0, 2, 3, 1).unflatten(0, phases)
    x = x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width].permute(0, 3, 1, 2)


def _contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``; of large maps in channels_last, image by image.

    It is matrices that PyTorch transposes in blocks, which stay in the cache.
    """
    if is_compiling() or x.shape[2] < LARGE or x.is_contiguous():
        return x.contiguous()
    rows = x.new_empty(x.shape)
    for target, image in zip(rows.flatten(2), x.flatten(2), strict=True):
        target.copy_(image)
    return rows


def _input_grad(grad: Tensor, weight: Tensor, dilation: int) -> Tensor:
    # oneDNN's own is slower for a dilated kernel.
    return _conv2d_cpu(grad, weight.flip(2, 3), None, dilation)


def _weight_grad(x: Tensor, grad: Tensor, size: int, dilation: int) -> Tensor:
    """Gradient of the weight: the input convolved with the gradient.

    The sum over positions of ``grad[n] * x[n + dilation * tap]`` is, over
    taps, a convolution of x whose kernel is the gradient map, one for each
    image, channel and band of rows, and whose stride is the dilation.
    """
    if hides_sizes():
        return _weight_grad_of_any_size(x, grad, size, dilation)
    batch, channels, height, width = x.shape
    x, grad = _contiguous(x), _contiguous(grad)
    pad = size // 2 * dilation
    if height >= LARGE:
        missing = -height % BAND
        x = F.pad(x, (pad, pad, pad, pad + missing))
        x = x.unfold(2, BAND + 2 * pad, BAND).mT
        grad = F.pad(grad, (0, 0, 0, missing))
        height, pad = BAND, 0
    elif pad > MAX_PADDING or dilation > MAX_STRIDE:
        x, pad = F.pad(x, (pad, pad, pad, pad)), 0
    x = x.reshape(1, -1, *x.shape[-2:])
    grad = grad.view(-1, 1, height, width)
    taps = F.conv2d(x, grad, None, dilation, pad, groups=len(grad))
    return taps.view(batch, channels, -1, size, size).sum((0, 2))[:, None]


@custom_op('mmoverlock::depthwise_weight_grad', differentiable=False)
def _weight_grad_of_any_size(
    x: Tensor, grad: Tensor, size: int, dilation: int
) -> Tensor:
    """The weight gradient in graphs for maps of all sizes."""
    return _weight_grad(x, grad, size, dilation)


@_weight_grad_of_any_size.register_fake
def _(x: Tensor, grad: Tensor, size: int, dilation: int) -> Tensor:
    return grad.new_empty(grad.shape[1], 1, size, size)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _conv2d_cpu(x, weight, bias, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)  # another one under autocast
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_grad(grad, weight, ctx.dilation)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(x, grad, weight.shape[-1], ctx.dilation)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


class _SumOfBranches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: list[tuple], *tensors
    ) -> Tensor:
        total = None
        statistics = []
        for i, (mean, var, dilation, momentum, eps) in enumerate(settings):
            weight, scale, shift = tensors[3 * i : 3 * i + 3]
            y = _conv2d_cpu(x, weight, None, dilation)
            y, *batch_statistics = torch.native_batch_norm(
                y, scale, shift, mean, var, True, momentum, eps
            )
            statistics += batch_statistics
            total = y if total is None else total.add_(y)
        ctx.settings = settings
        ctx.save_for_backward(x, *tensors, *statistics)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        branches = len(ctx.settings)
        statistics = tensors[3 * branches :]
        x_rows = _contiguous(x)  # for all the weight gradients
        grad_x = None
        grads = []
        for i, (_, _, dilation, _, eps) in enumerate(ctx.settings):
            weight, scale, _ = tensors[3 * i : 3 * i + 3]
            mean, rstd = statistics[2 * i : 2 * i + 2]
            y = _conv2d_cpu(x, weight, None, dilation)
            grad_y, grad_scale, grad_shift = (
                torch.ops.aten.native_batch_norm_backward(
                    grad,
                    y,
                    scale,
                    None,
                    None,
                    mean,
                    rstd,
                    True,
                    eps,
                    [True, True, True],
                )
            )
            part = _input_grad(grad_y, weight, dilation)
            grad_x = part if grad_x is None else grad_x.add_(part)
            size = weight.shape[-1]
            grads.append(_weight_grad(x_rows, grad_y, size, dilation))
            grads += [grad_scale, grad_shift]
        return grad_x, None, *grads
