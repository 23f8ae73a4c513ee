"""Several processes, and what starts them: they train and test as one."""

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from functools import partial

import forked
import pytest
import tiny
import torch
from mmengine.config import Config

from mmoverlock.models import OverLoCK

tiny.need_openmmlab()

ROOT = tiny.ROOT
TOOLS = ROOT / 'tools'
LEFT_OUT = 'SyncBN is left out: it needs GPUs\n'
IMPORTS = ['mmoverlock.models', 'rank_hooks']
HOOKS = dict(
    custom_imports=dict(imports=IMPORTS), custom_hooks=[dict(type='SaveRank')]
)
WIDER = tiny.ARCH | dict(channels=(8, 16, 24, 40))
WRONG_ARCH = 'channels [8, 16, 24, 40], and the model is OverLoCK of depths'


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])


def as_rank(rank, port):
    """Look like a process of torchrun."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=port,
    )


def fork_two(*argv, folder, tool='train', failure=False):
    """Run a tool in two processes; return the output of the first."""
    port = free_port()
    logs = [folder / f'log_{rank}' for rank in (0, 1)]
    processes = [
        forked.start(
            *(*argv, '--launcher', 'pytorch'),
            log=log,
            prepare=partial(as_rank, rank, port),
            tool=tool,
        )
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.join(600)
    output = [log.read_text() for log in logs]
    for process in processes:
        assert bool(process.exitcode) == failure, '\n'.join(output)
    assert LEFT_OUT not in output[1]
    return output[0]


def launch(folder, script, *argv, **variables):
    """Start a script; its output goes to a file."""
    paths = [ROOT, ROOT / 'tests', os.environ.get('PYTHONPATH', '')]
    env = os.environ | {
        'PYTHON': sys.executable,
        'PYTHONPATH': os.pathsep.join(map(str, filter(None, paths))),
        'OMP_NUM_THREADS': '1',
        'PORT': free_port(),
        **variables,
    }
    log = folder / f'log_{env.get("NODE_RANK", 0)}'
    with log.open('w') as file:
        process = subprocess.Popen(
            [script, *map(str, argv)],
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


# ------------------------------------------------------------------ in step


def ranks(work_dir):
    """What the hooks of the two processes saved."""
    return [
        torch.load(work_dir / f'rank_{rank}.pth', weights_only=False)
        for rank in (0, 1)
    ]


def assert_in_step(work_dir, checkpoint):
    """Both processes end with the weights and statistics of the checkpoint.

    They came there by DDP, each with images and random numbers of its own.
    """
    first, second = ranks(work_dir)
    for rank in (first, second):
        assert rank['wrapper'] == 'MMDistributedDataParallel'
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


def metric(log, name):
    """The last value of a metric."""
    return re.findall(rf'{name}: +([\d.]+)', log)[-1]


def classifier(folder, **options):
    """Write the config of a tiny classifier with both heads of the release.

    There are seven images to test: of two processes, one repeats an image.
    """
    path = tiny.classifier(folder, **HOOKS)
    (folder / 'data/val/a/0.png').unlink()
    cfg = Config.fromfile(path)
    del cfg.model.neck, cfg.model.backbone.out_indices
    cfg.merge_from_dict(
        {
            'custom_imports.imports': [
                *IMPORTS,
                'mmoverlock.models.classification',
            ],
            'model.backbone.classifier': True,
            'model.head': dict(
                _delete_=True,
                type='OverLoCKClsHead',
                num_classes=2,
                in_channels=[32, 40],
            ),
            'val_dataloader.batch_size': 2,
            'test_dataloader.batch_size': 2,
            **options,
        }
    )
    cfg.dump(path)
    return path


def test_classifier(tmp_path):
    """In step, the averaged weights too; tested as one process does."""
    average = dict(type='EMAHook', update_buffers=True, momentum=0.1)
    config = classifier(
        tmp_path, custom_hooks=[*HOOKS['custom_hooks'], average]
    )
    work_dir = tmp_path / 'work'
    checkpoint = work_dir / 'epoch_2.pth'
    log = fork_two(config, '--work-dir', work_dir, folder=tmp_path)
    assert LEFT_OUT not in log
    assert_in_step(work_dir, checkpoint)
    validated = metric(log, 'accuracy/top1')
    test = config, checkpoint, '--work-dir', tmp_path / 'test', '--out'
    two, one = tmp_path / 'two.pkl', tmp_path / 'one.pkl'
    log = fork_two(*test, two, folder=tmp_path, tool='test')
    assert metric(log, 'accuracy/top1') == validated
    log = tiny.run_tool('test', *test, one)
    assert metric(log, 'accuracy/top1') == validated
    results = [pickle.loads(path.read_bytes()) for path in (two, one)]
    assert len(results[0]) == 7
    for ours, theirs in zip(*results, strict=True):
        assert ours['img_path'] == theirs['img_path']
        torch.testing.assert_close(ours['pred_score'], theirs['pred_score'])


def test_segmentor(tmp_path, monkeypatch):
    """A head that reads two of four maps trains with what is to be written.

    SyncBN that a config builds by itself is left out as well.
    """
    head = dict(
        type='FCNHead',
        in_channels=40,
        channels=8,
        num_convs=1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN'),
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    options = HOOKS | {
        'sync_bn': None,
        'model.decode_head': dict(head, _delete_=True, in_index=3),
        'model.auxiliary_head.in_index': 2,
    }
    config = tiny.segmentor(tmp_path, **options)
    work_dir = tmp_path / 'work'
    argv = config, '--work-dir', work_dir
    environ = dict(WORLD_SIZE='1', RANK='0', MASTER_PORT=free_port())
    for name, value in {**environ, 'MASTER_ADDR': '127.0.0.1'}.items():
        monkeypatch.setenv(name, value)
    try:
        log = tiny.run_tool('train', *argv, '--launcher=pytorch', status=2)
    finally:
        torch.distributed.destroy_process_group()
    assert 'train.py: the backbone has maps (0, 1, 2, 3), and only' in log
    assert 'model.backbone.out_indices=(2, 3)' in log

    cfg = Config.fromfile(config)
    cfg.model.backbone.out_indices = (2, 3)
    cfg.model.decode_head.in_index = 1
    cfg.model.auxiliary_head.in_index = 0
    cfg.dump(config)
    log = fork_two(*argv, folder=tmp_path)
    assert log.count(LEFT_OUT) == 1
    assert_in_step(work_dir, 'iter_2.pth')
    test = config, work_dir / 'iter_2.pth', '--work-dir', tmp_path / 'test'
    assert metric(tiny.run_tool('test', *test), 'mIoU') == metric(log, 'mIoU')


def detector(folder, **options):
    return tiny.detector(
        folder,
        **HOOKS,
        **{
            'train_dataloader.batch_size': 1,
            'test_dataloader.dataset.indices': 3,
            **options,
        },
    )


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two torchruns with a process each, on one machine in fact."""
    config, work_dir = detector(tmp_path), tmp_path / 'work'
    port = free_port()
    nodes = [
        launch(
            *(tmp_path, TOOLS / 'dist_train.sh', config, 1),
            *('--work-dir', work_dir),
            NNODES='2',
            NODE_RANK=str(rank),
            MASTER_ADDR='localhost',
            PORT=port,
        )
        for rank in (0, 1)
    ]
    log = ''.join(map(finish, nodes))
    assert log.count(LEFT_OUT) == 1
    assert_in_step(work_dir, 'epoch_1.pth')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_sync_bn_on_a_gpu(tmp_path):
    config, work_dir = detector(tmp_path), tmp_path / 'work'
    argv = TOOLS / 'dist_train.sh', config, 1, '--work-dir', work_dir
    log = finish(launch(tmp_path, *argv))
    assert LEFT_OUT not in log
    saved = torch.load(work_dir / 'rank_0.pth', weights_only=False)
    assert saved['norms'] == {'SyncBatchNorm'}


