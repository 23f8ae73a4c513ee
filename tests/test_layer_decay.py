"""Layer-wise learning rate decay, under detectors and segmentors."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from tiny import DEEPER as TINY
from torch import nn

from mmoverlock.engine import LayerDecayOptimWrapperConstructor
from mmoverlock.models import OverLoCK

CONFIGS = Path(__file__).parents[1] / 'configs'
RATE, LR, DECAY = 0.5, 1e-3, 0.05
# Layers from the last: which power of the rate.
POWERS = {
    'patch_embed1': 9,
    'blocks1.0': 8,
    'patch_embed2': 7,
    'blocks2.0': 7,
    'blocks2.1': 6,
    'patch_embed3': 5,
    'blocks3.0': 5,
    'patch_embed4': 4,
    'blocks4.0': 4,
    'high_level_proj': 3,
    'sub_blocks3.0': 3,
    'sub_blocks3.1': 2,
    'patch_embedx': 1,
    'sub_blocks4.0': 1,
    'extra_norm': 0,
    'h_proj': 0,
}


def wrapper_cfg(**paramwise):
    return dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise,
    )


def build(model, **paramwise):
    """Groups of the optimizer by name of their one parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optim_wrapper(model, wrapper_cfg(**paramwise)).optimizer
    groups = {}
    for group in optimizer.param_groups:
        [parameter] = group['params']
        groups[names[id(parameter)]] = group
    return groups


def power(name, prefix='backbone.'):
    if not name.startswith(prefix):
        return 0
    name = name.removeprefix(prefix)
    [found] = [v for k, v in POWERS.items() if name.startswith(f'{k}.')]
    return found


def from_config(path):
    pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
    cfg = Config.fromfile(CONFIGS / path)
    pytest.importorskip(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    'path, head',
    [
        ('mask_rcnn/overlock_xt_1x.py', 'roi_head.bbox_head.fc_cls.weight'),
        ('upernet/overlock_xt_160k.py', 'decode_head.conv_seg.weight'),
    ],
)
def test_rates(path, head):
    """Rates fall from layer to layer; weight decay is what it was."""
    model = from_config(path)
    groups = build(
        model,
        layer_decay_rate=RATE,
        custom_keys=dict(norm=dict(decay_mult=0.0)),
    )
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * RATE ** power(name)), name
        assert group['weight_decay'] == (0 if 'norm' in name else DECAY)
    assert groups[head]['lr'] == LR
    rates = {group['lr'] for group in groups.values()}
    assert len(rates) == 10


def wrapped(**kwargs):
    return nn.ModuleDict(
        dict(
            student=nn.ModuleDict(
                dict(backbone=OverLoCK(TINY, **kwargs), head=nn.Linear(1, 1))
            )
        )
    )


def test_backbone_is_found_at_any_depth():
    groups = build(wrapped(), layer_decay_rate=RATE)
    for name, group in groups.items():
        expected = LR * RATE ** power(name, 'student.backbone.')
        assert group['lr'] == pytest.approx(expected), name


def test_other_multipliers_stay():
    groups = build(
        wrapped(),
        layer_decay_rate=RATE,
        custom_keys=dict(blocks2=dict(lr_mult=0.1)),
        bias_lr_mult=2.0,
    )
    prefix = 'student.backbone.'
    mlp = groups[f'{prefix}blocks2.1.proj.4.weight']
    assert mlp['lr'] == pytest.approx(LR * 0.1 * RATE**6)
    assert groups['student.head.bias']['lr'] == pytest.approx(LR * 2)
    bias = groups[f'{prefix}blocks1.0.proj.4.bias']
    assert bias['lr'] == pytest.approx(LR * 2 * RATE**8)


def test_frozen_parameters_are_left_out():
    groups = build(wrapped(frozen_stages=1), layer_decay_rate=RATE)
    prefix = 'student.backbone.'
    assert not any(
        name.startswith((f'{prefix}patch_embed1.', f'{prefix}blocks1.'))
        for name in groups
    )
    assert groups[f'{prefix}blocks2.0.dwconv.weight']['lr'] == pytest.approx(
        LR * RATE**7
    )


def test_config():
    """The example of drop_in says what its comment says."""
    path = 'drop_in/overlock_t_layer_decay.py'
    cfg = Config.fromfile(CONFIGS / path)
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    lr = cfg.optim_wrapper.optimizer.lr
    scales = {
        names[id(group['params'][0])]: group['lr'] / lr
        for group in wrapper.optimizer.param_groups
    }
    assert scales['neck.lateral_convs.0.conv.weight'] == 1
    stem = scales['backbone.patch_embed1.0.weight']
    assert stem == pytest.approx(0.98**31)
    assert round(stem, 2) == 0.53
    assert len(set(scales.values())) == 32


@pytest.mark.parametrize('rate', [None, 0, 1.1, -0.5])
def test_bad_rate(rate):
    paramwise = {} if rate is None else dict(layer_decay_rate=rate)
    with pytest.raises(ValueError, match=rf'\(0, 1\], got {rate}'):
        build(wrapped(), **paramwise)


def test_no_learning_rate():
    with pytest.raises(ValueError, match='optimizer.lr'):
        LayerDecayOptimWrapperConstructor(
            dict(optimizer=dict(type='AdamW')), dict(layer_decay_rate=RATE)
        )


def test_other_models():
    with pytest.raises(ValueError, match='Linear has 0'):
        build(nn.Linear(1, 1), layer_decay_rate=RATE)
    two = nn.ModuleDict(dict(teacher=OverLoCK(TINY), student=OverLoCK(TINY)))
    with pytest.raises(ValueError, match="has 2: .*'teacher', 'student'"):
        build(two, layer_decay_rate=RATE)
