"""In-memory fusion for inference: all that deploy form leaves to be merged."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .blocks import FocusBlock, RepConvBlock
from .layers import GRN, PointwiseConv, ResDWConv
from .reparam import DilatedReparamConv


def fuse(model: nn.Module) -> nn.Module:
    """Fuse a model in place, for inference.

    Every batch norm goes into the convolution before it, or into a 1x1
    convolution behind it; branches and residuals go into depthwise kernels,
    the shifts of GRN and layer scale into biases. Necks and heads have
    their batch norms fused too, in ``Sequential`` and mmcv's ``ConvModule``.

    Outputs are those of eval mode up to rounding. The model cannot be trained
    or loaded any more: load a checkpoint before.

    Args:
        model (nn.Module): An :class:`OverLoCK` or a model that holds one.

    Returns:
        nn.Module: The same model, in eval mode and without gradients.
    """
    model.eval().requires_grad_(False)
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, DilatedReparamConv):
                module.switch_to_deploy()
            elif isinstance(module, ResDWConv):
                module.absorb_residual()
        for module in list(model.modules()):
            if isinstance(module, nn.Sequential):
                _fuse_sequence(module)
            elif type(module).__name__ == 'ConvModule':
                _fuse_conv_module(module)
        for module in list(model.modules()):
            if isinstance(module, RepConvBlock):
                _move_bias(module.ls, module.proj[-2])
            elif isinstance(module, FocusBlock):
                _move_bias(module.ls1, module.proj[-1])
                _move_bias(module.ls2, module.mlp[-1])
                if not module.first:
                    _move_bias(module.x_scale, module.h_scale)
    return model.requires_grad_(False)


def _fuse_sequence(sequence: nn.Sequential) -> None:
    for i, module in enumerate(sequence):
        before = sequence[i - 1] if i > 0 else None
        behind = sequence[i + 1] if i + 1 < len(sequence) else None
        if isinstance(module, GRN) and isinstance(behind, PointwiseConv):
            _add_bias(behind, behind.weight.flatten(1) @ module.beta.flatten())
            module.beta = None
        if not isinstance(module, _BatchNorm):
            continue
        if isinstance(before, DilatedReparamConv):
            before = before.lk_origin
        if isinstance(before, nn.Conv2d):
            _fuse_conv_bn(before, module)
        elif isinstance(behind, PointwiseConv):
            _fuse_bn_conv(module, behind)
        else:
            continue
        sequence[i] = nn.Identity()


def _fuse_conv_module(module: nn.Module) -> None:
    norm = module.norm
    if isinstance(norm, _BatchNorm) and module.order[:2] == ('conv', 'norm'):
        _fuse_conv_bn(module.conv, norm)
        setattr(module, module.norm_name, nn.Identity())


def _fuse_conv_bn(conv: nn.Conv2d, norm: nn.Module) -> None:
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    if conv.groups == 1:
        # What libraries on CPUs take without a copy.
        weight.data = weight.contiguous(memory_format=torch.channels_last)
    conv.weight, conv.bias = weight, bias


def _fuse_bn_conv(norm: nn.Module, conv: PointwiseConv) -> None:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    _add_bias(conv, conv.weight.flatten(1) @ shift)
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None])


def _move_bias(source: nn.Module | None, target: nn.Module) -> None:
    """Move the shift of a layer scale to what it is added to."""
    if source is not None:
        _add_bias(target, source.bias)
        source.bias = None


def _add_bias(module: nn.Module, bias: torch.Tensor) -> None:
    if module.bias is not None:
        bias = module.bias + bias
    module.bias = nn.Parameter(bias)
