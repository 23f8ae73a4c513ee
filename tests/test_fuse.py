"""Fusion for inference: the same outputs from fewer operations."""

import copy
from functools import partial

import pytest
import torch
from fusion import assert_fuses, far
from networks import backbone, noise
from tiny import DEEPER
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import register_parametrization

from mmoverlock.models import OverLoCK
from mmoverlock.models.fuse import fuse
from mmoverlock.models.layers import DWConv


@pytest.mark.parametrize('form', [{}, dict(fuse_overview=True, deploy=True)])
def test_backbone(form):
    """The released weights are in test_plain.py."""
    model = far(backbone(**form))
    assert_fuses(model, noise(2, 3, 96, 64).double())
    for module in model.modules():
        assert not isinstance(module, _BatchNorm)
        assert not getattr(module, 'residual', False)
    assert not any(p.requires_grad for p in model.parameters())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


# Ways to have a module compute something else than its class and weights say.
CHANGES = {
    'hook': lambda m: m.register_forward_hook(lambda *args: 2 * args[-1]),
    'pre-hook': lambda m: m.register_forward_pre_hook(lambda _, x: 2 * x[0]),
    'forward': lambda m: setattr(
        m, 'forward', lambda *x, old=m.forward: 2 * old(*x)
    ),
    'parametrized': lambda m: register_parametrization(m, 'weight', Doubled()),
}


class DoublingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train()


