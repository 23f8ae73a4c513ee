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
    """The released weights are in test_parity.py."""
    model = far(backbone(**form))
    weights = [*model.parameters()]
    before = [weight.clone() for weight in weights]
    assert_fuses(model, noise(2, 3, 96, 64).double())
    for module in model.modules():
        assert not isinstance(module, _BatchNorm)
        assert not getattr(module, 'residual', False)
    assert not any(p.requires_grad for p in model.parameters())
    # Others may hold them.
    torch.testing.assert_close(weights, before, rtol=0, atol=0)


conv = partial(nn.Conv2d, 4, 4, 3)
batch_norm = partial(nn.BatchNorm2d, 4)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Adapter:
    def forward(self, *args):
        return 2 * super().forward(*args)


# Ways to have a module compute something else than its class and weights say.
CHANGES = {
    'hook': lambda m: m.register_forward_hook(lambda *args: 2 * args[-1]),
    'pre-hook': lambda m: m.register_forward_pre_hook(lambda _, x: 2 * x[0]),
    'forward': lambda m: setattr(
        m, 'forward', lambda *x, old=m.forward: 2 * old(*x)
    ),
    'class': lambda m: setattr(
        m, '__class__', type('Adapted', (Adapter, type(m)), {})
    ),
    'parametrized': lambda m: register_parametrization(m, 'weight', Doubled()),
}


class Levels(nn.Module):
    """Every level has the same convolution, and a norm of its own.

    The convolution is read by itself, too.
    """

    def __init__(self, *norms):
        super().__init__()
        self.conv = conv()
        self.levels = nn.ModuleList(sequence(self.conv, n) for n in norms)

    def forward(self, x):
        outs = [level(x) for level in self.levels]
        return [*outs, self.conv(x), self.conv.weight]


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train()


def sequence(*layers):
    return nn.Sequential(*(layers or (conv(), batch_norm())), nn.ReLU())


def changed(change, layer=None):
    model = sequence()
    change(model if layer is None else model[layer])
    return model


SEQUENCES = {  # how many convolutions are fused
    'nested': (nn.Sequential(sequence(), batch_norm(), sequence()), 2),
    'no affine': (sequence(conv(), batch_norm(affine=False)), 1),
    'SyncBN': (sequence(conv(), nn.SyncBatchNorm(4)), 1),
    'levels': (Levels(*(batch_norm() for _ in range(3))), 3),
    'shared norm': (Levels(*[batch_norm()] * 2), 1),
    'norm before': (sequence(batch_norm(), conv()), 0),
    'transposed': (sequence(nn.ConvTranspose2d(4, 4, 3), batch_norm()), 0),
    'no statistics': (
        sequence(conv(), batch_norm(track_running_stats=False)),
        0,
    ),
    'training': (sequence(conv(), AlwaysTraining(4, momentum=0.0)), 0),
    'residual': (sequence(DWConv(4, residual=True), batch_norm()), 0),
    'hook': (changed(CHANGES['hook']), 1),  # it still runs
    'forward': (changed(CHANGES['forward']), 0),
    'class': (changed(CHANGES['class']), 0),
    **{
        f'{name} of layer {i}': (changed(change, i), 0)
        for name, change in CHANGES.items()
        for i in (0, 1)
    },
}


@pytest.mark.parametrize('name', SEQUENCES)
def test_sequence(name):
    model, count = SEQUENCES[name]
    assert assert_fuses(far(model), noise(2, 4, 9, 8).double()) == count


def test_fused_again():
    """A fused model can be copied, moved, and fused again."""
    norm = batch_norm()
    model = far(nn.Sequential(sequence(conv(), norm), sequence(conv(), norm)))
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
    "mmcv's convolution": (dict(conv_cfg=dict(type='Conv')), 1),
    'activation first': (dict(order=('act', 'conv', 'norm')), 1),
    'norm last': (dict(order=('conv', 'act', 'norm')), 0),
    'group norm': (dict(norm_cfg=dict(type='GN', num_groups=2)), 0),
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


@pytest.mark.parametrize('change', [*CHANGES, 'shared'])
def test_parts_that_stay(change):
    """Those of a block that have a hook, say, or another holder."""
    model = network = far(backbone())
    parts = [network.get_submodule(name) for name in PARTS]
    if change == 'shared':
        model = nn.ModuleList([network, *parts])
    for part in parts if change in CHANGES else ():
        CHANGES[change](part)
    before = [[*map(torch.clone, part.parameters())] for part in parts]
    assert_fuses(model, noise(2, 3, 64, 64).double(), call=network)
    for name, part, weights in zip(PARTS, parts, before, strict=True):
        assert network.get_submodule(name) is part, name
        assert all(map(torch.equal, part.parameters(), weights)), name


class Subclass(OverLoCK):
    """Reads what is between a convolution and its norm."""

    def forward(self, x):
        return super().forward(x), self.patch_embed1[0](x)


def test_a_subclass():
    """Its pairs get copies."""
    model = far(Subclass(DEEPER))
    # The four pairs of the stem, and those of the five other downsamplings.
    assert assert_fuses(model, noise(2, 3, 64, 64).double()) == 9
