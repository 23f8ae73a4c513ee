"""Small layers that OverLoCK is made of, all on (B, C, H, W) maps."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import (
    Norm,
    conv_norm,
    convolution_dtype,
    is_compiling,
    layer_norm,
    residual_conv,
    response_norm,
    response_scale,
    scaled_residual,
    squeeze_excite,
    sync_batch_norm,
    takes_triton,
)

NORMS = nn.BatchNorm2d, nn.SyncBatchNorm


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of every position.

    Args:
        channels (int): Channels of the map.
        contiguous (bool): Whether the result is contiguous, in place of
            channels_last. Defaults to False.
    """

    def __init__(self, channels: int, contiguous: bool = False):
        super().__init__(channels, eps=1e-6)
        self.contiguous = contiguous

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(
            x, self.weight, self.bias, self.eps, contiguous=self.contiguous
        )


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, with a scale and a shift of its input folded in.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        bias (bool): Whether there is a bias. Defaults to True.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Convolve ``x * scale + shift``.

        Args:
            x (Tensor): (B, C, H, W).
            scale (Tensor, optional): (B, C, 1, 1).
            shift (Tensor, optional): (1, C, 1, 1).

        Returns:
            Tensor: (B, out_channels, H, W).
        """
        # Of maps in channels_last a matrix product is faster.
        weight, bias = self.weight.flatten(1), self.bias
        size = x.shape[2:]
        if scale is None or size.numel() <= len(weight):
            x = scale_shift(x, scale, shift).permute(0, 2, 3, 1)
            shape = x.shape[:-1]
            # With rows of a wider map, a product of 4D is many small ones.
            x = F.linear(x.flatten(0, 2), weight, bias)
            return x.unflatten(0, shape).permute(0, 3, 1, 2)
        # The weights are smaller than the map, so scale those.
        if shift is not None:
            shift = weight @ shift.flatten()
            bias = shift if bias is None else bias + shift
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        weight = (weight.mT * scale.flatten(2)).to(x.dtype)
        x = x @ weight if bias is None else torch.baddbmm(bias, x, weight)
        return x.unflatten(1, size).permute(0, 3, 1, 2)


def scale_shift(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """``x * scale + shift`` in the dtype of ``x``."""
    if scale is not None:
        scale = scale.to(x.dtype)
    if shift is not None:
        shift = shift.to(x.dtype)
    if scale is None or shift is None:
        return x if scale is None else x * scale
    return torch.addcmul(shift, x, scale)


class LayerScale(nn.Module):
    """A learned scale and shift per channel.

    Args:
        channels (int): Channels of the map.
        init_value (float): Initial scale. Defaults to 1.
    """

    def __init__(self, channels: int, init_value: float = 1.0):
        super().__init__()
        # The shape of a 1x1 depthwise kernel: what it could be fused into.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Scale and shift ``x``, and add ``y`` if there is one.

        Args:
            x (Tensor): (B, C, H, W).
            y (Tensor, optional): Of the same shape.

        Returns:
            Tensor: Of the same shape.
        """
        weight = self.weight[:, 0]
        if self.bias is None and y is not None:
            return torch.addcmul(y, x, weight)
        shift = None if self.bias is None else self.bias[:, None, None]
        x = scale_shift(x, weight, shift)
        return x if y is None else x + y


class GRN(nn.Module):
    """Global response normalization (ConvNeXt V2).

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.beta is None:  # fused
            return scale_shift(x, response_scale(x, self.gamma))
        return response_norm(x, self.gamma, self.beta)

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of the input.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            tuple[Tensor, Tensor]: (B, C, 1, 1) and (1, C, 1, 1).
        """
        return response_scale(x, self.gamma), self.beta


