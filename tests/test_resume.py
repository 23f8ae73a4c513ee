"""A killed training resumes as if it had not been killed."""

import errno
import itertools
import os
import random
import shutil
import time
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler

from mmoverlock.checkpoint import (
    CheckpointError,
    SafeBackend,
    latest_checkpoint,
    read,
)
from mmoverlock.engine.hooks import Reseed

tiny.need_openmmlab()


def assert_equal_states(path, other):
    """Everything but times is equal, bit by bit."""
    states = [torch.load(file, weights_only=False) for file in (path, other)]
    weights = ('state_dict', 'ema_state_dict', 'optimizer')
    parts = [{k: s.get(k, 0) for k in weights} for s in states]
    torch.testing.assert_close(*parts, rtol=0, atol=0)
    first, second = (state.get('param_schedulers') for state in states)
    assert first == second
    logs = [state['message_hub']['log_scalars'] for state in states]
    assert np.array_equal(*(log['train/loss']._log_history for log in logs))


def test_disk_is_full(tmp_path, monkeypatch):
    """While a checkpoint is written; resumed, it is equal, bit by bit.

    Random numbers too: of flips, crops, dropped paths and the order.
    The config that mmcv's checkpoints have, which mmengine takes for code,
    does not run, and what a checkpoint names as the last best, which
    CheckpointHook deletes, is forgotten where it is not of this run.
    """
    config = tiny.classifier(
        tmp_path,
        custom_hooks=[dict(type='EMAHook')],
        param_scheduler=[dict(type='MultiStepLR', milestones=[1, 1, 2])],
        auto_scale_lr=dict(base_batch_size=16),
    )
    work_dir, expected = tmp_path / 'work', tmp_path / 'expected.pth'
    argv = 'train', config, '--work-dir', work_dir, '--seed', 7, '--resume'
    worker = 'train_dataloader.num_workers=1'
    argv += '--auto-scale-lr', '--cfg-options', worker

    def fsync(file):
        for part in work_dir.glob('epoch_2.pth.part'):
            shutil.copy(part, expected)
            raise OSError(errno.EFBIG, 'File too large')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        log = tiny.run_tool(*argv, status=2)
    assert 'Traceback' not in log
    path = work_dir / 'epoch_2.pth'
    assert log.endswith(f"train.py: [Errno 27] File too large: '{path}'\n")
    assert not [*work_dir.glob('*.part')] and not path.exists()
    last = work_dir / 'epoch_1.pth'
    assert latest_checkpoint(work_dir) == str(last)

    marker = tmp_path / 'marker'
    contents = torch.load(last, weights_only=False)
    contents['meta']['config'] = f'import os\nos.mkdir({str(marker)!r})\n'
    best = {
        'best_ckpt_a': str(work_dir / 'best_a_epoch_1.pth'),
        'best_ckpt_b': str(work_dir / 'vis_data'),
        'best_ckpt_c': str(tmp_path / 'epoch_1.pth'),
    }
    contents['message_hub']['runtime_info'].update(best)
    contents['message_hub']['resumed_keys'].update(dict.fromkeys(best, True))
    torch.save(contents, last)
    for name in ('best_x_epoch_9.pth.part', 'last_checkpoint'):
        (work_dir / name).write_text('')  # killed meanwhile
    log = tiny.run_tool(*argv)
    assert not marker.exists()
    assert f'Load checkpoint from {last}' in log
    assert 'resumed epoch: 1' in log and 'Epoch(train) [1]' not in log
    assert 'Scaling the original LR by 0.25' in log
    assert_equal_states(path, expected)
    info = read(str(path))['message_hub']['runtime_info']
    assert [k for k in info if k in best] == ['best_ckpt_a']
    best, last = sorted(path.name for path in work_dir.glob('*.pth*'))
    assert best.startswith('best_') and last == 'epoch_2.pth'
    log = tiny.run_tool(*argv, '--resume', work_dir / best, status=2)
    assert 'cannot be resumed from: it has no optimizer, param_sched' in log


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='this mmengine draws random numbers for the data it skips',
)
def test_resumed_by_iterations(tmp_path):
    """A training whose data have no epochs, before and after a validation."""
    cfg = Config.fromfile(tiny.classifier(tmp_path))
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
    flip = dict(type='RandomFlip', prob=0.5, direction='horizontal')
    cfg.val_dataloader.dataset.pipeline.insert(1, flip)
    cfg.train_cfg = dict(by_epoch=False, max_iters=3, val_interval=2)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=1
    )
    cfg.dump(tmp_path / 'config.py')
    argv = tmp_path / 'config.py', '--seed', 7, '--work-dir'
    tiny.run_tool('train', *argv, tmp_path / 'a')
    for i in 1, 2:
        resume = '--resume', tmp_path / f'a/iter_{i}.pth'
        output = tiny.run_tool('train', *argv, tmp_path / f'{i}', *resume)
        assert f'resumed epoch: 0, iter: {i}' in output
        ends = (tmp_path / name / 'iter_3.pth' for name in ('a', f'{i}'))
        assert_equal_states(*ends)


