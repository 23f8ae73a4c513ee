"""tools/publish.py: checkpoints for others."""

import hashlib

import tiny
import torch


def test_publish(tmp_path):
    """All weights, classes and colors, and nothing else of a training.

    Parts of tensors are saved as if they were whole.
    """
    large = torch.rand(1000, 100)

    def publish(weight, meta):
        state = {'state_dict': {'w': weight}, 'optimizer': {}, 'meta': meta}
        torch.save(state, tmp_path / 'in.pth')
        argv = tmp_path / 'in.pth', tmp_path / 'out' / 'model.pth'
        said = tiny.run_tool('publish', *argv)
        [path] = (tmp_path / 'out').glob('*.pth')
        assert said.startswith(f'{path}, ')
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert path.name == f'model-{digest[:8]}.pth'
        published = torch.load(path, weights_only=True)
        assert published.keys() == {'meta', 'state_dict'}
        assert torch.equal(published['state_dict']['w'], weight)
        path.unlink()
        return published['meta'], content

    about = {'classes': ('a', 'b'), 'other': 1}
    meta, content = publish(large[:1], {'cfg': 'a', 'dataset_meta': about})
    assert meta == {'dataset_meta': {'classes': ['a', 'b']}}
    assert len(content) < 4000
    about = {'classes': ['a', 'b']}
    same = publish(large[:1].clone(), {'cfg': 'b', 'dataset_meta': about})
    assert same[1] == content
    assert publish(large[1:2], {'dataset_meta': about})[1] != content
