"""Fusion of what mm* packages have: shared parts, parts read from outside."""

import pytest
from fusion import assert_fuses, far, images
from mmengine.registry import MODELS, init_default_scope

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)
from mmcv.cnn import ConvModule  # noqa: E402

BN = dict(type='BN')


def module(*args, count=1, **kwargs):
    return (args or (4, 4, 3)), dict(norm_cfg=BN) | kwargs, count


CONV_MODULES = {
    'plain': module(),
    'padding': module(4, 4, 3, padding=1, padding_mode='reflect'),
    'circular': module(4, 4, 3, padding=1, padding_mode='circular'),
    'groups': module(4, 4, 3, groups=2),
    "mmcv's convolution": module(conv_cfg=dict(type='Conv')),
    'activation first': module(order=('act', 'conv', 'norm')),
    'norm last': module(order=('conv', 'act', 'norm'), count=0),
    'norm first': module(order=('norm', 'conv', 'act'), count=0),
    'no norm': module(norm_cfg=None, count=0),
    'group norm': module(norm_cfg=dict(type='GN', num_groups=2), count=0),
    'spectral norm': module(with_spectral_norm=True, count=0),
    'standardized': module(conv_cfg=dict(type='ConvWS'), count=0),
    'transposed': module(conv_cfg=dict(type='deconv'), count=0),
}


@pytest.mark.parametrize('name', CONV_MODULES)
def test_conv_module(name):
    args, kwargs, count = CONV_MODULES[name]
    model = far(ConvModule(*args, **kwargs))

    def call(x):
        return model(x), model(x, norm=False), model(x, activate=False)

    assert assert_fuses(model, images(4, 9, 8), call=call) == count


ANCHORS = dict(
    anchor_generator=dict(
        type='AnchorGenerator',
        ratios=[1.0],
        octave_base_scale=8,
        scales_per_octave=1,
        strides=[8, 16, 32],
    )
)
POINTS = dict(
    anchor_generator=dict(type='MlvlPointGenerator', strides=[8, 16, 32])
)
NECK = dict(in_channels=[8] * 4, out_channels=8, num_outs=5)
THREE_LEVELS = dict(in_channels=[8] * 3, out_channels=8, num_csp_blocks=1)
HEAD = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2)
GRIDS = dict(strides=[4, 8, 16], scale_ranges=[(1, 9)] * 3)
GRIDS['num_grids'] = [6, 4, 2]
MASKS = dict(feat_channels=8, out_channels=8, start_level=0, end_level=2)
ROIS = dict(in_channels=8, conv_out_channels=8, num_classes=3)
ROIS_FC = dict(**ROIS, fc_out_channels=8)
SEG = dict(num_classes=3, in_channels=8, channels=8, in_index=3)
SEG_ALL = SEG | dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3])
SEG_LAST = SEG | dict(in_channels=[8] * 2, in_index=[2, 3])
THREE, FOUR = (8, 4, 2), (16, 8, 4, 2)

OWN_NORM = 'CTResNetNeck', 'DilatedEncoder', 'RTMDetInsSepBNHead'
# Type, settings beside norm_cfg, and the sides of the maps, or of one map.
PARTS = {
    'mmdet': [
        ('FPN', NECK, FOUR),
        ('NASFPN', dict(**NECK, stack_times=2), FOUR),
        ('CSPNeXtPAFPN', THREE_LEVELS, THREE),
        ('YOLOXPAFPN', dict(**THREE_LEVELS, use_depthwise=True), THREE),
        (
            'CTResNetNeck',  # transposed convolutions
            dict(
                in_channels=8,
                num_deconv_filters=(8, 8),
                num_deconv_kernels=(4, 4),
                use_dcn=False,
            ),
            (4,),
        ),
        (
            'DilatedEncoder',
            dict(
                in_channels=8,
                out_channels=8,
                block_mid_channels=4,
                num_residual_blocks=2,
                block_dilations=[1, 2],
            ),
            (8,),
        ),
        ('SSH', dict(num_scales=3, in_channels=[8] * 3, out_channels=[8] * 3)),
        ('RetinaHead', HEAD | ANCHORS),
        ('RetinaSepBNHead', HEAD | ANCHORS | dict(num_ins=3)),
        ('TOODHead', HEAD | ANCHORS | dict(num_dcn=0)),
        ('DDODHead', HEAD | ANCHORS | dict(use_dcn=False)),
        (
            'YOLOV3Head',
            dict(num_classes=3, in_channels=[8] * 3, out_channels=[8] * 3),
        ),
        ('RTMDetSepBNHead', HEAD | POINTS | dict(share_conv=True)),
        ('RTMDetSepBNHead', HEAD | POINTS | dict(share_conv=False)),
        ('RTMDetInsSepBNHead', HEAD | POINTS | dict(share_conv=True)),
        (
            'SOLOV2Head',
            HEAD | GRIDS | dict(mask_feature_head=dict(**MASKS, norm_cfg=BN)),
        ),
        ('Shared4Conv1FCBBoxHead', ROIS_FC, 7),
        ('FCNMaskHead', ROIS, 7),
    ],
    'mmseg': [
        ('FCNHead', SEG, FOUR),
        ('PSPHead', SEG, FOUR),
        (
            'DepthwiseSeparableASPPHead',
            dict(**SEG, c1_in_channels=8, c1_channels=4),
            FOUR,
        ),
        ('DAHead', dict(**SEG, pam_channels=4), FOUR),
        ('STDCHead', SEG, FOUR),
        ('UPerHead', SEG_ALL, FOUR),
        ('SegformerHead', SEG_ALL, FOUR),
        (
            'LRASPPHead',
            SEG_ALL
            | dict(
                input_transform='multiple_select',
                in_channels=[8] * 3,
                in_index=[0, 1, 2],
                branch_channels=(4, 4),
            ),
            (64, 56, 52),
        ),
        ('EncHead', dict(**SEG_LAST, num_codes=4), FOUR),
    ],
    'mmpretrain': [
        (
            'HRFuseScales',
            dict(in_channels=(8, 8, 8, 8), out_channels=8),
            FOUR,
        ),
    ],
}


CASES = [(scope, *part) for scope, parts in PARTS.items() for part in parts]


@pytest.mark.parametrize('case', CASES, ids=[case[1] for case in CASES])
def test_part(case):
    scope, name, kwargs, sides = case if len(case) == 4 else (*case, THREE)
    init_default_scope(scope)
    norm = {} if name in OWN_NORM else dict(norm_cfg=BN)
    model = far(MODELS.build(dict(type=name, **norm, **kwargs)))
    if isinstance(sides, int):
        maps = images(8, sides, sides)
    else:
        maps = tuple(images(8, side, side) for side in sides)
    assert assert_fuses(model, maps) > 0
