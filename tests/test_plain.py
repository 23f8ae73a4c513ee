"""OverLoCK in a program of one's own, without OpenMMLab's packages."""

from unittest import mock

import pytest
import torch
from kernels import python
from networks import IMAGES
from tiny import ARCH as TINY
from tiny import randomize

import mmoverlock
from mmoverlock import OverLoCK, OverLoCKClassifier, overlock_xt
from mmoverlock.checkpoint import CheckpointError
from mmoverlock.models import plain
from mmoverlock.models.weights import add_prefixes, merge

XT = 'xt', 'extreme-tiny'
BIAS = 'blocks1.0.dwconv.bias'


@pytest.fixture
def state(monkeypatch):
    """A classifier's weights by the release's names; 'xt' is tiny here."""
    monkeypatch.setitem(OverLoCK.arch_zoo, XT, TINY)
    return randomize(overlock_xt(aux_head=True)).state_dict()


def test_names():
    assert {*mmoverlock.__all__} <= {*dir(mmoverlock)}
    for name in mmoverlock.__all__:
        assert getattr(mmoverlock, name).__name__ == name
    with pytest.raises(AttributeError, match='overlock_l'):
        mmoverlock.overlock_l  # noqa: B018


def test_alone(state, tmp_path):
    """torch and mmengine suffice, and the log has a line on the weights.

    Kernels say what they need. Importing the package is lighter still: its
    names are lazy.
    """
    file = str(tmp_path / 'released.pth')
    torch.save(state, file)
    code = f"""
import sys
for name in 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'torchvision':
    sys.modules[name] = None
sys.modules['mmcv'] = sys.modules['triton'] = None
import mmoverlock
assert 'torch' not in sys.modules
from mmoverlock import ContMixBlock, OverLoCK, overlock_xt
import torch
OverLoCK.arch_zoo[{XT}] = {TINY}
image = torch.rand(1, 3, 64, 64)
logits = overlock_xt({file!r}, num_classes=5).eval()(image)
maps = overlock_xt({file!r}, features_only=True).eval()(image)
for name in 'depthwise_backend', 'contmix_backend':
    try:
        OverLoCK({TINY}, **{{name: 'triton'}})
    except ImportError as error:
        assert 'needs triton 3.6 or later' in str(error)
    else:
        raise AssertionError(name)
print(len(maps), *logits.shape)
"""
    out = python(code, COLUMNS='80')
    *log, last = out.splitlines()
    assert last == '4 1 5'
    assert len(log) < 8
    assert 'head.4.weight (1000, 1024, 1, 1) instead of (5, ' in out


@pytest.mark.parametrize('change', [dict, add_prefixes, merge])
@torch.no_grad()
def test_weights(change, state, tmp_path):
    """Of the release and of MMPretrain, plain and merged.

    From files, and by load_state_dict, also of another model's part.
    """
    released = OverLoCKClassifier(TINY, aux_head=True)
    released.load_state_dict(state)
    logits = released.eval()(IMAGES)
    path = str(tmp_path / 'file.pth')
    torch.save({'state_dict': change(state), 'meta': {}}, path)
    options = dict(deploy=change is merge, aux_head=change is dict)
    given, own = overlock_xt(path, **options), overlock_xt(**options)
    own.load_state_dict(change(state))
    outer = torch.nn.ModuleDict(dict(inner=overlock_xt(**options)))
    part = {f'inner.{name}': value for name, value in change(state).items()}
    outer.load_state_dict(part)
    for model in given, own, outer.inner:
        torch.testing.assert_close(model.eval()(IMAGES), logits)
    if options['aux_head']:
        part.popitem()
        with pytest.raises(RuntimeError, match='Missing key'):
            outer.load_state_dict(part)


def test_load_state_dict_of_features(state):
    """Norms of outputs, which a classifier has not, stay as they are."""
    model = overlock_xt(features_only=True)
    norm = model.extra_norm['0'].weight
    torch.nn.init.constant_(norm, 3)
    model.load_state_dict(state)
    assert norm.eq(3).all()
    assert torch.equal(model.blocks1[0].dwconv.bias, state[BIAS])
    detector = add_prefixes(model.state_dict())
    detector['backbone.extra_norm.0.weight'] = torch.full_like(norm, 5)
    model.load_state_dict(detector | {'neck.weight': torch.zeros(1)})
    assert norm.eq(5).all()


def test_other_classes_and_channels(monkeypatch, state):
    """Layers that read or make others start anew; True names the release."""
    read = mock.Mock(return_value={'state_dict': state})
    monkeypatch.setattr(plain, 'read', read)
    model = overlock_xt(True, num_classes=5, in_channels=4, aux_head=True)
    read.assert_called_once_with(
        'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
        'overlock_xt_in1k_224.pth'
    )
    own = model.state_dict()
    new = {
        name.rpartition('.')[0]
        for name in state
        if not torch.equal(own[name], state[name])
    }
    assert new == {'patch_embed1.0', 'head.4', 'aux_head.2'}
    assert 0.015 < model.head[4].weight.std() < 0.025


def test_what_does_not_fit_is_an_error(state, tmp_path):
    file = str(tmp_path / 'file.pth')
    torch.save(state, file)
    with torch.device('meta'):
        with pytest.raises(CheckpointError, match='OverLoCK xt, and the mod'):
            mmoverlock.overlock_t(file)
    torch.save({k: state[k] for k in state if 'head.0' not in k}, file)
    with pytest.raises(CheckpointError, match='missing: head.0.weight'):
        overlock_xt(file)


@torch.no_grad()
def test_parts_make_the_whole():
    model = OverLoCKClassifier(TINY, 7, drop_rate=0.5).eval()
    features = model.forward_features(IMAGES)
    logits = model.forward_head(features)
    assert torch.equal(logits, model(IMAGES))
    hidden = model.forward_head(features, pre_logits=True)
    last = model.get_classifier()(hidden[..., None, None]).flatten(1)
    torch.testing.assert_close(last, logits)
    model.train()
    dropped = model.forward_head(features, pre_logits=True).eq(0)
    assert 0.4 < dropped.float().mean() < 0.6
    model.eval()
    for settings, shape in [
        ((0,), (2, model.head_hidden_size)),
        ((0, ''), (2, 1024, 2, 3)),
        ((3, 'avg'), (2, 3)),
    ]:
        model.reset_classifier(*settings)
        assert model.num_classes == settings[0]
        assert not any(module.training for module in model.modules())
        assert model(IMAGES).shape == shape
    with pytest.raises(ValueError, match="'avg' or '', not max"):
        model.reset_classifier(3, 'max')
    model = OverLoCKClassifier(TINY, 0, aux_head=True).train()
    assert model(IMAGES).shape == (2, 1024)
