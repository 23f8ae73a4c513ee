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

tiny.need_openmmlab()

EPOCHS, KILLS = 6, 20  # of the slow test
WORKERS = 'train_dataloader.num_workers=1'


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


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """Config and work dir of a run of two epochs, with a seed."""
    folder = tmp_path_factory.mktemp('undisturbed')
    config = tiny.classifier(
        folder,
        custom_hooks=[dict(type='EMAHook')],
        param_scheduler=[dict(type='MultiStepLR', milestones=[1, 1, 2])],
    )
    tiny.run_tool(
        *('train', config, '--work-dir', folder / 'work', '--seed', 7),
        *('--cfg-options', WORKERS),
    )
    return config, folder / 'work'


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
    return {*work_dir.glob('*.part')}


def test_killed_while_writing(undisturbed, tmp_path):
    """It resumes to what an undisturbed run comes to, bit by bit.

    Random numbers too: of flips, crops, dropped paths and the order.
    The config that mmcv's checkpoints have, which mmengine takes for code,
    does not run, and what a checkpoint names as the last best, which
    CheckpointHook deletes, is forgotten where it is not of this run.
    """
    config, expected = undisturbed
    work_dir, log = tmp_path / 'work', tmp_path / 'log'
    argv = config, '--work-dir', work_dir, '--seed', 7
    options = '--cfg-options', WORKERS
    forked.run(
        *(*argv, *options),
        log=log,
        prepare=KilledWhileWriting(before=3, share=0.5),
        status=-signal.SIGKILL,
    )
    assert [path.name for path in half_written(work_dir)] == [
        'epoch_2.pth.part'
    ]
    marker, last = tmp_path / 'marker', work_dir / 'epoch_1.pth'
    contents = torch.load(last, weights_only=False)
    code = f'import os\nos.mkdir({str(marker)!r})\n'
    contents['meta']['config'] = code
    names = {
        'best_ckpt_a': work_dir / 'best_a_epoch_1.pth',
        'best_ckpt_b': work_dir / 'vis_data',
        'best_ckpt_c': tmp_path / 'epoch_1.pth',
    }
    for key, path in names.items():
        contents['message_hub']['runtime_info'][key] = str(path)
        contents['message_hub']['resumed_keys'][key] = True
    torch.save(contents, last)
    output = tiny.run_tool('train', *argv, '--resume', *options)
    assert not marker.exists()
    assert f'Load checkpoint from {work_dir}/epoch_1.pth' in output
    assert 'resumed epoch: 1' in output
    assert_equal_states(work_dir / 'epoch_2.pth', expected / 'epoch_2.pth')
    assert not half_written(work_dir)
    hub = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    info = hub['message_hub']['runtime_info']
    kept = {k: v for k, v in info.items() if k in names}
    assert kept == {'best_ckpt_a': str(names['best_ckpt_a'])}


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='this mmengine draws random numbers for the data it skips',
)
def test_resumed_by_iterations(tmp_path):
    """A training whose data have no epochs."""
    config = tiny.classifier(tmp_path)
    cfg = Config.fromfile(config)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
    cfg.train_cfg = dict(by_epoch=False, max_iters=4, val_interval=4)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=2
    )
    cfg.dump(config)
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
    best, last = sorted(path.name for path in undisturbed[1].glob('*.pth*'))
    assert best.startswith('best_') and last == 'epoch_2.pth'


@pytest.fixture
def full_disk():
    """As if the disk were full once a checkpoint is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_is_full(undisturbed, tmp_path, full_disk):
    """A short message; the last good checkpoint is intact."""
    config, before = undisturbed
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    last = work_dir / 'epoch_2.pth'
    last.hardlink_to(before / last.name)
    (work_dir / 'best_epoch_0.pth.part').touch()  # killed meanwhile
    argv = config, '--work-dir', work_dir, '--resume', '--cfg-options'
    log = tiny.run_tool('train', *argv, 'train_cfg.max_epochs=3', status=2)
    assert 'Traceback' not in log
    assert 'train.py: cannot write ' in log and 'epoch_3.pth' in log
    assert '--resume' in log.splitlines()[-1]
    assert latest_checkpoint(work_dir) == str(last)
    assert not [*work_dir.glob('*.part')]


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


def test_nothing_whole(tmp_path):
    """No silent start from the beginning."""
    path = tmp_path / 'iter_1.pth'
    save(path, age=0)
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(CheckpointError, match='no whole.*iter_1.pth'):
        latest_checkpoint(tmp_path)
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
        assert_equal_states(
            tmp_path / f'run_{run}' / f'epoch_{EPOCHS}.pth',
            undisturbed / f'epoch_{EPOCHS}.pth',
        )