class SEModule(nn.Module):
    """Squeeze and excitation.

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(16, channels // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            PointwiseConv(channels, hidden),
            nn.GELU(),
            PointwiseConv(hidden, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Scale ``x``, and multiply it by a gate if there is one.

        Args:
            x (Tensor): (B, C, H, W).
            gate (Tensor, optional): Of the same shape.

        Returns:
            Tensor: Of the same shape.
        """
        if takes_triton('auto', x) and self.is_as_built():
            return squeeze_excite(x, *self.weights(), gate)
        x = x * self.proj(x)
        return x if gate is None else gate * x

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, None]:
        """Scale of the input, and no shift.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            tuple[Tensor, None]: (B, C, 1, 1), and that nothing is added.
        """
        return self.proj(x), None

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, first, _, second, _ = self._modules['proj']
        return *pair_of(first), *pair_of(second)

    def is_as_built(self) -> bool:
        """See :func:`is_plain`, of the layers."""
        proj = self._modules['proj']
        return is_plain(proj, nn.Sequential) and are_plain(
            proj,
            nn.AdaptiveAvgPool2d,
            PointwiseConv,
            nn.GELU,
            PointwiseConv,
            nn.Sigmoid,
        )


class StridedConv(nn.Conv2d):
    """A 3x3 convolution with stride 2 and padding 1.

    On CPUs, PyTorch leaves parts of the weight gradient uninitialized where a
    map in bfloat16 is one column wide. A column of zeros changes nothing else.
    """

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        if input.shape[3] == 1 and self.padding_mode == 'zeros':
            input = F.pad(input, (0, 1))
        return super()._conv_forward(input, weight, bias)


class DWConv(nn.Conv2d):
    """A 3x3 depthwise convolution.

    Args:
        channels (int): Channels of the map.
        residual (bool): Whether to add the input. Defaults to False.
    """

    def __init__(self, channels: int, residual: bool = False):
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        if not _pads_zeros(self):
            y = super().forward(x)
            return x + y if self.residual else y
        return residual_conv(x, self.weight, self.bias, residual=self.residual)


