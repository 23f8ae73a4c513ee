"""Loading weights: what fits, what is said about it, and the released files.

That files are read safely is in test_reading.py.
"""

from logging import INFO, WARNING

import pytest
import torch
from golden import load, state_dict
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from tiny import ARCH
from torch import nn

from mmoverlock.checkpoint import CheckpointError, load_safely
from mmoverlock.engine import LoadingCheck
from mmoverlock.models import OverLoCK, weights
from mmoverlock.models.weights import (
    OUTPUT_LAYERS,
    add_prefixes,
    arch_of,
    load_pretrained,
    merge,
)


@pytest.fixture
def messages(monkeypatch):
    """What weights.py logs: (level, text)."""
    logged = []

    def log(text, logger, level):
        logged.append((level, text))

    monkeypatch.setattr(weights, 'print_log', log)
    return logged


@pytest.fixture
def save(tmp_path):
    def save(contents):
        torch.save(contents, tmp_path / 'weights.pth')
        return str(tmp_path / 'weights.pth')

    return save


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = OverLoCK(ARCH, **kwargs)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.5)
    return model


def assert_loaded(model, state, left_alone=()):
    """All tensors of a model are those of a state dict."""
    for name, tensor in model.state_dict().items():
        if not name.startswith(left_alone):
            assert torch.equal(tensor, state[name]), name


def test_released_classifier(save, messages):
    """As it is, into detectors, with one message."""
    state = state_dict(load('keys_cls_xt'))
    path = save(state)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    model = OverLoCK('xt', fuse_overview=True, init_cfg=init_cfg).double()
    model.init_weights()
    assert_loaded(model, state, OUTPUT_LAYERS)
    assert (model.extra_norm['0'].weight == 1).all()
    text = (
        f'loaded {path}: 1549 of 1563 tensors fit; missing: extra_norm.* (10),'
        ' h_proj.* (4); left out: aux_head.* (7), head.* (8)'
    )
    assert messages == [(INFO, text)]


STEM = 'patch_embed1.0.weight'
OVERVIEW = 'left out: extra_norm.* (2), h_proj.* (4)'
LAST = 'left out: patch_embedx.* (12), sub_blocks4.* (109), extra_norm.* (2)'
IMAGES = f'of another shape: {STEM} (4, 3, 3, 3) instead of (4, 5, 3, 3)'


@pytest.mark.parametrize(
    ('written', 'built', 'text'),
    [
        (dict(fuse_overview=True), {}, OVERVIEW),
        ({}, dict(out_indices=(0, 1, 2)), LAST),
        ({}, dict(in_channels=5), IMAGES),
    ],
)
def test_fits(written, built, text, save, messages):
    """Of detectors, fewer maps, other images: all but that, with a warning."""
    state, model = tiny(1, **written).state_dict(), tiny(**built)
    load_pretrained(model, save(state))
    if text == IMAGES:
        state[STEM] = tiny(**built).state_dict()[STEM]  # as initialized
    assert_loaded(model, state)
    [(level, message)] = messages
    assert level == WARNING
    assert message.endswith(f' tensors fit; {text}')


def test_forms_of_files(save, messages):
    """OpenMMLab's, DataParallel's of an old PyTorch, merged, a trainer's."""
    state = tiny(1).state_dict()
    merged = merge(state)
    old = {
        f'module.{name}': value
        for name, value in state.items()
        if not name.endswith('num_batches_tracked')
    }
    for contents, deploy in (
        ({'state_dict': add_prefixes(state)}, False),
        (old, False),
        (merged, True),
        ({'model': merged, 'epoch': 3}, True),
    ):
        model = tiny(deploy=deploy)
        load_pretrained(model, save(contents))
        assert_loaded(model, merged if deploy else state)
    assert all(text.endswith('tensors fit') for _, text in messages)


def test_merging_on_the_way_is_exact(save):
    """By the eps of the config, which is no part of a checkpoint."""
    norm_cfg = dict(type='BN', eps=0.5)
    model = tiny(1, norm_cfg=norm_cfg).double().eval()
    deployed = tiny(norm_cfg=norm_cfg, deploy=True).double().eval()
    load_pretrained(deployed, save(add_prefixes(model.state_dict())))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model(x))