# ---------------------------------------------------------------- failures


def test_a_process_dies(tmp_path):
    """The job ends with an error instead of a hang."""
    shutil.copy(TOOLS / 'dist_train.sh', tmp_path)
    (tmp_path / 'train.py').write_text(
        'import os, signal, sys, time\n'
        'print(os.environ["RANK"], *sys.argv[1:])\n'
        'if os.environ["RANK"] == "1":\n'
        '    os.kill(os.getpid(), signal.SIGKILL)\n'
        'time.sleep(1000)\n'
    )
    argv = tmp_path / 'dist_train.sh', 'config.py', 2, '--amp'
    log = finish(launch(tmp_path, *argv, PYTHONUNBUFFERED='1'), failure=True)
    assert '0 config.py --launcher pytorch --amp\n' in log
    assert 'rank      : 1 (local_rank: 1)' in log and 'SIGKILL' in log


def test_weights_of_another_arch(tmp_path):
    """A message, without a traceback, of one process and of each of two."""
    weights = tmp_path / 'wider.pth'
    torch.save(OverLoCK(WIDER).state_dict(), weights)
    init = dict(type='Pretrained', checkpoint=str(weights))
    config = classifier(tmp_path, **{'model.backbone.init_cfg': init})
    argv = config, '--work-dir', tmp_path / 'work'
    for log in (
        tiny.run_tool('train', *argv, status=2),
        fork_two(*argv, folder=tmp_path, failure=True),
    ):
        assert log.count(WRONG_ARCH) == 1 and 'Traceback' not in log


