"""A killed training resumes as if it had not been killed."""

import builtins
import io
import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import forked
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

EPOCHS, KILLS = 6, 20  # of the slow test
OPEN = open


def assert_equal_states(path, other):
    """Everything but times is equal, bit by bit."""
    state, expected = (
        torch.load(p, weights_only=False) for p in (path, other)
    )
    for key in {'state_dict', 'ema_state_dict', 'optimizer'} & expected.keys():
        torch.testing.assert_close(state[key], expected[key], rtol=0, atol=0)
    assert state.get('param_schedulers') == expected.get('param_schedulers')
    histories = [
        item['message_hub']['log_scalars']['train/loss']._log_history
        for item in (state, expected)
    ]
    assert np.array_equal(*histories)


class Killed(BaseException):
    """In place of a signal, where the process has more to do."""


def stop():
    raise Killed


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class KilledWhileWriting:
    """Ends a process while it writes a checkpoint.

    Args:
        before (int): How many checkpoints it writes before that one.
        share (float): How much of that one it writes, between 0 and 1.
        end (callable): Ends it. Defaults to SIGKILL.
    """

    before: int
    share: float
    end: Callable = kill

    def __call__(self):
        builtins.open = self.open

    def open(self, file, mode='r', *args, **kwargs):
        if '.pth' not in str(file) or mode != 'wb':
            return OPEN(file, mode, *args, **kwargs)
        self.before -= 1
        return OPEN(file, mode) if self.before >= 0 else Half(file, mode, self)


class Half(io.FileIO):
    def __init__(self, file, mode, killing):
        super().__init__(file, mode)
        self.killing = killing

    def write(self, data):
        self.killing.data = data
        super().write(data[: int(len(data) * self.killing.share)])
        self.killing.end()


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """A training of two epochs, stopped when the second was to be written.

    Returns its command line, its work dir, and what was to be written.
    """
    folder = tmp_path_factory.mktemp('killed')
    config = tiny.classifier(
        folder,
        custom_hooks=[dict(type='EMAHook')],
        param_scheduler=[dict(type='MultiStepLR', milestones=[1, 1, 2])],
    )
    argv = config, '--work-dir', folder / 'work', '--seed', 7, '--resume'
    argv += '--cfg-options', 'train_dataloader.num_workers=1'
    killing = KilledWhileWriting(before=3, share=0.5, end=stop)
    with pytest.raises(Killed):
        with mock.patch('builtins.open', killing.open):
            tiny.run_tool('train', *argv)
    (folder / 'expected.pth').write_bytes(killing.data)
    return argv, folder / 'work', folder / 'expected.pth'


def test_disk_is_full(killed):
    """A short message; the last good checkpoint is intact."""
    argv, work_dir, _ = killed
    assert [path.name for path in work_dir.glob('*.part')] == [
        'epoch_2.pth.part'
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        log = tiny.run_tool('train', *argv, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'Traceback' not in log
    assert 'train.py: cannot write ' in log and 'epoch_2.pth' in log
    assert '--resume' in log.splitlines()[-1]
    assert latest_checkpoint(work_dir) == str(work_dir / 'epoch_1.pth')
    assert not [*work_dir.glob('*.part')]


def test_resumed(killed, tmp_path):
    """To what was to be written, bit by bit.

    Random numbers too: of flips, crops, dropped paths and the order.
    The config that mmcv's checkpoints have, which mmengine takes for code,
    does not run, and what a checkpoint names as the last best, which
    CheckpointHook deletes, is forgotten where it is not of this run.
    """
    argv, work_dir, expected = killed
    marker, last = tmp_path / 'marker', work_dir / 'epoch_1.pth'
    contents = torch.load(last, weights_only=False)
    contents['meta']['config'] = f'import os\nos.mkdir({str(marker)!r})\n'
    names = {
        'best_ckpt_a': work_dir / 'best_a_epoch_1.pth',
        'best_ckpt_b': work_dir / 'vis_data',
        'best_ckpt_c': tmp_path / 'epoch_1.pth',
    }
    for key, path in names.items():
        contents['message_hub']['runtime_info'][key] = str(path)
        contents['message_hub']['resumed_keys'][key] = True
    torch.save(contents, last)
    (work_dir / 'best_x_epoch_9.pth.part').touch()  # killed meanwhile
    output = tiny.run_tool('train', *argv)
    assert not marker.exists()
    assert f'Load checkpoint from {last}' in output
    assert 'resumed epoch: 1' in output
    assert_equal_states(work_dir / 'epoch_2.pth', expected)
    info = read(str(work_dir / 'epoch_2.pth'))['message_hub']['runtime_info']
    kept = {k: v for k, v in info.items() if k in names}
    assert kept == {'best_ckpt_a': str(names['best_ckpt_a'])}
    best, last = sorted(path.name for path in work_dir.glob('*.pth*'))
    assert best.startswith('best_') and last == 'epoch_2.pth'


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='this mmengine draws random numbers for the data it skips',
)
def test_resumed_by_iterations(tmp_path):
    """A training whose data have no epochs; its validation draws numbers."""
    cfg = Config.fromfile(tiny.classifier(tmp_path))
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
    flip = dict(type='RandomFlip', prob=0.5, direction='horizontal')
    cfg.val_dataloader.dataset.pipeline.insert(1, flip)
    cfg.train_cfg = dict(by_epoch=False, max_iters=4, val_interval=2)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=2
    )
    cfg.dump(tmp_path / 'config.py')
    for name, *options in (
        ['a'],
        ['b', '--resume', tmp_path / 'a/iter_2.pth'],
    ):
        argv = '--work-dir', tmp_path / name, '--seed', 7, *options
        output = tiny.run_tool('train', tmp_path / 'config.py', *argv)
    assert 'resumed epoch: 0, iter: 2' in output
    assert_equal_states(tmp_path / 'b/iter_4.pth', tmp_path / 'a/iter_4.pth')