@pytest.mark.parametrize(
    ('write', 'options'),
    [
        (tiny.segmentor, 'max_iters=4 model.backbone.frozen_stages=1'),
        (tiny.classifier, 'max_epochs=3 optim_wrapper.optimizer.type=SGD'),
    ],
)
def test_other_optimizer(tmp_path, write, options):
    """Or other frozen stages: one line has the cause and the remedy."""
    argv = 'train', write(tmp_path), '--work-dir', tmp_path
    tiny.run_tool(*argv)
    argv += '--resume', '--cfg-options', *f'train_cfg.{options}'.split()
    *_, last = tiny.run_tool(*argv, status=2).splitlines()
    assert last.startswith('train.py: not resumed: ')
    assert 'frozen_stages,' in last and 'without --resume' in last


# ------------------------------------------------------------------- parts


def test_old_checkpoints_stay_until_the_next_is_there(tmp_path):
    backend = SafeBackend()
    for name in ('a.txt', 'b.pth', 'c.pth'):
        backend.put(b'', tmp_path / name)
        backend.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ['c.pth']
    backend.put(b'', tmp_path / 'c.pth')  # written again, so wanted
    assert os.listdir(tmp_path) == ['c.pth']


def test_latest(tmp_path):
    """The newest that is whole, whatever last_checkpoint says."""
    assert latest_checkpoint(tmp_path) is None
    names = 'epoch_9.pth', 'epoch_10.pth', 'other.pth', 'best_x_epoch_9.pth'
    for age, name in zip((30, 20, 10, 0), names, strict=True):
        torch.save({'weight': torch.zeros(100)}, tmp_path / name)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    first, second, other, _ = (tmp_path / name for name in names)
    last = tmp_path / 'last_checkpoint'
    # '': killed meanwhile. A best one is no state to go on from.
    for named, expected in ('', second), (first, second), (other, other):
        last.write_text(str(named))
        assert latest_checkpoint(tmp_path) == str(expected)
    # A copy, whose files are not as old as they were
    os.utime(second, (0, 0))
    last.write_text('/elsewhere/epoch_10.pth')
    assert latest_checkpoint(tmp_path) == str(second)
    last.write_text(str(other))
    other.unlink()
    os.utime(second)
    second.write_bytes(second.read_bytes()[:-100])
    assert latest_checkpoint(tmp_path) == str(first)
    # No silent start from the beginning.
    first.unlink()
    words = 'no whole.*_10.pth is trunc.*No such file.*other.pth'
    with pytest.raises(CheckpointError, match=words):
        latest_checkpoint(tmp_path)


def test_random_numbers(monkeypatch):
    """Others in every iteration and process, equal when they are resumed."""

    def draws(seed, iteration, rank):
        monkeypatch.setattr('mmoverlock.engine.hooks.get_rank', lambda: rank)
        runner = mock.Mock(seed=seed, iter=iteration)
        Reseed().before_train_iter(runner)
        return random.random(), np.random.rand(), torch.rand(1).item()

    settings = [*itertools.product((0, 2**32 - 1), (0, 7), (0, 7))]
    first = [draws(*numbers) for numbers in settings]
    for numbers in zip(*first, strict=True):
        assert len({*numbers}) == len(settings)
    assert [draws(*numbers) for numbers in settings] == first