BIAS = 'blocks2.0.dwconv.bias'
BRANCH = 'blocks1.0.proj.1.dil_bn_k5_1.bias'


@pytest.mark.parametrize(
    ('lacking', 'deploy', 'words'),
    [
        (BIAS, False, f'fit; missing: {BIAS}$'),
        (BRANCH, True, '0.proj.1. cannot be merged'),
        (None, False, 'reparam.*deploy=True'),
    ],
)
def test_does_not_fit(lacking, deploy, words, save):
    """An error that says why, and nothing is loaded."""
    state, model = tiny(1).state_dict(), tiny(deploy=deploy)
    if lacking:
        del state[lacking]
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(model, save(state if lacking else merge(state)))
    assert_loaded(model, tiny(deploy=deploy).state_dict())


def test_other_arch(save):
    """By names and shapes; fewer maps and merged branches are no matter."""
    with torch.device('meta'):
        model = OverLoCK('t', out_indices=(0, 1))
        merged = OverLoCK('s', deploy=True).state_dict()
    words = (
        r'does not fit the model: it looks like OverLoCK of depths \[1.* and '
        r'channels \[8, 16.*, and the model is OverLoCK t: change the arch'
    )
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(model, save(tiny().state_dict()))
    for name, state in dict(t=model.state_dict(), s=merged).items():
        assert arch_of(add_prefixes(state), OverLoCK.arch_zoo) == name


def test_prefix(save):
    """Of two backbones in a file, the one that init_cfg names."""
    first, second = tiny(1).state_dict(), tiny(2).state_dict()
    teacher = {f'teacher.net.{name}': value for name, value in second.items()}
    path = save(add_prefixes(first) | teacher)
    for prefix in ('teacher.net', 'teacher.net.'):
        init_cfg = dict(type='Pretrained', checkpoint=path, prefix=prefix)
        model = tiny(init_cfg=init_cfg)
        model.init_weights()
        assert_loaded(model, second)
    with pytest.raises(CheckpointError, match=r'left out: backbone\.'):
        load_pretrained(model, path, 'nowhere')


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
    """A backbone, if any, and something of its own."""

    def __init__(self, seed=0, backbone=True, **kwargs):
        super().__init__()
        if backbone:
            self.backbone = tiny(seed, **kwargs)
        self.neck = nn.Linear(8, 2)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError


@pytest.fixture
def load_into(tmp_path, monkeypatch, save):
    """Load as training does, which starts with a hook of EMAHook."""
    schemes = dict(CheckpointLoader._schemes)
    monkeypatch.setattr(CheckpointLoader, '_schemes', schemes)
    load_safely()

    def load_into(model, contents, complete=False):
        average = EMAHook()
        runner = Runner(model, str(tmp_path), custom_hooks=[average])
        runner.register_hook(LoadingCheck(complete))
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
    with pytest.raises(CheckpointError) as error:
        load_into(model, {'state_dict': state}, complete=True)
    assert 'weights.pth does not fit the model: ' in str(error.value)
    assert str(error.value).endswith(words)
    load_into(model, {'state_dict': state})
    assert_loaded(model, state, ('neck.weight', f'backbone.{BIAS}'))
    [(level, text)] = messages
    assert level == WARNING and text.endswith(words)


def test_nothing_fits(load_into):
    """Into models without OverLoCK, too, which the tools take."""
    other = {'conv.weight': torch.zeros(1)}
    with pytest.raises(CheckpointError, match='no OverLoCK, but conv.weight'):
        load_into(Model(), other)
    with pytest.raises(CheckpointError, match=': 0 of 2 tensors fit'):
        load_into(Model(backbone=False), other)


def test_averaged_weights(load_into):
    """Files may have the release's names, and branches that are merged here.

    What test-time augmentation wraps is in test_configs.py.
    """
    source, model = tiny(1), Model(deploy=True)
    average = load_into(model, source.state_dict())
    for loaded in (model, average):
        assert_loaded(loaded.backbone, source.switch_to_deploy().state_dict())


def test_other_schemes_are_closed(load_into):
    for scheme in ('torchvision://', 'pavi://'):
        with pytest.raises(CheckpointError, match='file or an http'):
            CheckpointLoader.load_checkpoint(f'{scheme}resnet50')
    assert len({*CheckpointLoader._schemes.values()}) == 1
