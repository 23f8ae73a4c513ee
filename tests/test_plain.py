"""OverLoCK in a program of one's own, without OpenMMLab's packages."""

import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from golden import load, state_dict

import mmoverlock
from mmoverlock import OverLoCKClassifier, overlock_xt
from mmoverlock.checkpoint import CheckpointError
from mmoverlock.models import plain
from mmoverlock.models.fuse import fuse
from mmoverlock.models.weights import add_prefixes, merge

TINY = dict(
    depths=(1, 1, 1, 1),
    channels=(8, 16, 16, 32),
    focus_depths=(1, 1),
    focus_heads=(2, 2),
)
PARAMETERS = {  # the release's, without and with the auxiliary head
    'xt': (16969600, 17307272),
    't': (34476448, 34990472),
    's': (57795748, 58309772),
    'b': (97434816, 98012968),
}
STATE = OrderedDict(
    (name, value.float() if value.is_floating_point() else value)
    for name, value in state_dict(load('keys_cls_xt')).items()
)


@pytest.fixture(scope='module')
def image():
    torch.manual_seed(0)
    return torch.rand(1, 3, 64, 96)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'released.pth'
    torch.save(STATE, path)
    return str(path)


@pytest.fixture(scope='module')
def logits(file, image):
    with torch.no_grad():
        return overlock_xt(file).eval()(image)


@pytest.mark.parametrize('arch', PARAMETERS)
def test_parameters(arch):
    with torch.device('meta'):
        model = getattr(mmoverlock, f'overlock_{arch}')(aux_head=True)
    counts = [sum(weight.numel() for weight in model.parameters())]
    model.aux_head = None
    counts.insert(0, sum(weight.numel() for weight in model.parameters()))
    assert tuple(counts) == PARAMETERS[arch]


def test_it_computes_what_the_release_computes():
    """See golden.py; that of OverLoCK and its heads is in test_parity.py."""
    from golden import assert_agrees, image

    figures = load('cls_xt_224')
    model = overlock_xt().double().eval()
    model.load_state_dict(state_dict(load('keys_cls_xt')))
    with torch.no_grad():
        outputs = model(image(figures['input']))
    assert_agrees('logits', outputs, figures['outputs']['logits'])


