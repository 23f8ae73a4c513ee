"""Layer-wise learning rate decay, under detectors and segmentors."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from tiny import DEEPER as TINY
from tiny import ROOT
from torch import nn

from mmoverlock.engine import LayerDecayOptimWrapperConstructor
from mmoverlock.models import OverLoCK

CONFIGS = ROOT / 'configs'
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


def groups_of(model, cfg):
    """Groups of the optimizer by name of their one parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optim_wrapper(model, cfg).optimizer
    return {
        names[id(*group['params'])]: group for group in optimizer.param_groups
    }


def build(model, **paramwise):
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise,
    )
    return groups_of(model, cfg)


def power(name, prefix='backbone.'):
    if not name.startswith(prefix):
        return 0
    name = name.removeprefix(prefix)
    [found] = [v for k, v in POWERS.items() if name.startswith(f'{k}.')]
    return found


def from_config(path, **backbone):
    pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(CONFIGS / path)
    init_default_scope('mmdet')
    cfg.model.backbone.update(init_cfg=None, **backbone)
    with torch.device('meta'):
        return cfg, MODELS.build(cfg.model)


def test_rates():
    """Rates fall from layer to layer; weight decay is what it was."""
    _, model = from_config('mask_rcnn/overlock_xt_1x.py', arch=TINY)
    groups = build(
        model,
        layer_decay_rate=RATE,
        custom_keys=dict(norm=dict(decay_mult=0.0)),
    )
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * RATE ** power(name)), name
        assert group['weight_decay'] == (0 if 'norm' in name else DECAY)
    assert groups['roi_head.bbox_head.fc_cls.weight']['lr'] == LR
    assert len({group['lr'] for group in groups.values()}) == 10


def test_other_settings_stay():
    """At any depth, those of mmengine's constructor; frozen layers too."""
    inner = dict(backbone=OverLoCK(TINY, frozen_stages=0))
    inner['head'] = nn.Linear(1, 1)
    groups = build(
        nn.ModuleDict(dict(student=nn.ModuleDict(inner))),
        layer_decay_rate=RATE,
        custom_keys=dict(blocks2=dict(lr_mult=0.1)),
        bias_lr_mult=2.0,
    )
    prefix = 'student.backbone.'
    assert not any(f'{prefix}patch_embed1' in name for name in groups)
    for name, lr in {
        f'{prefix}blocks2.1.proj.4.weight': LR * 0.1 * RATE**6,
        f'{prefix}blocks1.0.proj.4.bias': LR * 2 * RATE**8,
        f'{prefix}blocks1.0.proj.4.weight': LR * RATE**8,
        'student.head.bias': LR * 2,
    }.items():
        assert groups[name]['lr'] == pytest.approx(lr), name


def test_config():
    """The example of drop_in says what its comment says."""
    cfg, model = from_config('drop_in/overlock_t_layer_decay.py')
    lr = cfg.optim_wrapper.optimizer.lr
    scales = {
        name: group['lr'] / lr
        for name, group in groups_of(model, cfg.optim_wrapper).items()
    }
    assert scales['neck.lateral_convs.0.conv.weight'] == 1
    stem = scales['backbone.patch_embed1.0.weight']
    assert stem == pytest.approx(0.98**31)
    assert round(stem, 2) == 0.53
    assert len(set(scales.values())) == 32


@pytest.mark.parametrize('rate', [None, 0, 1.1])
def test_bad_rate(rate):
    paramwise = {} if rate is None else dict(layer_decay_rate=rate)
    with pytest.raises(ValueError, match=rf'\(0, 1\], got {rate}'):
        build(OverLoCK(TINY), **paramwise)


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
