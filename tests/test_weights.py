"""Loading weights: what fits, and what is said about it.

That files are read safely is in test_reading.py; released ones are in
test_classification.py and test_released_models.py.
"""

import re
from logging import INFO, WARNING

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from tiny import ARCH, DEEPER
from torch import nn

from mmoverlock.checkpoint import CheckpointError, load_safely
from mmoverlock.engine import LoadingCheck
from mmoverlock.models import OverLoCK, weights
from mmoverlock.models.weights import (
    add_prefixes,
    arch_of,
    load_pretrained,
    merge,
)


@pytest.fixture
def messages(monkeypatch):
    """The log of weights.py: (text, level)."""
    logged = []
    monkeypatch.setattr(
        weights, 'print_log', lambda *args: logged.append(args[::2])
    )
    return logged


@pytest.fixture
def save(tmp_path):
    def save(contents):
        torch.save(contents, tmp_path / 'weights.pth')
        return str(tmp_path / 'weights.pth')

    return save


def tiny(seed=0, arch=ARCH, **kwargs):
    torch.manual_seed(seed)
    model = OverLoCK(arch, **kwargs)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.5)
    return model


def assert_loaded(model, state):
    """All tensors of a model are those of a state dict, which has more."""
    own = model.state_dict()
    expected = {name: state[name] for name in own}
    torch.testing.assert_close(dict(own), expected, rtol=0, atol=0)


def of_a_detector(state):
    """Of a PyTorch that did not count batches."""
    names = [n for n in state if not n.endswith('num_batches_tracked')]
    state = {name: state[name] for name in names}
    return {'state_dict': add_prefixes(state), 'meta': {}}


def of_a_trainer(state):
    return {'model': merge(state, EPS), 'epoch': 3}


def released(state):
    names = 'head.4.weight', 'head.4.bias'
    return state | dict.fromkeys(names, torch.ones(1))


EPS = 0.5  # which no checkpoint says
DEPLOY = dict(deploy=True, norm_cfg=dict(type='BN', eps=EPS))
FUSE = dict(fuse_overview=True)
NEW = 'missing: extra_norm.* (10), h_proj.* (4); left out: head.* (2)'
OVERVIEW = 'left out: extra_norm.* (2), h_proj.* (4)'
LAST = 'left out: patch_embedx.* (12), sub_blocks4.* (109), extra_norm.* (2)'
STEM = 'patch_embed1.0.weight (4, 3, 3, 3) instead of (4, 5, 3, 3)'


@pytest.mark.parametrize(
    ('written', 'form', 'built', 'level', 'end'),
    [
        ({}, of_a_detector, DEPLOY, INFO, 'fit'),
        ({}, of_a_trainer, DEPLOY, INFO, 'fit'),
        (dict(classifier=True), released, FUSE, INFO, NEW),
        (FUSE, dict, {}, WARNING, OVERVIEW),
        ({}, dict, dict(out_indices=(0, 1, 2)), WARNING, LAST),
        ({}, dict, dict(in_channels=5), WARNING, f'another shape: {STEM}'),
    ],
)
def test_fits(written, form, built, level, end, save, messages):
    """All that fits is loaded, merged on the way; the rest stays."""
    state = tiny(1, **written).state_dict()
    model, expected = tiny(**built), tiny(**built).state_dict()
    load_pretrained(model, save(form(state)))
    fitting = merge(state, EPS) if built == DEPLOY else state
    for name, weight in fitting.items():
        if name in expected and expected[name].shape == weight.shape:
            expected[name] = weight
    assert_loaded(model, expected)
    [(message, said)] = messages
    assert said == level and message.endswith(end)


BIAS = 'blocks2.0.dwconv.bias'
BRANCH = 'blocks1.0.proj.1.dil_bn_k5_1.bias'
OTHER = (
    r'it looks like OverLoCK of depths \[1, 1.* and channels \[8.*, and the '
    r'model is OverLoCK of depths \[1, 2.*: change the arch or take another'
)


@pytest.mark.parametrize(
    ('lacking', 'form', 'built', 'words'),
    [
        (BIAS, dict, {}, f'fit; missing: {BIAS}$'),
        (BRANCH, dict, DEPLOY, '0.proj.1. cannot be merged'),
        (None, merge, {}, 'reparam.*deploy=True'),
        (None, dict, dict(arch=DEEPER), OTHER),
    ],
)
def test_does_not_fit(lacking, form, built, words, save):
    """An error that says why, and nothing is loaded."""
    state, model = tiny(1).state_dict(), tiny(**built)
    state.pop(lacking, None)
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(model, save(form(state)))
    assert_loaded(model, tiny(**built).state_dict())