def test_without_openmmlab(file, tmp_path):
    """torch and mmengine suffice, and the log has a line on the weights."""
    code = f"""
import sys
for name in 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'torchvision':
    sys.modules[name] = None
import torch
from mmoverlock import ContMixBlock, overlock_xt
image = torch.rand(1, 3, 64, 64)
logits = overlock_xt({file!r}, num_classes=5).eval()(image)
maps = overlock_xt({file!r}, features_only=True).eval()(image)
print(len(maps), *logits.shape)
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'COLUMNS': '80'},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *log, last = done.stdout.splitlines()
    assert last == '4 1 5'
    assert len(log) < 8
    assert 'head.4.weight (1000, 1024, 1, 1) instead of (5, ' in done.stdout


def test_names_are_lazy():
    code = 'import sys, mmoverlock; print("torch" in sys.modules, end=" ")'
    code += '\nmmoverlock.OverLoCK; print("torch" in sys.modules)'
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert output.split()[:2] == ['False', 'True']
    for name in mmoverlock.__all__:
        assert getattr(mmoverlock, name).__name__ == name
        assert name in dir(mmoverlock)
    with pytest.raises(AttributeError, match='overlock_l'):
        mmoverlock.overlock_l  # noqa: B018


@pytest.mark.parametrize('form', ['openmmlab', 'merged'])
def test_pretrained_files(form, tmp_path, image, logits):
    """Of the release and of MMPretrain, plain and merged."""
    state = add_prefixes(STATE) if form == 'openmmlab' else merge(STATE)
    path = str(tmp_path / 'file.pth')
    torch.save({'state_dict': state, 'meta': {}}, path)
    model = overlock_xt(path, deploy=form == 'merged').eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('change', [dict, add_prefixes])
@pytest.mark.parametrize('aux_head', [False, True])
def test_load_state_dict(change, aux_head, image, logits):
    model = overlock_xt(aux_head=aux_head).eval()
    model.load_state_dict(change(STATE))
    with torch.no_grad():
        assert torch.equal(model(image), logits)
    # As a part of another model too.
    outer = torch.nn.ModuleDict(dict(inner=overlock_xt(aux_head=aux_head)))
    part = {f'inner.{name}': value for name, value in change(STATE).items()}
    outer.load_state_dict(part)
    assert torch.equal(outer.inner.head[4].bias, STATE['head.4.bias'])
    part.pop(next(reversed(part)))
    if aux_head:
        with pytest.raises(RuntimeError, match='Missing key'):
            outer.load_state_dict(part)


def test_load_state_dict_of_features():
    """Norms of outputs, which a classifier has not, stay as they are."""
    model = overlock_xt(features_only=True)
    norm = model.extra_norm['0'].weight
    torch.nn.init.constant_(norm, 3)
    model.load_state_dict(STATE)
    assert norm.eq(3).all()
    assert torch.equal(
        model.state_dict()['blocks1.0.dwconv.bias'],
        STATE['blocks1.0.dwconv.bias'],
    )
    detector = add_prefixes({k: v for k, v in model.state_dict().items()})
    detector['backbone.extra_norm.0.weight'] = torch.full_like(norm, 5)
    detector['neck.weight'] = torch.zeros(1)
    model.load_state_dict(detector)
    assert norm.eq(5).all()


def test_other_classes_and_channels(file, image):
    model = overlock_xt(file, num_classes=5, in_channels=4, aux_head=True)
    assert model.head[4].weight.shape == (5, 1024, 1, 1)
    assert model.aux_head[2].weight.shape == (5, 336, 1, 1)
    assert torch.equal(model.head[0].weight, STATE['head.0.weight'])
    assert torch.equal(model.aux_head[0].weight, STATE['aux_head.0.weight'])
    assert 0.015 < model.head[4].weight.std() < 0.025
    assert model.patch_embed1[0].weight.shape[1] == 4


def test_pretrained_true_names_the_release(monkeypatch):
    asked = []

    def read(source):
        asked.append(source)
        return {'state_dict': STATE}

    monkeypatch.setattr(plain, 'read', read)
    overlock_xt(pretrained=True)
    assert asked == [
        'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
        'overlock_xt_in1k_224.pth'
    ]


def test_what_does_not_fit_is_an_error(file, tmp_path):
    with pytest.raises(CheckpointError, match='OverLoCK xt, and the model'):
        mmoverlock.overlock_t(file)
    state = {k: v for k, v in STATE.items() if not k.startswith('head.0')}
    torch.save(state, tmp_path / 'no_head.pth')
    with pytest.raises(CheckpointError, match='missing: head.0.weight'):
        overlock_xt(str(tmp_path / 'no_head.pth'))
    with pytest.raises(TypeError, match='drop_pth'):
        overlock_xt(drop_pth=0.1)


def test_auxiliary_head_in_training():
    model = OverLoCKClassifier(TINY, 7, aux_head=True)
    images = torch.rand(2, 3, 64, 64)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 7)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert model.eval()(images).shape == (2, 7)


def test_every_parameter_gets_a_gradient():
    model = OverLoCKClassifier(TINY, 7)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_parts_make_the_whole():
    model = OverLoCKClassifier(TINY, 7).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (2, model.num_features, 2, 3)
        assert torch.equal(model.forward_head(features), model(images))
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, 1024)
        last = model.get_classifier()
        expected = last(hidden[..., None, None]).flatten(1)
        torch.testing.assert_close(model(images), expected)
        model.reset_classifier(0)
        assert torch.equal(model(images), hidden)
        model.reset_classifier(0, '')
        assert model(images).shape == (2, 1024, 2, 3)
        model.reset_classifier(3, 'avg')
        assert model(images).shape == (2, 3)
    with pytest.raises(ValueError, match="'avg' or '', not max"):
        model.reset_classifier(3, 'max')


def test_no_classes():
    model = OverLoCKClassifier(TINY, 0, aux_head=True).train()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 1024)
    assert model.num_classes == 0


def test_dropout_is_before_the_last_layer():
    model = OverLoCKClassifier(TINY, 7, drop_rate=0.5)
    features = torch.rand(2, model.num_features, 2, 2)
    zeros = model.forward_head(features, pre_logits=True).eq(0).float()
    assert 0.4 < zeros.mean() < 0.6
    model.eval()
    assert not model.forward_head(features, pre_logits=True).eq(0).any()


def test_fuse(file, image, logits):
    model = fuse(overlock_xt(file))
    torch.testing.assert_close(model(image), logits, atol=1e-4, rtol=1e-4)
