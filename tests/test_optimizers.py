"""Groups of parameters and averages; their configs are in test_configs.py."""

import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from tiny import DEEPER as TINY
from torch import nn

from mmoverlock.engine import ForeachExponentialMovingAverage
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


def build(
    model,
    lr=LR,
    constructor='LayerDecayOptimWrapperConstructor',
    **paramwise,
):
    """Groups of the optimizer by names of their parameters."""
    rates = {} if lr is None else dict(lr=lr)
    cfg = dict(
        constructor=constructor,
        optimizer=dict(type='AdamW', weight_decay=DECAY, **rates),
        paramwise_cfg=paramwise,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    return {names[id(p)]: group for group in groups for p in group['params']}


def test_groups():
    """One for each setting in use; all settings are mmengine's."""
    model = nn.ModuleDict(dict(backbone=OverLoCK(TINY), head=nn.Linear(1, 1)))
    keys = dict(norm=dict(decay_mult=0.0), head=dict(lr_mult=10.0))
    expected, groups = (
        build(model, constructor=name, custom_keys=keys)
        for name in (
            'DefaultOptimWrapperConstructor',
            'GroupedOptimWrapperConstructor',
        )
    )
    assert len({*map(id, groups.values())}) == 3
    assert groups.keys() == expected.keys()
    for name, group in groups.items():
        settings = expected[name] | dict(params=group['params'])
        assert group == settings, name


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
    assert len({*map(id, groups.values())}) < 25  # of 10 layers
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


class Network(nn.Module):
    """With buffers of all kinds, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.tied = nn.Linear(3, 3, bias=False)
        self.register_buffer('scratch', torch.zeros(2), persistent=False)

    def move(self):
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.add_(1)


@pytest.mark.parametrize('update_buffers', [False, True])
def test_averages(update_buffers):
    """Those of mmengine, of every second of some steps."""
    torch.manual_seed(0)
    network = Network()
    options = dict(momentum=0.3, interval=2, update_buffers=update_buffers)
    expected, average = (
        kind(network, **options)
        for kind in (ExponentialMovingAverage, ForeachExponentialMovingAverage)
    )
    for step in range(6):
        network.move()
        if step == 3:  # another model, and one that was saved in between
            network = copy.deepcopy(network)
            average = pickle.loads(pickle.dumps(average))
        for each in (expected, average):
            each.update_parameters(network)
        states = average.module.state_dict(), expected.module.state_dict()
        torch.testing.assert_close(*states)
        torch.testing.assert_close(
            average.module.scratch, expected.module.scratch
        )
    assert average.steps == expected.steps == 6


def test_tied_weights_are_averaged_once():
    network = Network()
    network.tied.weight = network.layers[0].weight
    average = ForeachExponentialMovingAverage(network, momentum=0.25)
    average.update_parameters(network)
    start = network.tied.weight.clone()
    network.move()
    average.update_parameters(network)
    torch.testing.assert_close(average.module.tied.weight, start + 0.25)


@pytest.mark.parametrize(
    'constructor',
    ['GroupedOptimWrapperConstructor', 'LayerDecayOptimWrapperConstructor'],
)
def test_gradients_have_the_strides_of_parameters(constructor, monkeypatch):
    """Fused operators on GPUs take no others, though sides of 1 have any."""
    model = OverLoCK(TINY)
    optimizer = dict(type='AdamW', lr=0.1, fused=True)
    paramwise = dict(layer_decay_rate=0.5)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor=constructor,
            optimizer=optimizer,
            paramwise_cfg=paramwise,
        ),
    )
    maps = model(torch.randn(2, 3, 64, 64))
    sum(x.square().mean() for x in maps).backward()
    conv = model.high_level_proj.weight
    conv.grad = conv.grad.contiguous(memory_format=torch.channels_last)
    before = [p.grad.clone() for p in model.parameters()]

    def strides(tensors):
        return [t.stride() for t in tensors]

    assert strides(model.parameters()) != strides(before)
    lists = []
    step = torch._fused_adamw_

    def check(params, grads, *args, **kwargs):
        lists.append((strides(params), strides(grads)))
        step(params, grads, *args, **kwargs)

    monkeypatch.setattr(torch, '_fused_adamw_', check)
    wrapper.step()
    assert lists
    for ours, theirs in lists:
        assert ours == theirs
    grads = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads, before, rtol=0, atol=0)
