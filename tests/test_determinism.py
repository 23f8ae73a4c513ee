"""Equal seeds give equal weights."""

import os

import forked
import pytest
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


@HOOKS.register_module()
class Report(Hook):
    """Prints how deterministic the process is that trains."""

    def before_train(self, runner):
        # There is no way to do this that is deterministic.
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        print('mode:', torch.get_deterministic_debug_mode())
        print('cudnn:', torch.backends.cudnn.deterministic)
        print('cublas:', os.environ['CUBLAS_WORKSPACE_CONFIG'])


def train(config, work_dir, seed, *options, prepare=None):
    """Train with worker processes; return the weights and the output."""
    workers = ('num_workers=2', 'persistent_workers=True')
    output = forked.run(
        *(config, '--work-dir', work_dir, '--seed', seed, '--deterministic'),
        *('--cfg-options', *(f'train_dataloader.{w}' for w in workers)),
        *options,
        log=work_dir.with_suffix('.log'),
        prepare=prepare,
    )
    [path] = [*work_dir.glob('epoch_2.pth'), *work_dir.glob('iter_2.pth')]
    return torch.load(path, weights_only=False)['state_dict'], output


def differing(weights, others):
    return {
        name
        for name in weights
        if not torch.equal(weights[name], others[name])
    }


@pytest.mark.parametrize('task', ['classifier', 'detector', 'segmentor'])
def test_seeds(task, tmp_path):
    config = getattr(tiny, task)(tmp_path)
    options = ['train_cfg.max_epochs=2'] if task == 'detector' else []
    first, again, other = (
        train(config, tmp_path / name, seed, *options)[0]
        for name, seed in (('first', 3), ('again', 3), ('other', 4))
    )
    assert not differing(first, again)
    assert all(weight.isfinite().all() for weight in first.values())
    assert any('blocks1' in name for name in differing(first, other))


def report():
    """Importing this module has registered the hook."""


def test_deterministic_operators(tmp_path):
    """Where there is no deterministic operator, a warning."""
    config = tiny.classifier(tmp_path, custom_hooks=[dict(type='Report')])
    _, output = train(config, tmp_path / 'work', 3, prepare=report)
    assert 'mode: 1' in output  # which warns
    assert 'put_' in output and 'UserWarning' in output
    assert 'cudnn: True' in output
    assert 'cublas: :4096:8' in output
