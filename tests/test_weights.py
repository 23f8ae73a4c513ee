"""Loading weights: what fits, what is said about it, and the released files.

That files are read safely is in test_reading.py.
"""

import itertools
import logging
from collections import OrderedDict

import pytest
import torch
from golden import load, state_dict
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.runner import CheckpointLoader, Runner
from tiny import ARCH as TINY
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

HEADS = ('head.', 'aux_head.')
OUTPUTS = ('extra_norm.', 'h_proj.')


def drawn(keys):
    """A state dict with the names and shapes of a released model."""
    return OrderedDict(
        (name, value.float() if value.is_floating_point() else value)
        for name, value in state_dict(load(f'keys_{keys}')).items()
    )


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """Weights and files of the released xt networks, by kind."""
    folder = tmp_path_factory.mktemp('released')
    weights = {name: drawn(f'{name}_xt') for name in ('cls', 'det', 'seg')}
    weights['reparam'] = merge(weights['cls'])
    files = {}
    for name, state in weights.items():
        files[name] = str(folder / f'{name}.pth')
        torch.save(state, files[name])
    return weights, files


@pytest.fixture
def messages(monkeypatch):
    """What weights.py logs: (level, text)."""
    logged = []
    monkeypatch.setattr(
        weights,
        'print_log',
        lambda text, logger, level: logged.append((level, text)),
    )
    return logged


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = OverLoCK(kwargs.pop('arch', TINY), **kwargs)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.5)
    return model


def saved(tmp_path, contents, name='weights.pth'):
    torch.save(contents, tmp_path / name)
    return str(tmp_path / name)


def assert_loaded(model, state, left_alone=()):
    """All tensors of a model are those of a state dict."""
    for name, tensor in model.state_dict().items():
        if not name.startswith(left_alone):
            assert torch.equal(tensor, state[name]), name


# ------------------------------------------------------ the released files


def test_init_cfg_loads_the_classifier(released, messages):
    """As it is, into detectors and segmentors, with one message."""
    weights, files = released
    init_cfg = dict(type='Pretrained', checkpoint=files['cls'])
    model = OverLoCK('xt', fuse_overview=True, init_cfg=init_cfg)
    model.init_weights()
    assert_loaded(model, weights['cls'], OUTPUTS)
    assert (model.extra_norm['0'].weight == 1).all()
    ((level, text),) = messages
    assert level == logging.INFO
    assert text == (
        f'loaded {files["cls"]}: 1549 of 1563 tensors fit; missing: '
        'extra_norm.* (10), h_proj.* (4); left out: aux_head.* (7), head.* (8)'
    )


@pytest.mark.parametrize(
    ('arch', 'keys', 'kwargs'),
    [
        ('xt', 'cls_xt', {}),
        ('t', 'cls_t', {'fuse_overview': True}),
        ('s', 'seg_s', {}),
    ],
)
def test_classifiers_fit_every_arch(arch, keys, kwargs):
    """By names and shapes; those of s are its segmentor's, less the norms."""
    with torch.device('meta'):
        state = {
            name: torch.empty(shape)
            for name, shape in load(f'keys_{keys}').items()
            if not name.startswith('extra_norm.')
        }
        model = OverLoCK(arch, **kwargs)
    result = weights.Comparison.of(state, model)
    assert all(name.startswith(OUTPUTS) for name in result.missing)
    assert all(name.startswith(HEADS) for name in result.unexpected)
    assert not result.reshaped
    assert arch_of(state, OverLoCK.arch_zoo) == arch


def test_released_files_fit_completely(released, messages):
    weights, files = released
    for kind, kwargs in (
        ('det', dict(fuse_overview=True)),
        ('seg', {}),
        ('cls', dict(classifier=True)),
    ):
        model = OverLoCK('xt', **kwargs)
        load_pretrained(model, files[kind])
        assert_loaded(model, weights[kind])
    load_pretrained(OverLoCK('xt'), files['det'])
    levels, texts = zip(*messages, strict=True)
    assert [text.partition(': ')[2] for text in texts] == [
        '1563 of 1563 tensors fit',
        '1557 of 1557 tensors fit',
        '1549 of 1549 tensors fit; left out: aux_head.* (7), head.* (8)',
        '1557 of 1557 tensors fit; left out: h_proj.* (4), extra_norm.* (2)',
    ]
    assert [*levels] == [logging.INFO] * 3 + [logging.WARNING]


