"""Layer-wise learning rate decay; its config is in test_configs.py."""

import pytest
from mmengine.optim import build_optim_wrapper
from tiny import DEEPER as TINY
from torch import nn

from mmoverlock.engine import LayerDecayOptimWrapperConstructor as Constructor
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


def build(model, lr=LR, **paramwise):
    """Groups of the optimizer by name of their one parameter."""
    rates = {} if lr is None else dict(lr=lr)
    cfg = dict(
        constructor=Constructor.__name__,
        optimizer=dict(type='AdamW', weight_decay=DECAY, **rates),
        paramwise_cfg=paramwise,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    return {names[id(*group['params'])]: group for group in groups}


def rate_of(name):
    """Of a parameter of the backbone, by its power."""
    [power] = [n for key, n in POWERS.items() if name.startswith(f'{key}.')]
    return LR * RATE**power


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
    )
    learnt = {k for k, p in student.named_parameters() if p.requires_grad}
    assert groups.keys() == {f'student.{name}' for name in learnt}
    for name in ('student.head.weight', 'student.head.bias'):
        head = groups.pop(name)
        assert head['lr'] == LR and head['weight_decay'] == DECAY
    for name, group in groups.items():
        name = name.removeprefix('student.backbone.')
        lr = rate_of(name) * (0.1 if 'blocks2' in name else 1)
        assert group['lr'] == pytest.approx(lr)
        assert group['weight_decay'] == (0 if 'norm' in name else DECAY)


def test_backbone_by_itself():
    groups = build(OverLoCK(TINY), layer_decay_rate=RATE)
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(rate_of(name))


NETS = dict(
    none=nn.Linear(1, 1),
    one=OverLoCK(TINY),
    two=nn.ModuleDict(dict(teacher=OverLoCK(TINY), student=OverLoCK(TINY))),
)


@pytest.mark.parametrize(
    ('net', 'settings', 'words'),
    [
        ('one', {}, r'\(0, 1\], got None'),
        ('one', dict(layer_decay_rate=0), r'\(0, 1\], got 0'),
        ('one', dict(layer_decay_rate=1.1), r'\(0, 1\], got 1.1'),
        ('one', dict(layer_decay_rate=RATE, lr=None), 'optimizer.lr'),
        ('none', dict(layer_decay_rate=RATE), 'Linear has 0'),
        ('two', dict(layer_decay_rate=RATE), "has 2: .*'teacher', 'student'"),
    ],
)
def test_mistakes(net, settings, words):
    with pytest.raises(ValueError, match=words):
        build(NETS[net], **settings)
