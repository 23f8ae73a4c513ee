"""A killed training resumes as if it had not been killed."""

import builtins
import io
import itertools
import os
import random
import resource
import signal
import time
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

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

EPOCHS = 12
WORKERS = 'train_dataloader.num_workers=1'


def assert_equal_states(path, other):
    """Weights and the optimizer's state are equal, bit by bit."""
    state, expected = (
        torch.load(p, weights_only=False) for p in (path, other)
    )
    weights = expected['state_dict']
    assert state['state_dict'].keys() == weights.keys()
    for name, weight in state['state_dict'].items():
        assert torch.equal(weight, weights[name]), name
    moments = expected['optimizer']['state']
    for number, moment in state['optimizer']['state'].items():
        for name, value in moment.items():
            assert torch.equal(value, moments[number][name])


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """Config and work dir of a run of two epochs, with a seed."""
    folder = tmp_path_factory.mktemp('undisturbed')
    config = tiny.classifier(folder)
    tiny.run_tool(
        *('train', config, '--work-dir', folder / 'work', '--seed', 7),
        *('--cfg-options', WORKERS),
    )
    return config, folder / 'work'


def test_resumed_is_undisturbed(undisturbed, tmp_path):
    """Random numbers too: of flips, crops, dropped paths and the order."""
    config, work_dir = undisturbed
    argv = 'train', config, '--work-dir', tmp_path / 'work', '--seed', 7
    argv = *argv, '--resume', '--cfg-options', WORKERS
    tiny.run_tool(*argv, 'train_cfg.max_epochs=1')
    log = tiny.run_tool(*argv)
    assert 'resumed epoch: 1' in log
    assert_equal_states(
        tmp_path / 'work' / 'epoch_2.pth', work_dir / 'epoch_2.pth'
    )


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='this mmengine draws random numbers for the data it skips',
)
def test_resumed_by_iterations(tmp_path):
    """A training whose data have no epochs."""
    config = tiny.segmentor(tmp_path)
    weights = []
    for runs in ((4,), (2, 4)):
        work_dir = tmp_path / f'work_{len(runs)}'
        for iters in runs:
            output = tiny.run_tool(
                *('train', config, '--work-dir', work_dir, '--seed', 7),
                *('--resume', '--cfg-options', f'train_cfg.max_iters={iters}'),
            )
        weights.append(work_dir / 'iter_4.pth')
    assert 'resumed epoch: 0, iter: 2' in output
    assert_equal_states(*weights)


def test_only_wanted_files_stay(undisturbed):
    names = [path.name for path in undisturbed[1].glob('*.pth*')]
    assert sorted(names)[1:] == ['epoch_2.pth']
    assert names[0].startswith('best_') or names[1].startswith('best_')