def test_reparam_files_load_into_deploy(released, messages):
    weights, files = released
    assert not any('dil_' in name for name in weights['reparam'])
    from_merged = OverLoCK('xt', deploy=True)
    load_pretrained(from_merged, files['reparam'])
    assert_loaded(from_merged, weights['reparam'], OUTPUTS)
    merged_here = OverLoCK('xt', deploy=True)
    load_pretrained(merged_here, files['cls'])
    assert_loaded(merged_here, from_merged.state_dict())
    assert messages[0][1].partition(':')[2] == messages[1][1].partition(':')[2]


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_merging_on_the_way_is_exact(tmp_path, prefix):
    """With the eps of the config, which is no part of a checkpoint."""
    norm_cfg = dict(type='BN', eps=0.5)
    model = tiny(norm_cfg=norm_cfg).double().eval()
    path = saved(
        tmp_path, {prefix + k: v for k, v in model.state_dict().items()}
    )
    deployed = tiny(1, norm_cfg=norm_cfg, deploy=True).double().eval()
    load_pretrained(deployed, path)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for actual, expected in zip(deployed(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected)


def test_merging_takes_all_branches(tmp_path):
    state = tiny().state_dict()
    del state['blocks1.0.proj.1.dil_bn_k5_1.bias']
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match=r'blocks1.0.proj.1. cannot be'):
        load_pretrained(tiny(deploy=True), path)


def test_merged_weights_do_not_train(tmp_path):
    path = saved(tmp_path, merge(tiny().state_dict()))
    with pytest.raises(CheckpointError, match='reparam.*deploy=True'):
        load_pretrained(tiny(), path)


@pytest.mark.parametrize(
    'kind, arch, kwargs',
    [
        ('det', 's', {'fuse_overview': True}),
        ('reparam', 't', {'deploy': True}),
    ],
)
def test_other_arch(released, kind, arch, kwargs):
    with torch.device('meta'):
        model = OverLoCK(arch, **kwargs)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(model, released[1][kind])
    assert str(error.value) == (
        f'{released[1][kind]} does not fit the model: it looks like OverLoCK '
        f'xt, and the model is OverLoCK {arch}: change the arch or take '
        'another file'
    )


def test_arch_of():
    zoo = OverLoCK.arch_zoo
    for arch, kwargs in (
        ('xt', {}),
        ('t', {'out_indices': (0, 1)}),
        ('s', {'deploy': True}),
        ('b', {}),
    ):
        with torch.device('meta'):
            state = OverLoCK(arch, **kwargs).state_dict()
        assert arch_of(state, zoo) == arch
        assert arch_of(add_prefixes(state), zoo) == arch
    assert arch_of(tiny().state_dict(), zoo) == (
        'of depths [1, 1, 1, 1, 1, 1] and channels [8, 16, 24, 32]'
    )
    assert arch_of(nn.Linear(1, 1).state_dict(), zoo) is None


# ------------------------------------------------------------- other files


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'model': state, 'epoch': 3},
        lambda state: {f'module.{k}': v for k, v in state.items()},
        lambda state: {'state_dict': add_prefixes(state)},
    ],
)
def test_forms_of_files(tmp_path, wrap, messages):
    source = tiny(fuse_overview=True)
    path = saved(tmp_path, wrap(source.state_dict()))
    model = tiny(1, fuse_overview=True)
    load_pretrained(model, path)
    assert_loaded(model, source.state_dict())
    count = len(source.state_dict())
    assert f'{count} of {count} tensors fit' in messages[0][1]


def test_prefix(tmp_path, messages):
    """Of two backbones in a file, the one that init_cfg names."""
    first, second = tiny(1), tiny(2)
    state = {
        f'{prefix}.{name}': value
        for prefix, model in (('backbone', first), ('teacher.net', second))
        for name, value in model.state_dict().items()
    }
    path = saved(tmp_path, state)
    for prefix in ('teacher.net', 'teacher.net.'):
        init_cfg = dict(type='Pretrained', checkpoint=path, prefix=prefix)
        model = tiny(3, init_cfg=init_cfg)
        model.init_weights()
        assert_loaded(model, second.state_dict())
    with pytest.raises(CheckpointError, match=r'left out: backbone\.'):
        load_pretrained(tiny(3), path, 'nowhere')


def test_other_init_cfgs(tmp_path):
    """They come first, and all of it once."""
    path = saved(tmp_path, {**tiny(1).state_dict()})
    init_cfg = [
        dict(type='Pretrained', checkpoint=path),
        dict(type='Constant', layer='LayerNorm', val=3, bias=4),
    ]
    model = tiny(init_cfg=init_cfg)
    model.init_weights()
    assert_loaded(model, tiny(1).state_dict())
    assert model.init_cfg == init_cfg
    model.blocks1[0].dwconv.bias.data.fill_(7)
    model.init_weights()
    assert (model.blocks1[0].dwconv.bias == 7).all()


def test_other_channels(tmp_path, messages):
    path = saved(tmp_path, tiny(1).state_dict())
    model = tiny(in_channels=5)
    before = model.patch_embed1[0].weight.clone()
    load_pretrained(model, path)
    assert torch.equal(model.patch_embed1[0].weight, before)
    assert_loaded(model, tiny(1).state_dict(), 'patch_embed1.0.weight')
    ((level, text),) = messages
    assert level == logging.WARNING
    assert 'patch_embed1.0.weight (4, 3, 3, 3) instead of (4, 5, 3,' in text


def test_fewer_outputs(tmp_path, messages):
    path = saved(tmp_path, tiny(1).state_dict())
    model = tiny(out_indices=(0, 1))
    load_pretrained(model, path)
    assert_loaded(model, tiny(1).state_dict())
    ((level, text),) = messages
    assert level == logging.WARNING
    assert 'left out: patch_embed3.* (6)' in text


