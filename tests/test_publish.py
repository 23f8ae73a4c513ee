"""tools/publish.py: checkpoints for others."""

import hashlib
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import load_tool, write_model

tool = load_tool('publish')


def test_whole_model(tmp_path, capsys):
    pytest.importorskip('mmdet')
    config, checkpoint = write_model('det', tmp_path)
    state = torch.load(checkpoint)['state_dict']
    of_training = {
        'state_dict': state,
        'optimizer': {'state': {}},
        'message_hub': {'runtime_info': {}},
        'meta': {
            'cfg': 'import os',
            'dataset_meta': {'classes': ('a', 'b'), 'other': 1},
        },
    }
    torch.save(of_training, checkpoint)
    tool.main([checkpoint, str(tmp_path / 'out' / 'model.pth')])
    [path] = (tmp_path / 'out').iterdir()
    assert capsys.readouterr().out.startswith(f'{path}, ')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'model-{digest[:8]}.pth'
    published = torch.load(path, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    assert published['meta'] == {'dataset_meta': {'classes': ['a', 'b']}}
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.load_state_dict(published['state_dict'])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def publish(folder, **checkpoint):
    torch.save(checkpoint, folder / 'in.pth')
    return tool.publish(str(folder / 'in.pth'), folder / 'out.pth')


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
    'arguments, words',
    [
        (['none.pth', 'out.pth'], 'none.pth'),
        (['in.pth', 'out'], 'ends in .pth: out'),
    ],
)
def test_mistakes(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({'w': torch.zeros(1)}, 'in.pth')
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith('publish.py: ') and words in message
    assert [*Path().iterdir()] == [Path('in.pth')]
