"""Equal seeds give equal weights."""

import os

import forked
import pytest
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

tiny.need_openmmlab()


@HOOKS.register_module()
class Report(Hook):
    """Prints how deterministic the process is that trains."""

    def before_train(self, runner):
        # There is no way to do this that is deterministic.
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        mode = torch.get_deterministic_debug_mode()
        cudnn = torch.backends.cudnn.deterministic
        print('found:', mode, cudnn, os.environ['CUBLAS_WORKSPACE_CONFIG'])


@pytest.mark.parametrize(
    'task',
    [
        'classifier',
        pytest.param('detector', marks=pytest.mark.slow),
        pytest.param('segmentor', marks=pytest.mark.slow),
    ],
)
def test_seeds(task, tmp_path):
    """With worker processes; what has no deterministic way warns."""
    config = getattr(tiny, task)(tmp_path, custom_hooks=[dict(type='Report')])
    states = []
    for name in ('first', 'again'):
        output = forked.run(
            *('train', config, '--work-dir', tmp_path / name, '--seed', 3),
            *('--deterministic', '--cfg-options'),
            'train_dataloader.num_workers=2',
            'train_dataloader.persistent_workers=True',
            'train_cfg.val_interval=9',
            folder=tmp_path,
            prepare=Report,  # which is registered by its import
        )
        path = (tmp_path / name / 'last_checkpoint').read_text()
        states.append(torch.load(path, weights_only=False)['state_dict'])
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert all(weight.isfinite().all() for weight in states[0].values())
    assert 'found: 1 True :4096:8' in output
    assert 'put_' in output and 'UserWarning' in output