class Reversed(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


class Taps(nn.Module):
    """Reads the layers of a sequence, and what is between them, too."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        outs = [self.layers(x), self.layers[0].weight, self.layers[0](x)]
        for layer in self.layers:
            x = layer(x)
            outs.append(x)
        return outs


class Levels(nn.Module):
    """Every level has the same convolution, and a norm of its own."""

    def __init__(self, *norms):
        super().__init__()
        conv = nn.Conv2d(4, 4, 3)
        self.levels = nn.ModuleList(nn.Sequential(conv, n) for n in norms)

    def forward(self, x):
        return [level(x) for level in self.levels]


def sequence(conv=None, norm=None):
    return nn.Sequential(
        conv or nn.Conv2d(4, 4, 3), norm or nn.BatchNorm2d(4), nn.ReLU()
    )


def changed(change, layer=None):
    model = sequence()
    change(model if layer is None else model[layer])
    return model


def batch_norm(**kwargs):
    return nn.BatchNorm2d(4, **kwargs)


# What is built, and how many convolutions are fused.
SEQUENCES = {
    'nested': (lambda: nn.Sequential(sequence(), batch_norm(), sequence()), 2),
    'no affine': (lambda: sequence(norm=batch_norm(affine=False)), 1),
    'SyncBN': (lambda: sequence(norm=nn.SyncBatchNorm(4)), 1),
    'taps': (lambda: Taps(nn.Conv2d(4, 4, 3), batch_norm()), 1),
    'levels': (lambda: Levels(*(batch_norm() for _ in range(3))), 3),
    'shared norm': (lambda: Levels(*[batch_norm()] * 2), 1),
    'reversed': (lambda: Reversed(batch_norm(), nn.Conv2d(4, 4, 3)), 0),
    'norm before': (lambda: sequence(batch_norm(), nn.Conv2d(4, 4, 3)), 0),
    'other convolution': (lambda: sequence(DoublingConv(4, 4, 3)), 0),
    'other norm': (lambda: sequence(norm=DoublingNorm(4)), 0),
    'no statistics': (
        lambda: sequence(norm=batch_norm(track_running_stats=False)),
        0,
    ),
    'training': (lambda: sequence(norm=AlwaysTraining(4, momentum=0.0)), 0),
    'residual': (lambda: sequence(DWConv(4, residual=True)), 0),
    'hook': (lambda: changed(CHANGES['hook']), 1),  # it still runs
    'forward': (lambda: changed(CHANGES['forward']), 0),
    **{
        f'{name} of layer {i}': (partial(changed, change, i), 0)
        for name, change in CHANGES.items()
        for i in (0, 1)
    },
}


@pytest.mark.parametrize('name', SEQUENCES)
def test_sequence(name):
    build, count = SEQUENCES[name]
    assert assert_fuses(far(build()), noise(2, 4, 9, 8).double()) == count


def test_fused_again():
    """What is fused can be copied, moved, and fused again."""
    norm = batch_norm()
    model = far(nn.Sequential(sequence(norm=norm), sequence(norm=norm)))
    x = noise(2, 4, 9, 8).double()
    expected = fuse(model)(x)
    copied = fuse(copy.deepcopy(model))
    nn.init.zeros_(norm.fused.weight)
    torch.testing.assert_close(copied(x), expected)
    torch.testing.assert_close(
        copied.float()(x.float()).double(), expected, rtol=1e-4, atol=1e-4
    )


CONV_MODULES = {  # settings, and how many convolutions are fused
    'padding': (dict(padding=1, padding_mode='reflect'), 1),
    'groups': (dict(groups=2), 1),
    "mmcv's convolution": (dict(conv_cfg=dict(type='Conv')), 1),
    'activation first': (dict(order=('act', 'conv', 'norm')), 1),
    'norm last': (dict(order=('conv', 'act', 'norm')), 0),
    'group norm': (dict(norm_cfg=dict(type='GN', num_groups=2)), 0),
    'spectral norm': (dict(with_spectral_norm=True), 0),
    'standardized': (dict(conv_cfg=dict(type='ConvWS')), 0),
    'transposed': (dict(conv_cfg=dict(type='deconv')), 0),
}


@pytest.mark.parametrize('name', CONV_MODULES)
def test_conv_module(name):
    """mmcv's, whose parts others may call or leave out."""
    ConvModule = pytest.importorskip('mmcv.cnn').ConvModule
    kwargs, count = CONV_MODULES[name]
    model = far(ConvModule(4, 4, 3, **dict(norm_cfg=dict(type='BN')) | kwargs))

    def call(x):
        return model(x), model(x, norm=False), model(x, activate=False)

    assert assert_fuses(model, noise(2, 4, 9, 8).double(), call=call) == count


PARTS = (
    'patch_embed2.0',
    'patch_embedx.h_proj.1',
    'blocks1.0.proj.1.dil_bn_k5_1',
    'blocks1.0.proj.1.lk_origin',
    'blocks1.0.proj.8',
    'blocks3.0.dwconv',
    'blocks3.0.ls',
    'blocks4.0.proj.2',
    'sub_blocks3.0.proj.1',
    'sub_blocks4.0.mlp.4',
    'sub_blocks4.0.h_scale',
)


class Reader(nn.Module):
    """Has another use for parts of a backbone, or for their weights."""

    def __init__(self, backbone, parts):
        super().__init__()
        self.backbone = backbone
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        weights = [part.weight.clone() for part in self.parts]
        return self.backbone(x), weights


@pytest.mark.parametrize('change', [*CHANGES, 'shared', 'tied'])
def test_parts_that_stay(change):
    """Those of a block that have a hook, say, or another reader."""
    model = network = far(backbone())
    parts = [network.get_submodule(name) for name in PARTS]
    if change == 'shared':
        model = Reader(network, parts)
    elif change == 'tied':
        ties = [nn.Module() for _ in parts]
        for tie, part in zip(ties, parts, strict=True):
            tie.weight = part.weight
        model = Reader(network, ties)
    else:
        for part in parts:
            CHANGES[change](part)
    before = [[*map(torch.clone, part.parameters())] for part in parts]
    assert_fuses(model, noise(2, 3, 64, 64).double())
    if change == 'tied':  # weights stay, the parts may have others
        return
    for name, part, weights in zip(PARTS, parts, before, strict=True):
        assert network.get_submodule(name) is part, name
        assert all(map(torch.equal, part.parameters(), weights)), name


class Subclass(OverLoCK):
    """Reads what is between a convolution and its norm."""

    def forward(self, x):
        return super().forward(x), self.patch_embed1[0](x)


def test_what_is_changed_by_class():
    """A backbone, whose pairs get copies, and a layer of a branch."""
    model = far(Subclass(DEEPER))
    conv = model.blocks1[0].proj[1]
    conv.lk_origin.__class__ = DoublingConv
    # The four pairs of the stem, and those of the five other downsamplings.
    assert assert_fuses(model, noise(2, 3, 64, 64).double()) == 9
    assert conv.branches
