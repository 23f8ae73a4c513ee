"""tools/publish.py: checkpoints for others."""

import hashlib

import pytest
import tiny
import torch

from mmoverlock.models import OverLoCK

tool = tiny.load_tool('publish')


def publish(folder, **checkpoint):
    torch.save(checkpoint, folder / 'in.pth')
    return tool.publish(str(folder / 'in.pth'), folder / 'out.pth')


def test_publish(tmp_path):
    """All weights, classes and colors, and nothing else of a training."""
    state = OverLoCK(tiny.ARCH).state_dict()
    of_training = {
        'state_dict': state,
        'optimizer': {'state': {}},
        'message_hub': {'runtime_info': {}},
        'meta': {
            'cfg': 'import os',
            'dataset_meta': {'classes': ('a', 'b'), 'other': 1},
        },
    }
    torch.save(of_training, tmp_path / 'in.pth')
    argv = tmp_path / 'in.pth', tmp_path / 'out' / 'model.pth'
    said = tiny.run_tool('publish', *argv)
    [path] = (tmp_path / 'out').iterdir()
    assert said.startswith(f'{path}, ')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'model-{digest[:8]}.pth'
    published = torch.load(path, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    assert published['meta'] == {'dataset_meta': {'classes': ['a', 'b']}}
    assert published['state_dict'].keys() == state.keys()
    for name, value in published['state_dict'].items():
        assert torch.equal(value, state[name]), name


def test_same_weights_same_name(tmp_path):
    weights = torch.rand(100, 100)
    first = publish(tmp_path, state_dict={'w': weights})
    second = publish(tmp_path, state_dict={'w': weights}, optimizer={})
    assert first == second
    assert publish(tmp_path, state_dict={'w': weights + 1}) != first


def test_parts_of_tensors_are_small(tmp_path):
    whole = torch.rand(1000, 100)
    path = publish(tmp_path, state_dict={'w': whole[:1]})
    assert path.stat().st_size < 4000


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['none.pth', 'out.pth'], 'none.pth'),
        (['none.pth', 'out'], 'ends in .pth: out'),
    ],
)
def test_mistakes(argv, words, mistake):
    assert words in mistake('publish', *argv)