class ResDWConv(DWConv):
    """A 3x3 depthwise convolution added to its input.

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__(channels, residual=True)

    @torch.no_grad()
    def absorb_residual(self) -> None:
        """Make the identity a part of the kernel, for inference."""
        weight = self.weight.clone()  # it may be tied to that of another
        weight[:, :, 1, 1] += self.residual
        self.weight = nn.Parameter(weight)
        self.residual = False


class DropPath(nn.Module):
    """Stochastic depth: drops residual branches, sample by sample.

    Args:
        drop_prob (float): Probability of a drop, in [0, 1).
        branches (int): Number of branches, which are dropped on their own.
            Defaults to 1.
    """

    def __init__(self, drop_prob: float, branches: int = 1):
        super().__init__()
        self.drop_prob = drop_prob
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        ((keep, *_),) = draw_paths([self], x)
        return _scale_samples(x, keep)

    @property
    def is_dropping(self) -> bool:
        return self.training and self.drop_prob > 0

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob}'


def draw_paths(
    paths: Sequence[DropPath], x: Tensor
) -> list[Sequence[Tensor | None]]:
    """Scales of the samples of residual branches, all drawn at once.

    Args:
        paths (Sequence[DropPath]): One for each block.
        x (Tensor): (B, C, H, W).

    Returns:
        list[Sequence[Tensor | None]]: (B, ) for each branch of each block, or
        None where it is 1.

    Raises:
        TypeError: If a path is something else.
    """
    dropping = [getattr(path, 'is_dropping', None) for path in paths]
    if None in dropping:
        other = type(paths[dropping.index(None)]).__name__
        raise TypeError(
            'nothing takes the place of what drops paths, which drops none '
            f'with drop_prob = 0; got {other}'
        )
    shares = tuple(
        1 - path.drop_prob
        for path, drops in zip(paths, dropping, strict=True)
        if drops
        for _ in range(path.branches)
    )
    scales = iter(())
    if shares:
        # Kernels are compiled for addresses that 16 divides, and for others
        count = x.shape[0]
        step = (count + 3) // 4 * 4
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Only true tensors are kept, not those without data, say
        is_kept = type(x) is Tensor and not is_compiling()
        repeat = _repeat_once if is_kept else _repeat
        kept = repeat((1, *shares), step, dtype, x.device)
        drawn = torch.bernoulli(kept).div_(kept).view(len(shares) + 1, step)
        # Views of a vector, none at its start, are alike to compiled blocks
        scales = iter(drawn[1:, :count].unbind())
    return [
        tuple(next(scales) if drops else None for _ in range(path.branches))
        for path, drops in zip(paths, dropping, strict=True)
    ]


def _repeat(
    values: tuple[float, ...],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    values = torch.tensor(values, dtype=dtype, device=device)
    return values.repeat_interleave(count)


@lru_cache
def _repeat_once(*args) -> Tensor:
    """The same for as long as it is asked for: a GPU waits for the copy."""
    with torch._C._DisableFuncTorch():  # transforms would have it wrapped
        return _repeat(*args)


def _scale_samples(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep.to(x.dtype)[:, None, None, None]


def add_residual(
    x: Tensor, y: Tensor, keep: Tensor | None, scale: LayerScale | None
) -> Tensor:
    """``scale(x) + y * keep``.

    Args:
        x, y (Tensor): (B, C, H, W).
        keep (Tensor, optional): See :func:`draw_paths`.
        scale (LayerScale, optional): The scale and shift of x.

    Returns:
        Tensor: (B, C, H, W).
    """
    if is_plain_scale(scale) and takes_triton('auto', x):
        weight = None if scale is None else scale.weight
        bias = None if scale is None else scale.bias
        return scaled_residual(x, y, weight, bias, keep)
    y = _scale_samples(y, keep)
    return x + y if scale is None else scale(x, y)


def conv_and_norm(
    conv: ResDWConv, norm: LayerNorm2d, x: Tensor
) -> tuple[Tensor, Tensor]:
    """``conv(x)`` and the norm of it, both (B, C, H, W)."""
    if not are_plain((conv, norm), ResDWConv, LayerNorm2d):
        x = conv(x)
        return x, norm(x)
    operands = (
        x,
        *pair_of(conv),
        *pair_of(norm),
        norm.eps,
        conv.residual,
    )
    if takes_triton('auto', x, conv_norm, *operands):
        return conv_norm(*operands)
    x = conv(x)
    return x, norm(x)


def run_layers(layers: nn.Sequential, x: Tensor) -> Tensor:
    """``layers(x)``, as GPUs like it.

    Norms of several processes are kernels, those of one count their batches
    in one launch. See :func:`convolve`, too.
    """
    if (
        not is_plain(layers, nn.Sequential)
        or _has_any_global_hook()
        or not takes_triton('auto', x)
    ):
        return layers(x)
    counts = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = convolve(layer, x)
            continue
        norm = as_operand(layer) if counts_batches(layer) else None
        group = norm and group_of(layer)
        if norm and group is None:
            counts.append(norm.batches)
            running = norm.running_mean, norm.running_var
            x = F.batch_norm(
                x, *running, *norm[:2], True, norm.momentum, norm.eps
            )
        elif norm and takes_triton('auto', x, sync_batch_norm, x, norm):
            x = sync_batch_norm(x, norm, group)
        else:
            x = layer(x)
    if counts:
        torch._foreach_add_(counts, 1)
    return x


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``, as GPUs like it.

    Map and weight are rounded and laid out in one launch each.
    """
    if (
        not is_plain(conv, nn.Conv2d)
        or _has_any_global_hook()
        or not takes_triton('auto', x)
    ):
        return conv(x)
    weight, bias = pair_of(conv)
    dtype = convolution_dtype(x)
    x = x.to(dtype, memory_format=torch.channels_last)
    weight = _LayOut.apply(weight, dtype)
    return conv._conv_forward(x, weight, bias)


class _LayOut(torch.autograd.Function):
    """A weight in another dtype and channels_last; its gradient as it was."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype, memory_format=torch.channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, _ = inputs
        ctx.dtype, ctx.format = weight.dtype, torch.preserve_format
        if weight.is_contiguous():
            ctx.format = torch.contiguous_format

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype, memory_format=ctx.format), None


class _Enlarge(torch.autograd.Function):
    """A map of another size, in its dtype; its gradient, in fp32, is exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: tuple[int, int]) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.interpolate(x, size, mode='bilinear')

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.dtype, ctx.shape = inputs[0].dtype, inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        grad = torch.ops.aten.upsample_bilinear2d_backward(
            grad.to(dtype), grad.shape[2:], ctx.shape, False
        )
        return grad.to(ctx.dtype), None


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map of another size, in one launch on GPUs.

    Args:
        x (Tensor): (B, C, H, W).
        size (tuple[int, int]): Height and width.
    """
    if not takes_triton('auto', x):
        return F.interpolate(x, size, mode='bilinear')
    # Its gradient alone can be deterministic, or compiled for any size
    if torch.are_deterministic_algorithms_enabled() or is_compiling():
        return F.interpolate(x, size, mode='bilinear').to(x.dtype)
    return _Enlarge.apply(x, size)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether nobody watches a module, in either direction."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes as its kind does.

    An adapter, or another activation, may have taken the place of one.
    """
    return (
        type(layer).forward is kind.forward
        and 'forward' not in layer.__dict__
        and (kind is not nn.GELU or layer.approximate == 'none')
        and _pads_zeros(layer)
    )


