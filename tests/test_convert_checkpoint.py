"""Checkpoints that tools/convert_checkpoint.py and tools/publish.py write."""

import hashlib
import os
from functools import partial
from unittest import mock

import pytest
import tiny
import torch

from mmoverlock.models import OverLoCK
from mmoverlock.models.weights import HEADS, add_prefixes, take

assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(scope='module')
def classifier():
    """Weights of a small classifier, with the names of the release."""
    torch.manual_seed(0)
    state = OverLoCK(tiny.ARCH, classifier=True).state_dict()
    for name in ('head.0.weight', 'head.4.bias', 'aux_head.2.weight'):
        state[name] = torch.randn(3)
    return state


@pytest.fixture
def convert(tmp_path):
    """Save a checkpoint and convert it; the result, and what is said."""

    def convert(contents, *options, status=0):
        src, dst = tmp_path / 'src.pth', tmp_path / 'out' / 'dst.pth'
        torch.save(contents, src)
        argv = 'convert_checkpoint', src, dst, '--overwrite', *options
        said = tiny.run_tool(*argv, status=status)
        [file] = dst.parent.iterdir()
        return torch.load(file, weights_only=True), said

    return convert


def test_both_ways(classifier, convert):
    """Of a training checkpoint, the weights."""
    result, said = convert(classifier)
    assert result.keys() == {'state_dict'}
    expected = {
        ('head.' if 'head.' in name else 'backbone.') + name: weight
        for name, weight in classifier.items()
    }
    assert_same(result['state_dict'], expected)
    assert f', classifier, {len(classifier)} tensors, with the n' in said
    assert said.endswith(' of OpenMMLab\n')
    result, said = convert(result | {'optimizer': {}, 'meta': {'epoch': 3}})
    assert_same(result, classifier)
    assert said.endswith(' of the release; left out: optimizer, meta\n')


def test_backbone(classifier, convert):
    """Of a classifier or detector, and as it is."""
    backbone = {
        name: weight
        for name, weight in classifier.items()
        if not name.startswith(HEADS)
    }
    detector = {'neck.fc.weight': torch.zeros(1), **add_prefixes(classifier)}
    for contents in (classifier, detector):
        result, said = convert(contents, '--backbone-only')
        assert_same(result, backbone)
        assert ', backbone, ' in said
    result, _ = convert(backbone)
    assert_same(take(result['state_dict'], 'backbone.'), backbone)


def test_reparam(classifier, convert):
    """The deploy form, which both ways have; what is merged stays so."""
    result, said = convert(classifier, '--reparam')
    assert said.endswith(' of OpenMMLab, branches merged\n')
    model = OverLoCK(tiny.ARCH, classifier=True)
    model.load_state_dict(classifier, strict=False)
    merged = model.switch_to_deploy().state_dict()
    assert_same(take(result['state_dict'], 'backbone.'), merged)
    back, _ = convert(result, '--reparam')
    assert_same({name: back[name] for name in merged}, merged)


def test_disk_is_full(classifier, convert, monkeypatch):
    """The file that was there before stays."""
    before, _ = convert(classifier)
    full = OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', mock.Mock(side_effect=full))
    after, said = convert({'a': torch.ones(1), **classifier}, status=2)
    assert 'No space left on device' in said
    assert_same(after['state_dict'], before['state_dict'])


def test_publish(tmp_path):
    """All weights, classes and colors, and nothing else of a training.

    Parts of tensors are saved as if they were whole.
    """
    large = torch.rand(1000, 100)

    def publish(weight, meta):
        state = {'state_dict': {'w': weight}, 'optimizer': {}, 'meta': meta}
        torch.save(state, tmp_path / 'src.pth')
        argv = tmp_path / 'src.pth', tmp_path / 'out' / 'dst.pth'
        said = tiny.run_tool('publish', *argv)
        [path] = (tmp_path / 'out').iterdir()
        assert said.startswith(f'{path}, ')
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert path.name == f'dst-{digest[:8]}.pth'
        published = torch.load(path, weights_only=True)
        assert torch.equal(published.pop('state_dict')['w'], weight)
        about = {'classes': ['a', 'b']}
        assert published == {'meta': {'dataset_meta': about}}
        path.unlink()
        return content

    about = {'classes': ('a', 'b'), 'other': 1}
    content = publish(large[:1], {'cfg': 'a', 'dataset_meta': about})
    mmcv = {key.upper(): value for key, value in about.items()}
    assert publish(large[:1], mmcv) == content
    assert len(content) < 4000
    meta = {'cfg': 'b', 'dataset_meta': {'classes': ['a', 'b']}}
    assert publish(large[:1].clone(), meta) == content
    assert publish(large[1:2], meta) != content
