"""In-memory fusion for inference: all that deploy form leaves to be merged.

What is fused computes the same for every input, whatever the rest of the model
does. The project's own blocks are changed in place, where nothing else holds
their parts. Of other models, only the forward methods of ``Sequential`` and
mmcv's ``ConvModule`` are known: these get fused copies, and their parts stay
as they are for all who read them from elsewhere.
"""

from collections import Counter
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from .blocks import FocusBlock, RepConvBlock
from .layers import (
    GRN,
    DWConv,
    LayerScale,
    PointwiseConv,
    ResDWConv,
    StridedConv,
)
from .overlock import OverLoCK
from .reparam import DilatedReparamConv
from .variants import OverLoCKVariant, Variant

CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d, PointwiseConv, StridedConv, DWConv
try:
    from mmcv.cnn import ConvModule
    from mmcv.cnn.bricks import wrappers
except ImportError:
    ConvModule = None
else:
    CONVS += wrappers.Conv2d, wrappers.Conv3d


def fuse(model: nn.Module) -> nn.Module:
    """Fuse a model in place, for inference.

    In the backbone, every batch norm goes into the convolution before it, or
    into a 1x1 convolution behind it; branches and residuals go into depthwise
    kernels, the shifts of GRN and layer scale into biases. In necks and heads,
    every ``Sequential`` and mmcv's ``ConvModule`` runs a convolution and the
    batch norm behind it as one.

    Left as they are: transposed, deformable and parametrized convolutions,
    batch norms that take statistics of the batch, and modules with hooks.

    Outputs are those of eval mode up to rounding. The model cannot be trained
    or loaded any more: load a checkpoint before.

    Args:
        model (nn.Module): An :class:`OverLoCK` or a model that holds one.

    Returns:
        nn.Module: The same model, in eval mode and without gradients.
    """
    model.eval().requires_grad_(False)
    with torch.no_grad():
        _fuse_own(model)
        for module in list(model.modules()):
            forward = vars(module).get('forward', type(module).forward)
            if forward is nn.Sequential.forward:
                _fuse_sequence(module)
            elif ConvModule and forward is ConvModule.forward:
                _fuse_conv_module(module)
    return model.requires_grad_(False)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class and its weights say."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or 'forward' in vars(module)
        or is_parametrized(module)
    )


def _is_linear(conv: nn.Module | None) -> bool:
    """Whether a module is a convolution without a residual."""
    return type(conv) in CONVS and not getattr(conv, 'residual', False)


def _is_affine(norm: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return (
        type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and _is_plain(norm)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


# --------------------------------------------------------- necks and heads


def _fuse_sequence(sequence: nn.Sequential) -> None:
    steps = []
    for layer in sequence:
        fused = _fused_copy(steps[-1], layer) if steps else None
        if fused is not None:
            steps.pop()
        steps.append(layer if fused is None else fused)
    if len(steps) < len(sequence):
        sequence.forward = partial(_run, steps)


def _run(steps: list[nn.Module], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _fuse_conv_module(module: nn.Module) -> None:
    order = module.order
    pairs = zip(order, order[1:], strict=False)
    if module.with_norm and ('conv', 'norm') in pairs:
        fused = _fused_copy(module.conv, module.norm)
        if fused is not None:
            # mmcv calls it wherever it would call both.
            module.efficient_conv_bn_eval_forward = partial(_run_fused, fused)


def _run_fused(
    fused: nn.Module, norm: nn.Module, conv: nn.Module, x: Tensor
) -> Tensor:
    return fused(x)


def _fused_copy(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """A convolution that computes both; None if there may be none.

    It is a part of the norm, so that it moves with the model.
    """
    if (
        not _is_linear(conv)
        or not _is_plain(conv)
        or not _is_affine(norm)
        or hasattr(norm, 'fused')
    ):
        return None
    norm.fused = _fuse_conv_bn(deepcopy(conv), norm)
    return norm.fused


# ------------------------------------------------------------ own modules


def _fuse_own(model: nn.Module) -> None:
    holders = Counter(
        id(child)
        for module in model.modules()
        for child in module._modules.values()
    )

    def are_own(*parts: nn.Module) -> bool:
        """Whether nothing but their block reads or changes some parts."""
        return all(
            holders[id(module)] == 1 and _is_plain(module)
            for part in parts
            for module in part.modules()
        )

    def move_bias(source: nn.Module | None, target: nn.Module) -> None:
        """Move the shift of a layer scale to what it is added to."""
        known = type(target) in (PointwiseConv, LayerScale)
        if not known or type(source) is not LayerScale or source.bias is None:
            return
        if are_own(source, target):
            _add_bias(target, source.bias)
            source.bias = None

    modules = list(model.modules())
    for module in modules:
        if type(module) is DilatedReparamConv and module.is_as_built():
            norms = [norm for _, norm in module._branches()]
            if are_own(*module.children()) and all(map(_is_affine, norms)):
                module.switch_to_deploy()
        elif type(module) is ResDWConv and are_own(module):
            module.absorb_residual()
    for module in modules:
        own = OverLoCK, OverLoCKVariant, RepConvBlock, FocusBlock
        if type(module) not in own and not isinstance(module, Variant):
            continue
        downsampling = getattr(module, 'patch_embedx', {}).values()
        for part in (*module.children(), *downsampling):
            if type(part) is nn.Sequential and are_own(part):
                _merge(part)
        if isinstance(module, RepConvBlock):
            move_bias(module.ls, module.proj[-2])
        elif isinstance(module, FocusBlock):
            move_bias(module.ls1, module.proj[-1])
            move_bias(module.ls2, module.mlp[-1])
            if not module.first:
                move_bias(module.x_scale, module.h_scale)


def _merge(sequence: nn.Sequential) -> None:
    for i, module in enumerate(sequence):
        before = sequence[i - 1] if i > 0 else None
        behind = sequence[i + 1] if i + 1 < len(sequence) else None
        if type(module) is GRN and type(behind) is PointwiseConv:
            if module.beta is not None:
                beta = module.beta.flatten()
                _add_bias(behind, behind.weight.flatten(1) @ beta)
                module.beta = None
        if not _is_affine(module):
            continue
        if type(before) is DilatedReparamConv and not before.branches:
            before = before.lk_origin
        if _is_linear(before):
            _fuse_conv_bn(before, module)
            if before.groups == 1 and before.weight.ndim == 4:
                # Libraries on CPUs take this layout without a copy.
                layout = dict(memory_format=torch.channels_last)
                before.weight.data = before.weight.contiguous(**layout)
        elif type(behind) is PointwiseConv:
            _fuse_bn_conv(module, behind)
        else:
            continue
        sequence[i] = nn.Identity()


def _fuse_conv_bn(conv: nn.Module, norm: nn.Module) -> nn.Module:
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    conv.weight, conv.bias = weight, bias
    return conv


def _fuse_bn_conv(norm: nn.Module, conv: PointwiseConv) -> None:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    _add_bias(conv, conv.weight.flatten(1) @ shift)
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None])


def _add_bias(module: nn.Module, bias: Tensor) -> None:
    if module.bias is not None:
        bias = module.bias + bias
    module.bias = nn.Parameter(bias)