def limit_file_size():
    """As if the disk were full once a checkpoint is written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_disk_is_full(undisturbed, tmp_path):
    """A short message; the last good checkpoint is intact."""
    config, _ = undisturbed
    argv = config, '--work-dir', tmp_path / 'work'
    stop_early = '--cfg-options', 'train_cfg.max_epochs=1'
    tiny.run_tool('train', *argv, *stop_early)
    before = (tmp_path / 'work/epoch_1.pth').read_bytes()
    (tmp_path / 'work/best_epoch_0.pth.part').touch()  # killed meanwhile
    log = forked.run(
        *(*argv, '--resume'),
        log=tmp_path / 'log',
        prepare=limit_file_size,
        status=2,
    )
    assert 'Traceback' not in log
    assert 'train.py: cannot write ' in log and 'epoch_2.pth' in log
    assert '--resume' in log.splitlines()[-1]
    assert (tmp_path / 'work/epoch_1.pth').read_bytes() == before
    assert latest_checkpoint(tmp_path / 'work').endswith('epoch_1.pth')
    assert not [*(tmp_path / 'work').glob('*.part')]


# ------------------------------------------------------------------ parts


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
    assert sorted(os.listdir(tmp_path)) == ['c.pth']
    backend.put(b'', tmp_path / 'c.pth')  # written again, so wanted
    assert sorted(os.listdir(tmp_path)) == ['c.pth']


def save(path, age):
    torch.save({'state_dict': {'weight': torch.zeros(100)}}, path)
    os.utime(path, (time.time() - age,) * 2)


def test_latest(tmp_path):
    """The newest that is whole, whatever last_checkpoint says."""
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / 'nowhere') is None
    first, second, best = (
        tmp_path / name
        for name in ('epoch_9.pth', 'epoch_10.pth', 'best_x_epoch_9.pth')
    )
    save(first, age=20)
    save(second, age=10)
    save(best, age=0)  # has no state of the optimizer
    (tmp_path / 'last_checkpoint').write_text('')  # killed meanwhile
    assert latest_checkpoint(tmp_path) == str(second)
    (tmp_path / 'last_checkpoint').write_text(str(first))
    assert latest_checkpoint(tmp_path) == str(second)
    second.write_bytes(second.read_bytes()[:-100])
    assert latest_checkpoint(tmp_path) == str(first)
    other = tmp_path / 'other.pth'
    save(other, age=5)
    (tmp_path / 'last_checkpoint').write_text(str(other))
    assert latest_checkpoint(tmp_path) == str(other)


@pytest.mark.parametrize('damage', ['truncate', 'remove'])
def test_nothing_whole(tmp_path, damage):
    """No silent start from the beginning."""
    path = tmp_path / 'iter_1.pth'
    save(path, age=0)
    if damage == 'truncate':
        path.write_bytes(path.read_bytes()[:99])
    else:
        path.unlink()
        (tmp_path / 'last_checkpoint').write_text(str(path))
    with pytest.raises(CheckpointError, match='no whole.*iter_1.pth'):
        latest_checkpoint(tmp_path)


def test_seed_is_a_seed(capsys):
    train = tiny.load_tool('train')
    for seed in ('-1', str(2**32)):
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

    settings = [*itertools.product((0, 7, 2**32 - 1), (0, 1, 7), (0, 1, 7))]
    first = [draws(*numbers) for numbers in settings]
    for numbers in zip(*first, strict=True):
        assert len({*numbers}) == len(settings)
    assert [draws(*numbers) for numbers in settings] == first


# ------------------------------------------------------------------- kills


@dataclass
class KilledWhileWriting:
    """Makes a process kill itself while it writes a checkpoint.

    Args:
        before (int): How many checkpoints it writes before that one.
        share (float): How much of that one it writes, between 0 and 1.
    """

    before: int
    share: float

    def __call__(self):
        self.original = builtins.open
        builtins.open = self.open

    def open(self, file, mode='r', *args, **kwargs):
        if '.pth' not in str(file) or mode != 'wb':
            return self.original(file, mode, *args, **kwargs)
        self.before -= 1
        if self.before >= 0:
            return self.original(file, mode)
        return HalfWritten(file, mode, self.share)


class HalfWritten(io.FileIO):
    def __init__(self, file, mode, share):
        super().__init__(file, mode)
        self.share = share

    def write(self, data):
        super().write(data[: int(len(data) * self.share)])
        os.kill(os.getpid(), signal.SIGKILL)


def half_written(work_dir):
    """The files that are, and since when."""
    paths = work_dir.glob('*.part')
    return {(path, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    'kills', [3, pytest.param(20, marks=pytest.mark.slow)]
)
def test_kills(tmp_path, kills):
    """SIGKILLs, every other one while a checkpoint is being written."""
    config = tiny.classifier(tmp_path)
    log = tmp_path / 'log'
    epochs = ['--cfg-options', f'train_cfg.max_epochs={EPOCHS}']
    argv = config, '--seed', 7, *epochs, '--work-dir'
    began = time.monotonic()
    forked.run(*argv, tmp_path / 'undisturbed', log=log)
    duration = time.monotonic() - began

    numbers = random.Random(0)
    runs = killed = while_writing = 0
    finished = False
    while killed < kills or not finished:
        work_dir = tmp_path / f'run_{runs}'
        start = latest_checkpoint(work_dir)
        parts = half_written(work_dir)
        prepare, moment = None, forked.TIMEOUT
        if killed < kills and killed % 2:
            moment = numbers.uniform(0, duration / 2)
        elif killed < kills:
            prepare = KilledWhileWriting(
                numbers.randrange(4), numbers.random()
            )
        process = forked.start(
            *(*argv, work_dir, '--resume'), log=log, prepare=prepare
        )
        process.join(moment)
        process.kill()
        process.join()
        output = log.read_text()
        if start and moment == forked.TIMEOUT:
            assert f'Load checkpoint from {start}' in output
        finished = process.exitcode == 0
        if finished:  # if too fast to be killed, start anew
            assert_equal_states(
                work_dir / f'epoch_{EPOCHS}.pth',
                tmp_path / 'undisturbed' / f'epoch_{EPOCHS}.pth',
            )
            runs += 1
            continue
        assert process.exitcode == -signal.SIGKILL, output
        killed += 1
        while_writing += bool(half_written(work_dir) - parts)
        for path in work_dir.glob('*.pth'):
            read(str(path))
        assert latest_checkpoint(work_dir) or not start
    print(f'{killed} kills survived, {while_writing} of them while writing')
    assert while_writing >= kills / 2
