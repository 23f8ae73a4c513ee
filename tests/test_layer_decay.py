"""Layer-wise learning rate decay, under detectors and segmentors."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from tiny import DEEPER as TINY
from tiny import ROOT
from torch import nn

from mmoverlock.engine import LayerDecayOptimWrapperConstructor
from mmoverlock.models import OverLoCK

RATE, LR, DECAY = 0.5, 1e-3, 0.05
# Layers from the last: which power of the rate.
POWERS = {
    **{'patch_embed1': 9, 'blocks1.0': 8},
    **{'patch_embed2': 7, 'blocks2.0': 7, 'blocks2.1': 6},
    **{'patch_embed3': 5, 'blocks3.0': 5, 'patch_embed4': 4, 'blocks4.0': 4},
    **{'high_level_proj': 3, 'sub_blocks3.0': 3, 'sub_blocks3.1': 2},
    **{'patch_embedx': 1, 'sub_blocks4.0': 1, 'extra_norm': 0, 'h_proj': 0},
}


def build(model, **paramwise):
    """Groups of the optimizer by name of their one parameter."""
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise,
    )
    return groups_of(model, cfg)


def groups_of(model, cfg):
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optim_wrapper(model, cfg).optimizer
    return {
        names[id(*group['params'])]: group for group in optimizer.param_groups
    }


def test_settings():
    """Rates fall from layer to layer, at any depth; all else stays.

    So do other settings of mmengine's constructor, and frozen layers.
    """
    backbone = OverLoCK(TINY, fuse_overview=True, frozen_stages=0)
    student = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(1, 1)))
    groups = build(
        nn.ModuleDict(dict(student=student)),
        layer_decay_rate=RATE,
        custom_keys=dict(norm=dict(decay_mult=0.0), blocks2=dict(lr_mult=0.1)),
        bias_lr_mult=2.0,
    )
    learnt = {k for k, p in student.named_parameters() if p.requires_grad}
    assert groups.keys() == {f'student.{name}' for name in learnt}
    head, bias = groups.pop('student.head.weight'), 'blocks1.0.proj.4.bias'
    assert head['lr'] == LR and head['weight_decay'] == DECAY
    assert groups.pop('student.head.bias')['lr'] == 2 * LR
    for name, group in groups.items():
        name = name.removeprefix('student.backbone.')
        [power] = [
            n for key, n in POWERS.items() if name.startswith(f'{key}.')
        ]
        lr = LR * RATE**power * (0.1 if 'blocks2' in name else 1)
        if name == bias or not name.endswith('bias'):
            assert group['lr'] == pytest.approx(lr * (1 + (name == bias)))
        assert group['weight_decay'] == (0 if 'norm' in name else DECAY)


def test_config():
    """The example of drop_in says what its comment says."""
    path = ROOT / 'configs/drop_in/overlock_t_layer_decay.py'
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
        model = nn.ModuleDict(dict(backbone=backbone, neck=nn.Linear(1, 1)))
    lr = cfg.optim_wrapper.optimizer.lr
    scales = {
        name: group['lr'] / lr
        for name, group in groups_of(model, cfg.optim_wrapper).items()
    }
    assert scales['neck.weight'] == 1
    stem = scales['backbone.patch_embed1.0.weight']
    assert stem == pytest.approx(0.98**31)
    assert f'0.98^31 = {stem:.2f}' in path.read_text()
    assert len(set(scales.values())) == 32


@pytest.mark.parametrize('rate', [None, 0, 1.1])
def test_bad_rate(rate):
    paramwise = {} if rate is None else dict(layer_decay_rate=rate)
    with pytest.raises(ValueError, match=rf'\(0, 1\], got {rate}'):
        build(OverLoCK(TINY), **paramwise)


def test_other_models():
    with pytest.raises(ValueError, match='optimizer.lr'):
        LayerDecayOptimWrapperConstructor(
            dict(optimizer=dict(type='AdamW')), dict(layer_decay_rate=RATE)
        )
    with pytest.raises(ValueError, match='Linear has 0'):
        build(nn.Linear(1, 1), layer_decay_rate=RATE)
    two = nn.ModuleDict(dict(teacher=OverLoCK(TINY), student=OverLoCK(TINY)))
    with pytest.raises(ValueError, match="has 2: .*'teacher', 'student'"):
        build(two, layer_decay_rate=RATE)
