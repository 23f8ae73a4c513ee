"""Optimizers: mixed precision on CPUs, and layer-wise learning rates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn

from ..models.overlock import OverLoCK


@OPTIM_WRAPPERS.register_module(force=True)
class CPUAmpOptimWrapper(OptimWrapper):
    """Trains in bfloat16 on a CPU, where mmengine's AmpOptimWrapper does not.

    That format has the range of single precision: losses are not scaled.
    Arguments are those of :class:`mmengine.optim.OptimWrapper`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _keep_in_single_precision()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast('cpu'):
            yield


@cache
def _keep_in_single_precision() -> None:
    """Have mmcv's operators that take nothing else on CPUs cast bfloat16."""
    with suppress(ImportError):  # classification needs no compiled ops
        nms, roi_align = (
            import_module(f'mmcv.ops.{name}') for name in ('nms', 'roi_align')
        )
        nms.NMSop.apply = _in_single_precision(nms.NMSop.apply)
        roi_align.roi_align = _in_single_precision(roi_align.roi_align)


def _in_single_precision(function: Callable) -> Callable:
    def call(x: Tensor, *args: Any) -> Tensor:
        args = (
            arg.float()
            if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16
            else arg
            for arg in (x, *args)
        )
        out = function(*args)
        return out.to(x.dtype) if out.is_floating_point() else out

    return call


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with a group for each setting in use.

    Where there is a ``paramwise_cfg``, mmengine's makes a group of every
    parameter. Optimizers of PyTorch run group by group: a step of AdamW for
    the 1,755 parameters of OverLoCK-T is 21,000 operators on a GPU, and with
    parameters of equal settings in one group, and ``fused=True``, it is 6.
    Those take gradients with the very strides of their parameters, even along
    sides of 1, and have them laid out so.

    Arguments are those of mmengine's.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        if isinstance(wrapper.optimizer, torch.optim.Optimizer):
            wrapper.optimizer.register_step_pre_hook(_lay_out_gradients)
        return wrapper

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the parameters of a module to ``params``, by their settings."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # of the recursion; what follows is for the whole model
            return
        self.adapt(params, module)
        merged = {}
        for group in params:
            parameters = group.pop('params')
            key = tuple(sorted(group.items()))
            merged.setdefault(key, group | dict(params=[]))
            merged[key]['params'] += parameters
        params[:] = merged.values()

    def adapt(self, params: list[dict], model: nn.Module) -> None:
        """Change settings before groups are merged; here, none.

        Args:
            params (list[dict]): A group for every parameter.
            model (nn.Module): All of it.
        """


def _lay_out_gradients(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for parameter in group['params']:
            grad = parameter.grad
            if grad is not None:
                laid_out = lay_out_as(parameter, grad)
                if laid_out is not grad:
                    parameter.grad = laid_out


def lay_out_as(like: Tensor, x: Tensor) -> Tensor:
    """A tensor with the strides of another of its size, if memory is the same.

    It is where only strides along sides of 1 differ.
    """
    if x.stride() == like.stride():
        return x
    sides = zip(like.shape, like.stride(), x.stride(), strict=True)
    if all(size == 1 or step == other for size, step, other in sides):
        return x.as_strided(like.shape, like.stride())
    return x


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class LayerDecayOptimWrapperConstructor(GroupedOptimWrapperConstructor):
    """Learning rates that fall from the last layer to the first.

    A parameter of layer ``d`` of ``n``, as counted by
    :meth:`OverLoCK.get_layer_depth`, gets the learning rate times
    ``layer_decay_rate ** (n - 1 - d)``: neck and heads get all of it. In
    every other respect, this is :class:`GroupedOptimWrapperConstructor`.

    Args:
        optim_wrapper_cfg (dict): The optimizer wrapper; its ``optimizer``
            needs an ``lr``.
        paramwise_cfg (dict): The options of mmengine's default constructor
            and **layer_decay_rate** (float), in (0, 1].

    Raises:
        ValueError: If ``layer_decay_rate`` or ``lr`` is missing or out of
            its range, or if the model does not hold one OverLoCK.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if rate is None or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be in (0, 1], got {rate}'
            )
        if self.base_lr is None:
            raise ValueError('layer-wise decay needs optimizer.lr, got None')

    def adapt(self, params: list[dict], model: nn.Module) -> None:
        """Scale the learning rate of every parameter."""
        backbones = {
            name: child
            for name, child in model.named_modules()
            if isinstance(child, OverLoCK)
        }
        if len(backbones) != 1:
            raise ValueError(
                'layer-wise decay is for models with one OverLoCK, but '
                f'{type(model).__name__} has {len(backbones)}: '
                f'{list(backbones)}'
            )
        [(path, backbone)] = backbones.items()
        path = f'{path}.' if path else ''  # of a backbone by itself
        rate = self.paramwise_cfg['layer_decay_rate']
        scales = {}
        for name, parameter in model.named_parameters():
            depth, num_layers = backbone.get_layer_depth(name, path)
            scales[id(parameter)] = rate ** (num_layers - 1 - depth)
        for group in params:
            scale = scales[id(group['params'][0])]
            group['lr'] = group.get('lr', self.base_lr) * scale
