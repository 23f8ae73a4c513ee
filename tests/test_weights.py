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


def initialized(**kwargs):
    model = OverLoCK('xt', **kwargs)
    model.init_weights()
    return model


# ------------------------------------------------------ the released files


@pytest.mark.parametrize('fuse_overview', [True, False])
def test_init_cfg_loads_the_classifier(released, messages, fuse_overview):
    """As it is, into detectors and segmentors, with one message."""
    weights, files = released
    init_cfg = dict(type='Pretrained', checkpoint=files['cls'])
    model = initialized(fuse_overview=fuse_overview, init_cfg=init_cfg)
    assert_loaded(model, weights['cls'], OUTPUTS)
    assert (model.extra_norm['0'].weight == 1).all()
    ((level, text),) = messages
    assert level == logging.INFO
    missing = (
        'extra_norm.* (10), h_proj.* (4)'
        if fuse_overview
        else 'extra_norm.* (8)'
    )
    total = 1563 if fuse_overview else 1557
    assert text == (
        f'loaded {files["cls"]}: 1549 of {total} tensors fit; '
        f'missing: {missing}; left out: aux_head.* (7), head.* (8)'
    )


@pytest.mark.parametrize(
    'arch, keys', [('xt', 'cls_xt'), ('t', 'cls_t'), ('s', 'seg_s')]
)
@pytest.mark.parametrize('kwargs', [{}, {'fuse_overview': True}])
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


def test_dense_predictors_fit_completely(released, messages):
    weights, files = released
    model = OverLoCK('xt', fuse_overview=True)
    load_pretrained(model, files['det'])
    assert_loaded(model, weights['det'])
    model = OverLoCK('xt')
    load_pretrained(model, files['seg'])
    assert_loaded(model, weights['seg'])
    load_pretrained(model, files['det'])
    assert [text.partition(': ')[2] for _, text in messages] == [
        '1563 of 1563 tensors fit',
        '1557 of 1557 tensors fit',
        '1557 of 1557 tensors fit; left out: h_proj.* (4), extra_norm.* (2)',
    ]
    levels = [level for level, _ in messages]
    assert levels == [logging.INFO, logging.INFO, logging.WARNING]


def test_classifier_form(released):
    weights, files = released
    model = OverLoCK('xt', classifier=True)
    load_pretrained(model, files['cls'])
    assert_loaded(model, weights['cls'])


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


@pytest.mark.parametrize('name', ['dil_bn_k5_1.bias', 'lk_origin.weight'])
def test_merging_takes_all_branches(tmp_path, name):
    state = tiny().state_dict()
    del state[f'blocks1.0.proj.1.{name}']
    path = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match=r'blocks1.0.proj.1. cannot be'):
        load_pretrained(tiny(deploy=True), path)


def test_merged_weights_do_not_train(released):
    with pytest.raises(CheckpointError, match='reparam.*deploy=True'):
        load_pretrained(OverLoCK('xt'), released[1]['reparam'])


@pytest.mark.parametrize(
    'kind, arch, kwargs',
    [
        ('cls', 't', {}),
        ('det', 's', {'fuse_overview': True}),
        ('cls', 't', {'deploy': True}),
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
    for arch in ('xt', 't', 's', 'b'):
        for kwargs in ({}, {'out_indices': (0, 1)}, {'deploy': True}):
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
        lambda state: {'state_dict': state},
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
    model = tiny(init_cfg=init_cfg[1])
    model.init_weights()
    assert (model.extra_norm['0'].weight == 3).all()
    tiny().init_weights()


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
    """A backbone, something of its own, and a loss."""

    def __init__(self, classes=2, **kwargs):
        super().__init__()
        self.backbone = tiny(**kwargs)
        self.neck = nn.Linear(8, classes)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        loss = self.neck(self.backbone(inputs)[0].mean((2, 3))).square().mean()
        return dict(loss=loss) if mode == 'loss' else [loss]


class Images(torch.utils.data.Dataset):
    metainfo = {'classes': ('a', 'b')}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.rand(3, 64, 64, generator=generator))


@pytest.fixture
def safe(monkeypatch):
    monkeypatch.setattr(
        CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes)
    )
    load_safely()


NUMBERS = itertools.count()