def test_wrong_backbone(tmp_path):
    config = classifier(tmp_path, **{'model.backbone.drop_path_rate': 2})
    argv = 'train', config, '--work-dir', tmp_path / 'work'
    log = tiny.run_tool(*argv, status=2)
    assert 'Traceback' not in log
    assert 'train.py: the OverLoCK of the config: drop_path_rate' in log


# --------------------------------------------------------------------- FSDP


def test_fsdp(tmp_path):
    """Blocks are sharded, and the training is that of DDP, in step."""
    full = dict(rank0_only=True, offload_to_cpu=False)
    options = {
        'custom_hooks': [dict(type='SaveUnits')],
        'train_dataloader.batch_size': 1,
        'param_scheduler': None,
        'optim_wrapper.optimizer': dict(
            _delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=0.05
        ),
        'strategy.model_wrapper.device_id': 'cpu',
        # On a CPU, what is offloaded is lost.
        'strategy.state_dict_cfg': dict(
            _delete_=True,
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **full),
            optim_state_dict_config=dict(
                type='FullOptimStateDictConfig', **full
            ),
        ),
    }
    config = tiny.detector(tmp_path, 'drop_in/overlock_b_fsdp.py', **options)
    cfg = Config.fromfile(config)
    cfg.custom_imports.imports.append('rank_hooks')
    cfg.dump(config)
    for key in ('runner_type', 'strategy'):
        cfg.pop(key)
    cfg.custom_hooks = HOOKS['custom_hooks']
    cfg.dump(tmp_path / 'ddp.py')
    states, logs = [], []
    for name in ('detector', 'ddp'):
        work_dir = tmp_path / name
        argv = tmp_path / f'{name}.py', '--work-dir', work_dir, '--seed', 0
        logs.append(fork_two(*argv, folder=tmp_path))
        states.append(torch.load(work_dir / 'epoch_1.pth', weights_only=False))
    assert all(log.count(LEFT_OUT) == 1 for log in logs)
    assert_in_step(tmp_path / 'ddp', 'epoch_1.pth')

    saved = ranks(tmp_path / 'detector')
    for rank in saved:
        assert Counter(rank['units']) == {
            'MaskRCNN': 1,
            'RepConvBlock': 4,
            'FocusBlock': 2,
        }
    numel = ranks(tmp_path / 'ddp')[0]['numel']
    assert sum(rank['numel'] for rank in saved) == numel
    assert max(rank['numel'] for rank in saved) < 0.6 * numel

    ours, theirs = (state['state_dict'] for state in states)
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-4, atol=1e-5)
    moved = ours['neck.fpn_convs.0.conv.bias'].abs().max()  # from 0
    assert moved > 5e-4
    assert states[0]['optimizer']['state']
    work_dir = tmp_path / 'detector'
    log = fork_two(
        *(config, '--work-dir', work_dir, '--resume', '--cfg-options'),
        'train_cfg.max_epochs=2',
        folder=tmp_path,
    )
    assert 'resumed epoch: 1, iter: 2\n' in log
    assert (work_dir / 'epoch_2.pth').exists()


# ------------------------------------------------------------------ scripts

SCRIPTS = 'dist_train.sh', 'dist_test.sh', 'slurm_train.sh'


