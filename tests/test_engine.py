"""What mmengine can name: optimizers, averages, hooks.

Their configs are in test_configs.py.
"""

import copy
import pickle

import pytest
import torch
from mmengine import registry
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper, build_optim_wrapper
from networks import IMAGES, backbone, loss_of
from tiny import DEEPER as TINY
from torch import nn

from mmoverlock import cli, engine
from mmoverlock.engine import ForeachExponentialMovingAverage
from mmoverlock.models import OverLoCK


def test_names():
    """All that the package has is there under its name, and OverLoCK."""
    known = vars(registry).values()
    tables = [r.module_dict for r in known if isinstance(r, registry.Registry)]
    for name in engine.__all__:
        kind = getattr(engine, name)
        assert any(table.get(name) is kind for table in tables), name
    assert 'OverLoCK' in registry.MODELS


def build_runner(folder, **settings):
    cfg = dict(
        work_dir=str(folder),
        launcher='none',
        model=dict(type='BaseDataPreprocessor'),
    )
    return cli.build_runner(Config(cfg | settings), complete=True)


def test_hooks_of_tools(tmp_path):
    """Each of them once, also those that the config names."""
    named = [dict(type='Reseed'), dict(type='CurvesHook')]
    runner = build_runner(tmp_path, custom_hooks=named)
    hooks = [type(hook).__name__ for hook in runner.hooks]
    ordered = 'LoadingCheck', 'AverageStatistics', 'CheckpointHook'
    for name in (*ordered, 'Reseed', 'CurvesHook'):
        assert hooks.count(name) == 1
    assert [name for name in hooks if name in ordered] == [*ordered]


def test_scaled_rates(tmp_path):
    """By the images of a step, for which gradients are accumulated."""
    runner = build_runner(
        tmp_path,
        train_dataloader=dict(batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD'), accumulative_counts=4),
        auto_scale_lr=dict(enable=True, base_batch_size=16),
    )
    weight = nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([weight], lr=0.1))
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    assert wrapper.get_lr()['lr'] == [pytest.approx(0.05)]
    assert runner.cfg.auto_scale_lr.base_batch_size == 16


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
    """An optimizer's wrapper, and its groups by names of parameters."""
    rates = {} if lr is None else dict(lr=lr)
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', weight_decay=DECAY, fused=True, **rates),
        paramwise_cfg=paramwise,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    wrapper = build_optim_wrapper(model, cfg)
    groups = wrapper.optimizer.param_groups
    return wrapper, {names[id(p)]: g for g in groups for p in g['params']}


@pytest.mark.parametrize('path', ['', 'student.backbone.'])
def test_layer_decay(path):
    """Rates fall from layer to layer, at any depth; all else stays.

    So do other settings of mmengine's constructor, and frozen layers.
    """
    model = OverLoCK(TINY, fuse_overview=True, frozen_stages=0)
    if path:
        student = nn.ModuleDict(dict(backbone=model, head=nn.Linear(1, 1)))
        model = nn.ModuleDict(dict(student=student))
    keys = dict(norm=dict(decay_mult=0.0), blocks2=dict(lr_mult=0.1))
    _, groups = build(model, layer_decay_rate=RATE, custom_keys=keys)
    assert len({*map(id, groups.values())}) < 25  # of 10 layers
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == trained
    for name, group in groups.items():
        own = name.removeprefix(path)
        powers = [n for k, n in POWERS.items() if own.startswith(f'{k}.')]
        [power] = [0] if 'head' in name else powers
        lr = LR * RATE**power * (0.1 if 'blocks2' in name else 1)
        assert group['lr'] == pytest.approx(lr), name
        assert group['weight_decay'] == (0 if 'norm' in name else DECAY), name


@pytest.mark.parametrize(
    ('nets', 'settings', 'words'),
    [
        (['a'], {}, r'\(0, 1\], got None'),
        (['a'], dict(layer_decay_rate=0), r'\(0, 1\], got 0'),
        (['a'], dict(layer_decay_rate=1.1), r'\(0, 1\], got 1.1'),
        (['a'], dict(layer_decay_rate=RATE, lr=None), 'optimizer.lr'),
        ([], dict(layer_decay_rate=RATE), 'ModuleDict has 0'),
        (['a', 'b'], dict(layer_decay_rate=RATE), "has 2: .*'a', 'b'"),
    ],
)
def test_mistakes(nets, settings, words):
    model = nn.ModuleDict({name: OverLoCK(TINY) for name in nets})
    model.head = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=words):
        build(model, **settings)


def test_gradients_have_the_strides_of_parameters():
    """Fused operators on GPUs take no others, though sides of 1 have any."""
    model = backbone()
    wrapper, _ = build(model, layer_decay_rate=RATE)
    loss_of(model(IMAGES)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    conv = model.high_level_proj.weight
    conv.grad = conv.grad.as_strided(conv.shape, (conv.shape[1], 1, 7, 7))
    wrapper.step()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, grad)


class Network(nn.Module):
    """With buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.tied = nn.Linear(3, 3, bias=False)
        self.register_buffer('scratch', torch.zeros(2), persistent=False)

    @torch.no_grad()
    def move(self):
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