def _pads_zeros(layer: nn.Module) -> bool:
    """Whether nothing but zeros is around the map of a convolution."""
    own = layer.__dict__  # several times as fast as attributes
    mode = own.get('padding_mode', 'zeros')
    return mode == 'zeros' or own['padding'] == (0, 0)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes as its kind does, and nobody watches it."""
    return has_no_hooks(layer) and computes_as(layer, kind)


def are_plain(layers: Sequence[nn.Module], *kinds: type[nn.Module]) -> bool:
    """See :func:`is_plain`, of layers one after the other."""
    return len(layers) == len(kinds) and all(map(is_plain, layers, kinds))


def is_plain_scale(scale: nn.Module | None) -> bool:
    """See :func:`is_plain`, of the scale of an identity, if there is one."""
    return scale is None or is_plain(scale, LayerScale)


def group_of(norm: nn.Module) -> Any:
    """The processes that a batch norm has statistics of, None for its own."""
    if type(norm) is nn.SyncBatchNorm and distributed.is_available():
        if distributed.is_initialized():
            group = norm.process_group or distributed.group.WORLD
            if distributed.get_world_size(group) > 1:
                return group
    return None


def exchanges(module: nn.Module) -> bool:
    """Whether processes share statistics of a norm in training mode."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and any(
            norm.training and group_of(norm) is not None
            for norm in module.modules()
            if type(norm) is nn.SyncBatchNorm
        )
    )


def counts_batches(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm in training, with running averages.

    They are exponential ones, and nobody watches it.
    """
    return (
        type(layer) in NORMS
        and layer.training
        and layer.affine
        and layer.track_running_stats
        and layer.momentum is not None
        and has_no_hooks(layer)
    )


def pair_of(
    layer: nn.Module, first: str = 'weight', second: str = 'bias'
) -> tuple[Tensor, Tensor | None]:
    """Two parameters, in a tenth of the time that attributes of modules take.

    Weights of DataParallel's replicas, and those that are computed, are
    attributes and nothing else.
    """
    own = layer._parameters
    if first in own and second in own:
        return own[first], own[second]
    return getattr(layer, first), getattr(layer, second)


def as_operand(norm: nn.BatchNorm2d | nn.Identity) -> Norm | None:
    """A batch norm as operators take it, None where there is none."""
    if type(norm) is nn.Identity:
        return None
    buffers = norm._buffers
    return Norm(
        *pair_of(norm),
        buffers['running_mean'],
        buffers['running_var'],
        buffers['num_batches_tracked'],
        norm.momentum,
        norm.eps,
    )


def build_bn(
    channels: int,
    type: str = 'BN',
    eps: float = 1e-5,
    momentum: float = 0.1,
    requires_grad: bool = True,
) -> nn.Module:
    """Build a batch norm; all but ``channels`` is OpenMMLab's ``norm_cfg``.

    Args:
        channels (int): Channels of the map.
        type (str): 'BN' or 'SyncBN'. Defaults to 'BN'.
        eps (float): Added to the variance. Defaults to 1e-5.
        momentum (float): Of the running statistics. Defaults to 0.1.
        requires_grad (bool): Whether scale and shift are trained. Defaults to
            True.

    Raises:
        ValueError: If the type is no batch norm. Merging branches takes
            running statistics, which other norms do not have.
    """
    types = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}
    if type not in types:
        raise ValueError(
            f'unsupported norm type {type!r}, expected one of {list(types)}'
        )
    norm = types[type](channels, eps=eps, momentum=momentum)
    return norm.requires_grad_(requires_grad)