def run_script(script, *argv, path, **variables):
    """Run a script with a program for python or srun that shows its words."""
    keep = {'PATH': f'{path}{os.pathsep}{os.environ["PATH"]}'}
    return subprocess.run(
        ['bash', script, *argv],
        env={**keep, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fakes(tmp_path):
    """A folder with a python and an srun that print their arguments."""
    folder = tmp_path / 'fake programs'
    folder.mkdir()
    for name in ('python', 'srun'):
        fake = folder / name
        fake.write_text(
            f'#!/bin/sh\necho {name} $MASTER_PORT\nprintf "%s\\n" "$@"\n'
        )
        fake.chmod(0o755)
    return folder


@pytest.mark.parametrize('script', SCRIPTS)
def test_usage(script, fakes):
    done = run_script(TOOLS / script, 'one', path=fakes)
    assert done.returncode == 2
    assert done.stderr.startswith(f'usage: tools/{script} ')
    assert done.stderr.count('\n') == 1 and not done.stdout


@pytest.mark.parametrize(
    ('script', 'argv'),
    [('dist_train.sh', ['a b.py']), ('dist_test.sh', ['a b.py', '$c.pth'])],
)
def test_torchrun_words(script, argv, fakes):
    """Words are kept as they are, and defaults are those of OpenMMLab."""
    options = ['--cfg-options', 'a.b=[1, 2]', '*', '']
    tool = script.removeprefix('dist_').replace('.sh', '.py')
    for variables in (
        {},
        dict(NNODES='3', NODE_RANK='2', MASTER_ADDR='gpu 7', PORT='1234'),
    ):
        done = run_script(
            *(TOOLS / script, *argv, '4', *options), path=fakes, **variables
        )
        assert done.returncode == 0
        words = done.stdout.splitlines()
        assert words[:3] == ['python', '-m', 'torch.distributed.run']
        place = words.index(f'{TOOLS}/{tool}')
        given = dict(zip(words[3:place:2], words[4:place:2], strict=True))
        assert given == {
            '--nnodes': variables.get('NNODES', '1'),
            '--node_rank': variables.get('NODE_RANK', '0'),
            '--master_addr': variables.get('MASTER_ADDR', '127.0.0.1'),
            '--master_port': variables.get('PORT', '29500'),
            '--nproc_per_node': '4',
        }
        assert words[place + 1 :] == [
            *(*argv, '--launcher', 'pytorch', *options)
        ]


@pytest.mark.parametrize(
    ('gpus', 'nodes_gpus'), [({}, 8), ({'GPUS': '4'}, 4), ({'GPUS': '32'}, 8)]
)
def test_slurm_words(gpus, nodes_gpus, fakes):
    argv = 'a b.py', '--cfg-options', 'a.b=[1, 2]', '*'
    done = run_script(
        *(TOOLS / 'slurm_train.sh', 'part', 'a job', *argv),
        path=fakes,
        SRUN_ARGS='--time 1:00  --exclusive',
        PORT='1234',
        **gpus,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        'srun 1234',
        *('--partition', 'part', '--job-name', 'a job'),
        *('--gres', f'gpu:{nodes_gpus}', '--ntasks', gpus.get('GPUS', '8')),
        *('--ntasks-per-node', f'{nodes_gpus}', '--cpus-per-task', '5'),
        *('--kill-on-bad-exit=1', '--time', '1:00', '--exclusive'),
        *('python', '-u', f'{TOOLS}/train.py', argv[0]),
        *('--launcher', 'slurm', *argv[1:]),
    ]


def test_slurm_work_dir(fakes):
    """MMDetection's fourth word."""
    argv = 'part', 'job', 'config.py', 'my work', '--amp'
    done = run_script(TOOLS / 'slurm_train.sh', *argv, path=fakes)
    assert done.stdout.splitlines()[-6:] == [
        *('config.py', '--launcher', 'slurm'),
        *('--work-dir', 'my work', '--amp'),
    ]


def test_installed_scripts(fakes):
    """They start the tools of the folder they are in."""
    installed = ROOT / 'mmoverlock' / '.mim' / 'tools' / 'dist_train.sh'
    done = run_script(installed, 'config.py', '2', path=fakes)
    assert f'{installed.parent}/train.py' in done.stdout.splitlines()
