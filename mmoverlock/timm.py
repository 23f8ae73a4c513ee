"""OverLoCK for timm: importing this registers the release's names there.

``timm.create_model('overlock_t')`` is a classifier, with
``features_only=True`` a backbone of maps at strides 4, 8, 16 and 32.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from timm.models import (
    FeatureInfo,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor

from .models import OverLoCK
from .models.plain import RELEASE, OverLoCKClassifier, take_names
from .models.weights import STEM, State, is_release, remove_prefixes

__all__ = ['overlock_b', 'overlock_s', 'overlock_t', 'overlock_xt']

default_cfgs = generate_default_cfgs(
    {
        f'overlock_{arch}.in1k': dict(
            url=f'{RELEASE}overlock_{arch}_in1k_224.pth',
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=crop,
            interpolation='bicubic',
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            num_classes=1000,
            first_conv=STEM.removesuffix('.weight'),
            classifier='head.4',
            license='apache-2.0',
            paper_ids='arXiv:2502.20087',
            origin_url='https://github.com/LMMMEng/OverLoCK',
        )
        for arch, crop in dict(xt=0.925, t=0.95, s=0.95, b=0.975).items()
    }
)


class _TimmModel:
    """The interface that timm asks of any model."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute all blocks in the backward pass, or none."""
        self.checkpointed = self._parse_with_cp(enable)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A function from names of parameters to layers."""
        return lambda name: self.get_layer_depth(name)[0]

    @staticmethod
    def _infos(channels: Sequence[int]) -> list[dict]:
        return [
            dict(num_chs=width, reduction=4 * 2**i, module=f'extra_norm.{i}')
            for i, width in enumerate(channels)
        ]


class TimmClassifier(_TimmModel, OverLoCKClassifier):
    """:class:`OverLoCKClassifier` with the arguments of timm.

    ``global_pool`` is 'avg', or '' without classes.
    """

    def __init__(
        self,
        arch: str | dict,
        in_chans: int = 3,
        global_pool: str = 'avg',
        **kwargs,
    ):
        super().__init__(arch, in_channels=in_chans, **kwargs)
        self.in_chans = in_chans
        if global_pool != 'avg':
            self.reset_classifier(self.num_classes, global_pool)
        self.feature_info = self._infos(self._widths)


class TimmFeatures(_TimmModel, OverLoCK):
    """:class:`OverLoCK` with the arguments of timm.

    ``out_indices`` says which maps; a number is that of the last ones.
    """

    def __init__(
        self,
        arch: str | dict,
        in_chans: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        **kwargs,
    ):
        if isinstance(out_indices, int):
            out_indices = range(4 - out_indices, 4)
        out_indices = [index % 4 for index in out_indices]
        super().__init__(
            arch, in_channels=in_chans, out_indices=out_indices, **kwargs
        )
        self.in_chans = in_chans
        self.feature_info = FeatureInfo(
            self._infos(self._widths), self.out_indices
        )
        self.register_load_state_dict_pre_hook(take_names)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to the maps."""
        return list(super().forward(x))


def _select(state: dict, model: OverLoCK) -> State:
    """Of a pretrained file, what a model has and timm does not care for."""
    state = state.get('state_dict', state.get('model', state))
    if not is_release(state):
        state = remove_prefixes(state)
    own = model.state_dict()
    if isinstance(model, TimmFeatures):
        return {name: state[name] for name in state if name in own}
    last = 'aux_head.2.weight'
    if last in own and last in state and own[last].shape != state[last].shape:
        state = {
            name: own[name] if name.startswith('aux_head.2.') else weight
            for name, weight in state.items()
        }
    return state


def _create(
    arch: str,
    pretrained: bool,
    features_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> OverLoCK:
    model_class = TimmFeatures if features_only else TimmClassifier

    def build(**kwargs) -> OverLoCK:
        with nullcontext() if device is None else torch.device(device):
            return model_class(arch, **kwargs).to(dtype=dtype)

    return build_model_with_cfg(
        build,
        f'overlock_{arch}',
        pretrained,
        pretrained_filter_fn=_select,
        kwargs_filter=('num_classes', 'global_pool') * features_only,
        **kwargs,
    )


@register_model
def overlock_xt(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-XT (extreme-tiny)."""
    return _create('xt', pretrained, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-T (tiny)."""
    return _create('t', pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-S (small)."""
    return _create('s', pretrained, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs) -> OverLoCK:
    """OverLoCK-B (base)."""
    return _create('b', pretrained, **kwargs)