def test_archs_are_told_from_each_other():
    """Fewer maps and merged branches are no matter."""
    options = dict(t=dict(out_indices=(0, 1)), s=DEPLOY)
    for name, built in options.items():
        with torch.device('meta'):
            state = OverLoCK(name, **built).state_dict()
        assert arch_of(add_prefixes(state), OverLoCK.arch_zoo) == name


def test_prefix(save, messages):
    """Of two backbones in a file, the one that init_cfg names; it is said."""
    first, second = tiny(1).state_dict(), tiny(2).state_dict()
    teacher = {f'teacher.net.{name}': value for name, value in second.items()}
    path = save(add_prefixes(first) | teacher)
    for prefix in ('teacher.net', 'teacher.net.'):
        init_cfg = dict(type='Pretrained', checkpoint=path, prefix=prefix)
        model = tiny(init_cfg=init_cfg)
        model.init_weights()
        assert_loaded(model, second)
        [(text, level), _] = messages
        words = ' teacher.net.* is taken, and backbone.* left out'
        assert level == WARNING and text.endswith(words)
        messages.clear()
    with pytest.raises(CheckpointError, match=r'left out: backbone\.'):
        load_pretrained(model, path, 'nowhere')
    assert not messages


def test_other_init_cfgs(save):
    """They come first, and all of it once."""
    init_cfg = [
        dict(type='Pretrained', checkpoint=save(tiny(1).state_dict())),
        dict(type='Constant', layer='LayerNorm', val=3, bias=4),
    ]
    model = tiny(init_cfg=init_cfg)
    model.init_weights()
    assert_loaded(model, tiny(1).state_dict())
    assert model.init_cfg == init_cfg
    bias = model.blocks1[0].dwconv.bias.data.fill_(7)
    model.init_weights()
    assert (bias == 7).all()


class Model(BaseModel):
    forward = None

    def __init__(self, seed=0, **kwargs):
        super().__init__()
        self.backbone = tiny(seed, **kwargs)
        self.neck = nn.Linear(8, 2)


@pytest.fixture
def load_into(tmp_path, monkeypatch, save):
    """Load as training does, which starts with a hook of EMAHook."""
    schemes = dict(CheckpointLoader._schemes)
    monkeypatch.setattr(CheckpointLoader, '_schemes', schemes)
    load_safely()

    def load_into(model, contents, complete=False):
        average = EMAHook()
        hooks = [average, LoadingCheck(complete)]
        runner = Runner(model, str(tmp_path), custom_hooks=hooks)
        runner._load_from = save(contents)
        runner.call_hook('before_run')
        runner.load_or_resume()
        return average.ema_model.module

    return load_into


def test_incomplete_checkpoint(load_into, messages):
    """An error, or else all that fits and a warning."""
    state = Model(1).state_dict()
    del state[f'backbone.{BIAS}']
    state['neck.weight'] = torch.zeros(3, 8)
    state['more.weight'] = torch.zeros(3)
    words = (
        f'tensors fit; missing: backbone.{BIAS}; left out: more.weight; of '
        'another shape: neck.weight (3, 8) instead of (2, 8)'
    )
    model = Model()
    message = rf'weights.pth does not fit the model: .*{re.escape(words)}$'
    with pytest.raises(CheckpointError, match=message):
        load_into(model, {'state_dict': state}, complete=True)
    own = dict(model.state_dict())
    kept = {name: own[name] for name in (f'backbone.{BIAS}', 'neck.weight')}
    load_into(model, {'state_dict': state})
    assert_loaded(model, state | kept)
    [(text, level)] = messages
    assert level == WARNING and text.endswith(words)


def test_nothing_fits(load_into):
    """Into models without OverLoCK, too, which the tools take."""
    model, other = Model(), {'conv.weight': torch.zeros(1)}
    with pytest.raises(CheckpointError, match='no OverLoCK, but conv.weight'):
        load_into(model, other)
    del model.backbone
    with pytest.raises(CheckpointError, match=': 0 of 2 tensors fit'):
        load_into(model, other)


def test_averaged_weights(load_into):
    """Files may have the release's names, and branches that are merged here.

    What test-time augmentation wraps is in test_configs.py.
    """
    source, model = tiny(1), Model(deploy=True)
    average = load_into(model, source.state_dict())
    for loaded in (model, average):
        assert_loaded(loaded.backbone, source.switch_to_deploy().state_dict())


def test_other_schemes_are_closed(load_into):
    with pytest.raises(CheckpointError, match='file or an http'):
        CheckpointLoader.load_checkpoint('torchvision://resnet50')
    assert len({*CheckpointLoader._schemes.values()}) == 1
