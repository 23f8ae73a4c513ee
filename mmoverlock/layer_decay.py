"""Layer-wise decay of the learning rate, whatever OverLoCK stands under."""

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .models.overlock import OverLoCK


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that fall from the last layer to the first.

    A parameter of layer ``d`` of ``n``, as counted by
    :meth:`OverLoCK.get_layer_depth`, gets the learning rate times
    ``layer_decay_rate ** (n - 1 - d)``: neck and heads get all of it. In
    every other respect, this is mmengine's default constructor.

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

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the parameters of a module to ``params``, a group for each."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # of the recursion; what follows is for the whole model
            return
        backbones = {
            name: child
            for name, child in module.named_modules()
            if isinstance(child, OverLoCK)
        }
        if len(backbones) != 1:
            raise ValueError(
                'layer-wise decay is for models with one OverLoCK, but '
                f'{type(module).__name__} has {len(backbones)}: '
                f'{list(backbones)}'
            )
        [(path, backbone)] = backbones.items()
        rate = self.paramwise_cfg['layer_decay_rate']
        scales = {}
        for name, parameter in module.named_parameters():
            depth, num_layers = backbone.get_layer_depth(name, f'{path}.')
            scales[id(parameter)] = rate ** (num_layers - 1 - depth)
        for group in params:
            scale = scales[id(group['params'][0])]
            group['lr'] = group.get('lr', self.base_lr) * scale
