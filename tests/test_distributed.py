"""Several processes, and what starts them: they train and test as one."""

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from functools import partial

import forked
import pytest
import tiny
import torch
from mmengine.config import Config

tiny.need_openmmlab()

TOOLS = tiny.ROOT / 'mmoverlock' / '.mim' / 'tools'
LEFT_OUT = 'SyncBN is left out: it needs GPUs\n'
HOOKS = dict(
    custom_imports=dict(imports=['mmoverlock.models', 'rank_hooks']),
    custom_hooks=[dict(type='SaveRank')],
)


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])


def as_rank(rank, port):
    """Look like one of two processes of torchrun."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=port,
    )


def fork_two(folder, *argv, tool='train'):
    """Run a tool in two processes; return the output of the first."""
    port = free_port()
    logs = [folder / f'log_{rank}' for rank in (0, 1)]
    start = partial(forked.start, *argv, '--launcher', 'pytorch', tool=tool)
    processes = [
        start(log=log, prepare=partial(as_rank, rank, port))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.join(600)
    output = [log.read_text() for log in logs]
    assert not any(p.exitcode for p in processes), '\n'.join(output)
    assert LEFT_OUT not in output[1]
    return output[0]


def ranks(work_dir):
    """What the hooks of the two processes saved."""
    files = [work_dir / f'rank_{rank}.pth' for rank in (0, 1)]
    return [torch.load(file, weights_only=False) for file in files]


def assert_in_step(work_dir, checkpoint):
    """Both processes end with the weights and statistics of the checkpoint.

    They came there by DDP, each with images and random numbers of its own.
    """
    first, second = ranks(work_dir)
    for rank in (first, second):
        assert rank['wrapper'] == 'ForeachDistributedDataParallel'
        assert not rank['find_unused']
        assert rank['norms'] == {'BatchNorm2d'}
    pairs = [*zip(first['losses'], second['losses'], strict=True)]
    assert len(pairs) == 2
    assert all(one != other for one, other in pairs)
    assert len({*first['seeds'], *second['seeds']}) == 4
    assert first['state'].keys() == second['state'].keys()
    for name, value in first['state'].items():
        assert torch.equal(value, second['state'][name]), name
    saved = torch.load(work_dir / checkpoint, weights_only=False)
    for name, value in saved['state_dict'].items():
        averaged = first['state'].get(f'ema.{name}', first['state'][name])
        assert torch.equal(value, averaged), name


def accuracy(log):
    return re.findall(r'accuracy/top1: +([\d.]+)', log)[-1]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A tiny classifier's, with both heads of the release.

    There are seven images to test: of two processes, one repeats an image.
    """
    folder = tmp_path_factory.mktemp('classifier')
    optimizer = dict(type='SGD', lr=0.5, momentum=0.9)
    path = tiny.classifier(
        folder, **HOOKS, optim_wrapper=dict(optimizer=optimizer)
    )
    (folder / 'data/val/a/0.png').unlink()
    cfg = Config.fromfile(path)
    cfg.custom_imports.imports.append('mmoverlock.models.classification')
    del cfg.model.neck, cfg.model.backbone.out_indices
    cfg.model.backbone.classifier = True
    cfg.model.head = dict(
        type='OverLoCKClsHead', num_classes=2, in_channels=[32, 40]
    )
    cfg.test_dataloader.batch_size = 2
    cfg.dump(path)
    return path


@pytest.fixture(scope='module')
def ddp(config):
    """Config, work dir and log of a training of two iterations."""
    cfg = Config.fromfile(config)
    average = dict(type='EMAHook', update_buffers=True, momentum=0.1)
    cfg.custom_hooks.append(average)
    cfg.sync_bn = 'torch'
    cfg.train_cfg = dict(by_epoch=False, max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=2)
    path, work_dir = config.with_name('ddp.py'), config.with_name('ddp')
    cfg.dump(path)
    argv = path, '--work-dir', work_dir, '--seed', 0
    return path, work_dir, fork_two(config.parent, *argv)


