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
        print('mode:', torch.get_deterministic_debug_mode())
        print('cudnn:', torch.backends.cudnn.deterministic)
        print('cublas:', os.environ['CUBLAS_WORKSPACE_CONFIG'])


def register():
    """Importing this module has registered the hook."""


@pytest.mark.parametrize(
    'task',
    [
        'classifier',
        *(
            pytest.param(task, marks=pytest.mark.slow)
            for task in ('detector', 'segmentor')
        ),
    ],
)
def test_seeds(task, tmp_path):
    """With worker processes; the report of the last is read, too."""
    config = getattr(tiny, task)(tmp_path, custom_hooks=[dict(type='Report')])
    states = []
    for name in ('first', 'again'):
        work_dir = tmp_path / name
        output = forked.run(
            *(config, '--work-dir', work_dir, '--seed', 3),
            *('--deterministic', '--cfg-options'),
            'train_dataloader.num_workers=2',
            'train_dataloader.persistent_workers=True',
            'train_cfg.val_interval=9',
            log=work_dir.with_suffix('.log'),
            prepare=register,
        )
        path = (work_dir / 'last_checkpoint').read_text()
        states.append(torch.load(path, weights_only=False)['state_dict'])
    first, again = states
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert weight.isfinite().all()
    assert 'mode: 1' in output  # which warns
    assert 'put_' in output and 'UserWarning' in output
    assert 'cudnn: True' in output
    assert 'cublas: :4096:8' in output