def make_runner(work_dir, complete=True, model=None, **kwargs):
    """A runner of two iterations an epoch that keeps much state."""
    runner = Runner(
        model or Model(),
        str(work_dir),
        train_dataloader=dict(
            dataset=Images(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=1,
            collate_fn=dict(type='default_collate'),
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW')),
        param_scheduler=[dict(type='MultiStepLR', milestones=[1, 1, 2])],
        train_cfg=dict(by_epoch=True, max_epochs=2),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[dict(type='EMAHook')],
        experiment_name=f'{work_dir}-{next(NUMBERS)}',
        **kwargs,
    )
    runner.register_hook(LoadingCheck(complete))
    return runner


def load_into(runner, path):
    """Load as training does, which starts with a hook of EMAHook."""
    runner._load_from = path
    runner.call_hook('before_run')
    runner.load_or_resume()


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """Work dir of a training of two epochs."""
    work_dir = tmp_path_factory.mktemp('training')
    make_runner(work_dir).train()
    return work_dir


def test_resume(safe, training, tmp_path):
    """All of mmengine's state comes back: the end is the same, bit by bit."""
    path = training / 'epoch_1.pth'
    runner = make_runner(tmp_path, load_from=str(path), resume=True)
    runner.train()
    history = runner.message_hub.get_scalar('train/loss')
    assert len(history._log_history) == 4
    ours, expected = (
        torch.load(folder / 'epoch_2.pth', weights_only=False)
        for folder in (tmp_path, training)
    )
    assert ours['meta']['iter'] == 4
    assert ours['param_schedulers'] == expected['param_schedulers']
    assert expected['ema_state_dict'].keys() == ours['ema_state_dict'].keys()
    for key in ('state_dict', 'ema_state_dict'):
        for name, weight in expected[key].items():
            assert torch.equal(ours[key][name], weight), name
    for i, moments in expected['optimizer']['state'].items():
        for key, value in moments.items():
            assert torch.equal(ours['optimizer']['state'][i][key], value)


def altered(training, tmp_path, alter):
    """A checkpoint of the training with something else in it."""
    contents = torch.load(training / 'epoch_1.pth', weights_only=False)
    alter(contents)
    return saved(tmp_path, contents)


def test_config_of_a_checkpoint_does_not_run(safe, training, tmp_path):
    """mmengine takes the config that mmcv's checkpoints have for code."""
    marker = tmp_path / 'marker'
    code = f'import os\nos.mkdir({str(marker)!r})\n'

    def alter(contents):
        contents['meta']['config'] = code

    path = altered(training, tmp_path, alter)
    runner = make_runner(tmp_path, load_from=path, resume=True)
    runner.train()
    assert not marker.exists()


@pytest.mark.parametrize('complete', [True, False])
def test_incomplete_checkpoint(safe, training, tmp_path, messages, complete):
    def alter(contents):
        del contents['state_dict']['backbone.blocks1.0.dwconv.bias']
        contents['state_dict']['neck.weight'] = torch.zeros(3, 8)
        contents['state_dict']['more.weight'] = torch.zeros(3)

    path = altered(training, tmp_path, alter)
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
            torch.load(path, weights_only=False)['state_dict'],
            ('neck.weight', 'backbone.blocks1.0.dwconv.bias'),
        )


@pytest.mark.parametrize('complete', [True, False])
def test_nothing_fits(safe, tmp_path, complete):
    runner = make_runner(tmp_path, complete)
    path = saved(tmp_path, {'conv.weight': torch.zeros(1)})
    with pytest.raises(CheckpointError, match='no OverLoCK, but conv.weight'):
        load_into(runner, path)


@pytest.mark.parametrize('complete', [True, False])
def test_models_without_overlock(safe, training, tmp_path, messages, complete):
    """The tools are for any model."""

    state = {'neck.weight': torch.ones(1, 3), 'neck.bias': torch.ones(1)}
    path = altered(training, tmp_path, lambda c: c.update(state_dict=state))
    runner = make_runner(tmp_path, complete, Other())
    load_into(runner, path)
    assert_loaded(runner.model, state)
    runner = make_runner(tmp_path, complete, Other())
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


def test_test_time_augmentation(safe, training, tmp_path):
    """Checkpoints are of the model that mmengine wraps for it."""
    path = str(training / 'epoch_1.pth')
    state = torch.load(path, weights_only=False)['state_dict']
    runner = make_runner(tmp_path)
    runner.model = Averaged(runner.model)
    load_into(runner, path)
    assert_loaded(runner.model.module, state)


class Averaged(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        raise NotImplementedError


def test_foreign_best_checkpoint_is_not_deleted(safe, training, tmp_path):
    """CheckpointHook deletes what a checkpoint names as the last best."""
    mine = tmp_path / 'best_a_epoch_1.pth'
    names = {
        'best_ckpt': tmp_path.parent,
        'best_ckpt_a': mine,
        'best_ckpt_b': tmp_path / 'vis_data',
        'best_ckpt_c': training / 'epoch_1.pth',
    }

    def alter(contents):
        hub = contents['message_hub']
        for key, path in names.items():
            hub['runtime_info'][key] = str(path)
            hub['resumed_keys'][key] = True

    path = altered(training, tmp_path, alter)
    runner = make_runner(tmp_path, load_from=path, resume=True)
    runner.train()
    info = runner.message_hub.runtime_info
    kept = {k: v for k, v in info.items() if k.startswith('best_ckpt')}
    assert kept == {'best_ckpt_a': str(mine)}


def test_other_schemes_are_closed(safe):
    schemes = [*CheckpointLoader._schemes]
    assert {'', 'https://', 'torchvision://', 'pavi://'} <= set(schemes)
    for scheme in ('torchvision://', 'openmmlab://', 'mmcls://', 'pavi://'):
        with pytest.raises(CheckpointError, match='file or an http'):
            CheckpointLoader.load_checkpoint(f'{scheme}resnet50')
    loaders = {id(loader) for loader in CheckpointLoader._schemes.values()}
    assert len(loaders) == 1