# ------------------------------------------------------------------- parts


def test_files_are_whole_or_old(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'file.pth'
    backend = SafeBackend()
    backend.put(b'old', path)
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        os,
        'replace',
        lambda *a: (seen.append(path.read_bytes()), replace(*a)),
    )
    backend.put(b'new', str(path))
    assert seen == [b'old'] and path.read_bytes() == b'new'

    def fail(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='No space.*file.pth'):
        backend.put(b'newer', path)
    assert path.read_bytes() == b'new'
    assert [*path.parent.iterdir()] == [path]


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
    assert latest_checkpoint(tmp_path / 'nowhere') is None
    names = 'epoch_9.pth', 'epoch_10.pth', 'other.pth', 'best_x_epoch_9.pth'
    for age, name in zip((30, 20, 10, 0), names, strict=True):
        torch.save({'weight': torch.zeros(100)}, tmp_path / name)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    first, second, other, _ = (tmp_path / name for name in names)
    last = tmp_path / 'last_checkpoint'
    for named, expected in (
        ('', second),  # killed meanwhile; a best one is no state to go on from
        (first, second),
        (other, other),
    ):
        last.write_text(str(named))
        assert latest_checkpoint(tmp_path) == str(expected)
    last.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    assert latest_checkpoint(tmp_path) == str(first)
    # No silent start from the beginning.
    first.write_bytes(first.read_bytes()[:99])
    with pytest.raises(CheckpointError, match='no whole.*_9.pth.*_10.pth'):
        latest_checkpoint(tmp_path)
    first.unlink()
    second.unlink()
    last.write_text(str(first))
    with pytest.raises(CheckpointError, match='no whole.*epoch_9.pth does no'):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize('seed', ['-1', str(2**32)])
def test_seed_is_a_seed(seed):
    train = tiny.load_tool('train')
    args = train.build_parser().parse_args(['c', '--seed', seed])
    with pytest.raises(train.cli.UserError, match=rf'--seed {seed} is'):
        train.apply_options(Config(), args)


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


# ------------------------------------------------------------------- kills


@pytest.mark.slow
def test_kills(tmp_path):
    """SIGKILLs, every other one while a checkpoint is being written."""
    config = tiny.classifier(tmp_path)
    log, undisturbed = tmp_path / 'log', tmp_path / 'undisturbed'
    last = f'epoch_{EPOCHS}.pth'
    epochs = ['--cfg-options', f'train_cfg.max_epochs={EPOCHS}']
    argv = config, '--seed', 7, *epochs, '--resume', '--work-dir'
    began = time.monotonic()
    forked.run(*argv, undisturbed, log=log)
    duration = time.monotonic() - began

    numbers = random.Random(0)
    runs = killed = 0
    while killed < KILLS:
        work_dir = tmp_path / f'run_{runs}'
        start = latest_checkpoint(work_dir)
        prepare, moment = None, numbers.uniform(0, duration / 2)
        if killed % 2 == 0:
            prepare, moment = (
                KilledWhileWriting(numbers.randrange(4), numbers.random()),
                forked.TIMEOUT,
            )
        process = forked.start(*argv, work_dir, log=log, prepare=prepare)
        process.join(moment)
        process.kill()
        process.join()
        if process.exitcode == 0:  # too fast to be killed
            runs += 1
            continue
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        killed += 1
        for path in work_dir.glob('*.pth'):
            read(str(path))
        assert latest_checkpoint(work_dir) or not start
    forked.run(*argv, work_dir, log=log)
    for run in range(runs + 1):
        assert_equal_states(tmp_path / f'run_{run}' / last, undisturbed / last)
