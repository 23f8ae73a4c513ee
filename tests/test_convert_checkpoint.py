"""tools/convert_checkpoint.py: both ways, and what users get wrong."""

import os

import pytest
import torch
from tiny import ARCH as TINY
from tiny import run_tool
from torch import nn

from mmoverlock.models import OverLoCK
from mmoverlock.models.weights import add_prefixes, merge, take


@pytest.fixture(scope='module')
def classifier():
    """Weights of a small classifier, with the names of the release."""
    torch.manual_seed(0)
    state = OverLoCK(TINY, classifier=True).state_dict()
    for name in ('head.0.weight', 'head.4.bias', 'aux_head.2.weight'):
        state[name] = torch.randn(3)
    return state


@pytest.fixture
def convert(tmp_path):
    """Save weights, convert them, load the result."""

    def run(contents, *options):
        torch.save(contents, tmp_path / 'src.pth')
        argv = tmp_path / 'src.pth', tmp_path / 'dst.pth', *options
        said = run_tool('convert_checkpoint', *argv)
        result = torch.load(tmp_path / 'dst.pth', weights_only=True)
        return result, said

    return run


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_release_to_openmmlab(classifier, convert, tmp_path):
    result, said = convert(classifier)
    assert result.keys() == {'state_dict'}
    names = {
        name: ('head.' if 'head.' in name else 'backbone.') + name
        for name in classifier
    }
    assert names['aux_head.2.weight'] == 'head.aux_head.2.weight'
    expected = {names[name]: weight for name, weight in classifier.items()}
    assert_same(result['state_dict'], expected)
    assert said == (
        f'{tmp_path}/dst.pth: OverLoCK of depths [1, 1, 1, 1, 1, 1] and '
        f'channels [8, 16, 24, 32], classifier, {len(classifier)} tensors, '
        'with the names of OpenMMLab\n'
    )


def test_openmmlab_to_release(classifier, convert):
    """Of a training checkpoint, the weights."""
    contents = {
        'state_dict': add_prefixes(classifier),
        'optimizer': {'state': {}},
        'meta': {'epoch': 3},
    }
    result, said = convert(contents)
    assert_same(result, classifier)
    assert 'names of the release' in said
    assert said.endswith('; left out: optimizer, meta\n')


def test_backbone(classifier, convert):
    backbone = OverLoCK(TINY, fuse_overview=True).state_dict()
    result, said = convert(backbone)
    assert ', backbone, ' in said
    expected = {f'backbone.{name}': w for name, w in backbone.items()}
    assert_same(result['state_dict'], expected)
    result, _ = convert(expected, '--overwrite')
    assert_same(result, backbone)


@pytest.mark.parametrize('kind', ['release', 'detector'])
def test_backbone_only(classifier, convert, kind):
    contents = classifier
    if kind == 'detector':
        contents = add_prefixes(classifier)
        contents['neck.fc.weight'] = torch.zeros(1)
    result, said = convert(contents, '--backbone-only')
    heads = 'head.', 'aux_head.'
    expected = {
        name: weight
        for name, weight in classifier.items()
        if not name.startswith(heads)
    }
    assert_same(result, expected)
    assert ', backbone, ' in said


def test_reparam(classifier, convert):
    """The deploy form, which both ways have; what is merged stays so."""
    result, said = convert(classifier, '--reparam')
    assert said.endswith('names of OpenMMLab, branches merged\n')
    weights = take(result['state_dict'], 'backbone.')
    plain = OverLoCK(TINY, classifier=True)
    plain.load_state_dict(
        {k: v for k, v in classifier.items() if k in plain.state_dict()}
    )
    assert_same(weights, plain.switch_to_deploy().state_dict())
    back, _ = convert(result, '--overwrite')
    assert_same(back, merge(classifier))
    again, _ = convert(back, '--reparam', '--overwrite')
    assert_same(again['state_dict'], result['state_dict'])


# ---------------------------------------------------------------- mistakes


@pytest.fixture
def mistake(tmp_path):
    """Convert; return the one line of stderr. DST is left as it was."""

    def run(contents, dst='dst.pth', *options):
        src, dst = tmp_path / 'src.pth', tmp_path / dst
        if contents is not None:
            torch.save(contents, src)
        before = dst.read_bytes() if dst.exists() else None
        message = run_tool('convert_checkpoint', src, dst, *options, status=2)
        assert before == (dst.read_bytes() if dst.exists() else None)
        assert not [*tmp_path.glob('*.part')]
        assert message.startswith('convert_checkpoint.py: ')
        assert message.count('\n') == 1
        return message

    return run


def test_nothing_to_convert(classifier, mistake):
    detector = add_prefixes(classifier)
    detector['neck.fc.weight'] = torch.zeros(1)
    message = mistake(detector)
    assert 'has neck.fc.weight' in message
    assert '--backbone-only' in message


def test_bad_files(mistake, classifier, tmp_path):
    assert 'src.pth: ' in mistake(None)
    assert 'must end in .pth' in mistake(classifier, 'dst.txt')
    state = nn.Linear(1, 1).state_dict()
    assert 'has no OverLoCK, but weight, bias' in mistake(state)
    (tmp_path / 'dst.pth').write_text('precious')
    assert 'dst.pth exists; --overwrite replaces it' in mistake(classifier)


def test_full_disk(mistake, classifier, tmp_path, monkeypatch):
    """What was there before stays."""
    (tmp_path / 'dst.pth').write_text('precious')

    def fail(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    message = mistake(classifier, 'dst.pth', '--overwrite')
    assert 'cannot write' in message and 'No space left on device' in message
    assert (tmp_path / 'dst.pth').read_text() == 'precious'
