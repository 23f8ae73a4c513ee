"""tools/publish.py: checkpoints for others."""

import hashlib

import tiny
import torch

from mmoverlock.models import OverLoCK

tool = tiny.load_tool('publish')


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
    """Parts of tensors are saved as if they were whole."""

    def publish(weight, **others):
        file = tmp_path / 'in.pth'
        torch.save({'state_dict': {'w': weight}, **others}, file)
        return tool.publish(str(file), tmp_path / 'out.pth')

    weights = torch.rand(1000, 100)
    path = publish(weights[:1])
    assert path == publish(weights[:1].clone(), optimizer={})
    assert path.stat().st_size < 4000
    assert publish(weights[1:2]) != path


def test_mistakes(mistake):
    assert 'none.pth' in mistake('publish', 'none.pth', 'out.pth')
    assert 'ends in .pth: out' in mistake('publish', 'none.pth', 'out')