def test_ddp(ddp, tmp_path):
    """In step, averaged weights too; tested as by one process."""
    config, work_dir, trained = ddp
    assert trained.count(LEFT_OUT) == 1
    assert_in_step(work_dir, 'iter_2.pth')
    argv = config, work_dir / 'iter_2.pth', '--work-dir', tmp_path, '--out'
    two, one = tmp_path / 'two.pkl', tmp_path / 'one.pkl'
    logs = [
        fork_two(tmp_path, *argv, two, tool='test'),
        tiny.run_tool('test', *argv, one),
    ]
    assert {*map(accuracy, logs)} == {accuracy(trained)}
    results = [pickle.loads(path.read_bytes()) for path in (two, one)]
    assert len(results[0]) == 7
    for ours, theirs in zip(*results, strict=True):
        assert ours['img_path'] == theirs['img_path']
        torch.testing.assert_close(ours['pred_score'], theirs['pred_score'])


def test_fsdp(config, ddp, tmp_path):
    """Blocks are sharded; a resumed training comes to what DDP comes to."""
    shipped = Config.fromfile(tiny.ROOT / 'configs/drop_in/overlock_b_fsdp.py')
    cfg = Config.fromfile(config)
    cfg.custom_imports.imports += shipped.custom_imports.imports
    for key in ('env_cfg', 'runner_type', 'strategy'):
        cfg[key] = shipped[key]
    cfg.default_hooks.checkpoint.update(shipped.default_hooks.checkpoint)
    cfg.model.backbone.norm_cfg = shipped.model.backbone.norm_cfg
    cfg.strategy.model_wrapper.device_id = 'cpu'
    # On a CPU, what is offloaded is lost.
    full = dict(rank0_only=True, offload_to_cpu=False)
    cfg.strategy.state_dict_cfg = dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', **full),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', **full),
    )
    path, work_dir = tmp_path / 'fsdp.py', tmp_path / 'work'
    cfg.dump(path)
    for epochs in (1, 2):
        log = fork_two(
            *(tmp_path, path, '--work-dir', work_dir, '--seed', 0),
            *('--resume', '--cfg-options', f'train_cfg.max_epochs={epochs}'),
        )
        assert log.count(LEFT_OUT) == 1
    assert 'resumed epoch: 1, iter: 1\n' in log

    first, second = ranks(work_dir)
    blocks = dict(ImageClassifier=1, RepConvBlock=4, FocusBlock=2)
    assert first['units'] == second['units'] == blocks
    expected = ranks(ddp[1])[0]
    assert first['numel'] + second['numel'] == expected['numel']
    assert max(first['numel'], second['numel']) < 0.6 * expected['numel']
    saved = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    state = {k: expected['state'][k] for k in saved['state_dict']}
    torch.testing.assert_close(
        dict(saved['state_dict']), state, rtol=1e-4, atol=1e-5
    )
    # It was 0.
    assert state['backbone.patch_embed1.1.bias'].abs().max() > 0.01


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two torchruns with a process each, on one machine in fact."""
    options = HOOKS | {'train_dataloader.batch_size': 1}
    config, work_dir = tiny.detector(tmp_path, **options), tmp_path / 'work'
    nodes = dict(NNODES='2', MASTER_ADDR='localhost', PORT=free_port())
    argv = tmp_path, 'dist_train.sh', config, 1, '--work-dir', work_dir
    started = [launch(*argv, NODE_RANK=rank, **nodes) for rank in '01']
    log = ''.join(map(finish, started))
    assert log.count(LEFT_OUT) == 1
    assert_in_step(work_dir, 'epoch_1.pth')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_sync_bn_on_a_gpu(tmp_path):
    config = tiny.detector(tmp_path, **HOOKS)
    argv = 'dist_train.sh', config, 1, '--work-dir', tmp_path
    assert LEFT_OUT not in finish(launch(tmp_path, *argv))
    saved = torch.load(tmp_path / 'rank_0.pth', weights_only=False)
    assert saved['norms'] == {'SyncBatchNorm'}


def launch(folder, script, *argv, **variables):
    """Start a script; its output goes to a file."""
    paths = tiny.ROOT, tiny.ROOT / 'tests', os.environ.get('PYTHONPATH', '')
    env = os.environ | {
        'PYTHON': sys.executable,
        'PYTHONPATH': os.pathsep.join(map(str, filter(None, paths))),
        'OMP_NUM_THREADS': '1',
        'PORT': free_port(),
        **variables,
    }
    log = folder / f'log_{env.get("NODE_RANK")}'
    with log.open('w') as file:
        process = subprocess.Popen(
            [TOOLS / script, *map(str, argv)],
            cwd=folder,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    process.log = log
    return process


def finish(process, failure=False):
    """Wait for the end; return the output."""
    try:
        status = process.wait(600)
    finally:
        process.kill()
    output = process.log.read_text()
    assert bool(status) == failure, output
    return output


def test_a_process_dies(tmp_path):
    """The job ends with an error instead of a hang."""
    shutil.copy(TOOLS / 'dist_train.sh', tmp_path)
    (tmp_path / 'train.py').write_text(
        'import os, sys, time\n'
        'print(os.environ["RANK"], *sys.argv[1:])\n'
        'os.environ["RANK"] == "1" and os.kill(os.getpid(), 9)\n'
        'time.sleep(1000)\n'
    )
    argv = tmp_path / 'dist_train.sh', 'config.py', 2, '--amp'
    log = finish(launch(tmp_path, *argv, PYTHONUNBUFFERED='1'), failure=True)
    assert '1 config.py --launcher pytorch --amp\n' in log
    assert 'rank      : 1 (local_rank: 1)' in log and 'SIGKILL' in log


@pytest.fixture
def run_script(tmp_path):
    """Run a script where python and srun only show their words."""
    folder = tmp_path / 'fake programs'
    folder.mkdir()
    for name in ('python', 'srun'):
        show = f'#!/bin/sh\necho {name} $MASTER_PORT\nprintf "%s\\n" "$@"\n'
        (folder / name).write_text(show)
        (folder / name).chmod(0o755)

    def run(script, *argv, **variables):
        return subprocess.check_output(
            [TOOLS / script, *argv],
            env=dict(PATH=f'{folder}:{os.environ["PATH"]}') | variables,
            text=True,
        ).splitlines()

    return run


OPTIONS = '--cfg-options', 'a.b=[1, 2]', '*', ''
NODES = dict(NNODES='3', NODE_RANK='2', MASTER_ADDR='gpu 7', PORT='1234')


@pytest.mark.parametrize(
    ('tool', 'argv', 'variables', 'place'),
    [
        ('train', ['a b.py'], {}, '1 0 127.0.0.1 29500'.split()),
        ('test', ['a b.py', '$c.pth'], NODES, [*NODES.values()]),
    ],
)
def test_torchrun_words(tool, argv, variables, place, run_script):
    """Words are kept as they are, and defaults are those of OpenMMLab."""
    nodes, rank, address, port = place
    assert run_script(
        f'dist_{tool}.sh', *argv, '4', *OPTIONS, **variables
    ) == [
        *('python', '-m', 'torch.distributed.run'),
        *('--nnodes', nodes, '--node_rank', rank),
        *('--master_addr', address, '--master_port', port),
        *('--nproc_per_node', '4', f'{TOOLS}/{tool}.py'),
        *(*argv, '--launcher', 'pytorch', *OPTIONS),
    ]


@pytest.mark.parametrize(
    ('variables', 'gpus', 'per_node', 'work_dir'),
    [
        ({}, '8', '8', []),
        ({'GPUS': '4'}, '4', '4', ['my work']),
        ({'GPUS': '32'}, '32', '8', []),
    ],
)
def test_slurm_words(variables, gpus, per_node, work_dir, run_script):
    """MMDetection's fourth word is a work dir."""
    variables |= dict(SRUN_ARGS='--time 1:00  --exclusive', PORT='1234')
    argv = 'part', 'a job', 'a b.py', *work_dir, *OPTIONS
    assert run_script('slurm_train.sh', *argv, **variables) == [
        *('srun 1234', '--partition', 'part', '--job-name', 'a job'),
        *('--gres', f'gpu:{per_node}', '--ntasks', gpus),
        *('--ntasks-per-node', per_node, '--cpus-per-task', '5'),
        *('--kill-on-bad-exit=1', '--time', '1:00', '--exclusive'),
        *('python', '-u', f'{TOOLS}/train.py', 'a b.py'),
        *('--launcher', 'slurm'),
        *(['--work-dir'] * len(work_dir) + work_dir),
        *OPTIONS,
    ]