@pytest.mark.parametrize(
    'damage, words',
    [
        (lambda s: s.pop('blocks2.0.dwconv.bias'), 'missing: blocks2.0.dwc'),
        (
            lambda s: s.update({'blocks2.0.dwconv.bias': torch.zeros(3)}),
            r'of another shape: blocks2.0.dwconv.bias \(3,\) instead of '
            r'\(16,\)$',
        ),
        (
            lambda s: s.pop('patch_embed1.0.weight'),
            r'no OverLoCK, but patch_embed1.\* \(23\)',
        ),
    ],
)
def test_incomplete(tmp_path, damage, words):
    state = tiny(1).state_dict()
    damage(state)
    model = tiny()
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(model, saved(tmp_path, state))
    assert_loaded(model, tiny().state_dict())


# ---------------------------------------------------------------- in runners


class Model(BaseModel):
    """A backbone and something of its own."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = tiny(**kwargs)
        self.neck = nn.Linear(8, 2)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError


@pytest.fixture
def safe(monkeypatch):
    monkeypatch.setattr(
        CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes)
    )
    load_safely()


NUMBERS = itertools.count()


def make_runner(work_dir, complete=True, model=None):
    runner = Runner(
        model or Model(),
        str(work_dir),
        custom_hooks=[dict(type='EMAHook')],
        experiment_name=f'{work_dir}-{next(NUMBERS)}',
    )
    runner.register_hook(LoadingCheck(complete))
    return runner


def load_into(runner, path):
    """Load as training does, which starts with a hook of EMAHook."""
    runner._load_from = path
    runner.call_hook('before_run')
    runner.load_or_resume()


@pytest.mark.parametrize('complete', [True, False])
def test_incomplete_checkpoint(safe, tmp_path, messages, complete):
    state = Model(seed=1).state_dict()
    del state['backbone.blocks1.0.dwconv.bias']
    state['neck.weight'] = torch.zeros(3, 8)
    state['more.weight'] = torch.zeros(3)
    path = saved(tmp_path, {'state_dict': state})
    runner = make_runner(tmp_path, complete)
    text = (
        'tensors fit; missing: backbone.blocks1.0.dwconv.bias; left out: '
        'more.weight; of another shape: neck.weight (3, 8) instead of (2, 8)'
    )
    if complete:
        with pytest.raises(CheckpointError) as error:
            load_into(runner, path)
        assert f'{path} does not fit the model: ' in str(error.value)
        assert text in str(error.value)
    else:
        load_into(runner, path)
        ((level, logged),) = messages
        assert level == logging.WARNING
        assert text in logged
        assert_loaded(
            runner.model,
            state,
            ('neck.weight', 'backbone.blocks1.0.dwconv.bias'),
        )


def test_nothing_fits(safe, tmp_path):
    runner = make_runner(tmp_path, complete=False)
    path = saved(tmp_path, {'conv.weight': torch.zeros(1)})
    with pytest.raises(CheckpointError, match='no OverLoCK, but conv.weight'):
        load_into(runner, path)


def test_models_without_overlock(safe, tmp_path, messages):
    """The tools are for any model."""
    state = {'neck.weight': torch.ones(1, 3), 'neck.bias': torch.ones(1)}
    runner = make_runner(tmp_path, model=Other())
    load_into(runner, saved(tmp_path, {'state_dict': state}))
    assert_loaded(runner.model, state)
    runner = make_runner(tmp_path, model=Other())
    with pytest.raises(CheckpointError, match='model: 0 of 2 tensors fit; mi'):
        load_into(runner, saved(tmp_path, {'conv.weight': torch.ones(1)}))


class Other(BaseModel):
    def __init__(self):
        super().__init__()
        self.neck = nn.Linear(3, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError


def test_runner_takes_released_names_and_merges(safe, tmp_path):
    """A released classifier or backbone needs no conversion."""
    source = tiny(1)
    path = saved(tmp_path, source.state_dict())
    runner = make_runner(tmp_path, False, Model(deploy=True))
    load_into(runner, path)
    source.switch_to_deploy()
    assert_loaded(runner.model.backbone, source.state_dict())
    (average,) = [h for h in runner.hooks if isinstance(h, EMAHook)]
    assert_loaded(average.ema_model.module.backbone, source.state_dict())


def test_test_time_augmentation(safe, tmp_path):
    """Checkpoints are of the model that mmengine wraps for it."""
    state = Model(seed=1).state_dict()
    runner = make_runner(tmp_path)
    runner.model = Averaged(runner.model)
    load_into(runner, saved(tmp_path, {'state_dict': state}))
    assert_loaded(runner.model.module, state)


class Averaged(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        raise NotImplementedError


def test_other_schemes_are_closed(safe):
    for scheme in ('torchvision://', 'pavi://'):
        with pytest.raises(CheckpointError, match='file or an http'):
            CheckpointLoader.load_checkpoint(f'{scheme}resnet50')
    assert len({*CheckpointLoader._schemes.values()}) == 1
