"""tools/convert_checkpoint.py: both ways, whole or not at all."""

import os
from unittest import mock

import pytest
import tiny
import torch

from mmoverlock.models import OverLoCK
from mmoverlock.models.weights import HEADS, add_prefixes, merge, take


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
    """Save weights, convert them; return the result and what is said."""

    def run(contents, *options):
        torch.save(contents, tmp_path / 'src.pth')
        argv = tmp_path / 'src.pth', tmp_path / 'dst.pth', '--overwrite'
        said = tiny.run_tool('convert_checkpoint', *argv, *options)
        return torch.load(tmp_path / 'dst.pth', weights_only=True), said

    return run


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_both_ways(classifier, convert, tmp_path):
    """Of a training checkpoint, the weights."""
    result, said = convert(classifier)
    assert result.keys() == {'state_dict'}
    expected = {
        ('head.' if 'head.' in name else 'backbone.') + name: weight
        for name, weight in classifier.items()
    }
    assert_same(result['state_dict'], expected)
    assert said == (
        f'{tmp_path}/dst.pth: OverLoCK of depths [1, 1, 1, 1, 1, 1] and '
        f'channels [8, 16, 24, 32], classifier, {len(classifier)} tensors, '
        'with the names of OpenMMLab\n'
    )
    result, said = convert(result | {'optimizer': {}, 'meta': {'epoch': 3}})
    assert_same(result, classifier)
    assert said.endswith('of the release; left out: optimizer, meta\n')


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
    assert said.endswith('names of OpenMMLab, branches merged\n')
    deployed = OverLoCK(tiny.ARCH, classifier=True)
    deployed.load_state_dict(classifier, strict=False)
    deployed.switch_to_deploy()
    weights = take(result['state_dict'], 'backbone.')
    assert_same(weights, deployed.state_dict())
    back, _ = convert(result, '--reparam')
    assert_same(back, merge(classifier))


def test_disk_is_full(classifier, tmp_path, monkeypatch):
    """The file that was there before stays."""
    (tmp_path / 'dst.pth').write_text('precious')
    full = OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', mock.Mock(side_effect=full))
    torch.save(classifier, tmp_path / 'src.pth')
    argv = tmp_path / 'src.pth', tmp_path / 'dst.pth', '--overwrite'
    message = tiny.run_tool('convert_checkpoint', *argv, status=2)
    assert 'No space left on device' in message
    assert sorted(os.listdir(tmp_path)) == ['dst.pth', 'src.pth']
    assert (tmp_path / 'dst.pth').read_text() == 'precious'
