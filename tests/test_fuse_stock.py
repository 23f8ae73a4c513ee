"""Fusion of what mm* packages have: shared parts, parts read from outside."""

import pytest
import tiny
from fusion import assert_fuses, far, images
from mmengine.registry import MODELS, init_default_scope

tiny.need_openmmlab()
from mmcv.cnn import ConvModule  # noqa: E402

BN = dict(type='BN')
CONV_MODULES = {  # settings, and how many convolutions are fused
    'padding': (dict(padding=1, padding_mode='reflect'), 1),
    'circular': (dict(padding=1, padding_mode='circular'), 1),
    'groups': (dict(groups=2), 1),
    "mmcv's convolution": (dict(conv_cfg=dict(type='Conv')), 1),
    'activation first': (dict(order=('act', 'conv', 'norm')), 1),
    'norm last': (dict(order=('conv', 'act', 'norm')), 0),
    'norm first': (dict(order=('norm', 'conv', 'act')), 0),
    'no norm': (dict(norm_cfg=None), 0),
    'group norm': (dict(norm_cfg=dict(type='GN', num_groups=2)), 0),
    'spectral norm': (dict(with_spectral_norm=True), 0),
    'standardized': (dict(conv_cfg=dict(type='ConvWS')), 0),
    'transposed': (dict(conv_cfg=dict(type='deconv')), 0),
}


@pytest.mark.parametrize('name', CONV_MODULES)
def test_conv_module(name):
    kwargs, count = CONV_MODULES[name]
    model = far(ConvModule(4, 4, 3, **dict(norm_cfg=BN) | kwargs))

    def call(x):
        return model(x), model(x, norm=False), model(x, activate=False)

    assert assert_fuses(model, images(4, 9, 8), call=call) == count


# Package, settings of a neck or head, and the sides of the maps. Those of the
# configs are in test_configs.py.
PARTS = {
    'CTResNetNeck': (  # transposed convolutions
        'mmdet',
        dict(
            in_channels=8,
            num_deconv_filters=(8, 8),
            num_deconv_kernels=(4, 4),
            use_dcn=False,
        ),
        (4,),
    ),
    'RetinaSepBNHead': (  # one convolution with a norm for each level
        'mmdet',
        dict(num_classes=3, num_ins=2, in_channels=8, norm_cfg=BN),
        (8, 4),
    ),
    'EncHead': (
        'mmseg',
        dict(
            **dict(num_classes=3, channels=8, norm_cfg=BN, num_codes=4),
            **dict(in_channels=[8] * 2, in_index=[0, 1]),
        ),
        (4, 2),
    ),
}


@pytest.mark.parametrize('name', PARTS)
def test_part(name):
    scope, kwargs, sides = PARTS[name]
    init_default_scope(scope)
    model = far(MODELS.build(dict(type=name, **kwargs)))
    maps = tuple(images(8, side, side) for side in sides)
    assert assert_fuses(model, maps) > 0
