"""Several processes, and what starts them: they train and test as one."""

import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import forked
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel

tiny.need_openmmlab()

TOOLS = tiny.ROOT / 'mmoverlock' / '.mim' / 'tools'
LEFT_OUT = 'SyncBN is left out: it needs GPUs\n'


@HOOKS.register_module()
class SaveRank(Hook):
    """Saves what a process has in the end: work dir/rank_N.pth."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(outputs['loss'].item())

    def after_train(self, runner):
        modules = [*runner.model.modules()]
        kind = FullyShardedDataParallel
        shards = [m for m in modules if isinstance(m, kind)]
        units = Counter(type(m.module).__name__ for m in shards)
        averages = [
            h.ema_model for h in runner.hooks if isinstance(h, EMAHook)
        ]
        # Weights that are sharded are all processes' together.
        models = [] if units else [runner.model, *averages]
        saved = dict(
            kinds={type(module).__name__ for module in modules},
            losses=self.losses,
            numel=sum(p.numel() for p in runner.model.parameters()),
            states=[model.module.state_dict() for model in models],
            units=units,
        )
        torch.save(saved, f'{runner.work_dir}/rank_{get_rank()}.pth')


def register():
    """Importing this module has registered the hook."""


def run_two(*argv, folder):
    """Run a tool in two processes; return the output of the first."""
    argv = *argv, '--launcher', 'pytorch'
    return forked.run(*argv, folder=folder, processes=2, prepare=register)


def ranks(work_dir):
    """The files that the hooks of the two processes saved."""
    files = [work_dir / f'rank_{rank}.pth' for rank in (0, 1)]
    return [torch.load(file, weights_only=False) for file in files]


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
        folder,
        custom_hooks=[dict(type='SaveRank')],
        optim_wrapper=dict(optimizer=optimizer),
    )
    (folder / 'data/val/a/0.png').unlink()
    cfg = Config.fromfile(path)
    cfg.custom_imports.imports.append('mmoverlock.models.classification')
    del cfg.model.neck, cfg.model.backbone.out_indices
    cfg.model.backbone.classifier = True
    cfg.model.backbone.drop_path_rate = 0  # FSDP's blocks draw for themselves
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
    argv = 'train', path, '--work-dir', work_dir, '--seed', 0
    return path, work_dir, run_two(*argv, folder=config.parent)


def test_ddp(ddp, tmp_path):
    """Other images, equal weights and statistics, averaged ones too.

    They are those of the checkpoint, which is tested as by one process.
    """
    config, work_dir, trained = ddp
    assert trained.count(LEFT_OUT) == 1
    first, second = ranks(work_dir)
    for rank in (first, second):
        assert 'ForeachDistributedDataParallel' in rank['kinds']
        assert 'SyncBatchNorm' not in rank['kinds']
    assert len({*first['losses'], *second['losses']}) == 4
    torch.testing.assert_close(
        first['states'], second['states'], rtol=0, atol=0
    )
    saved = torch.load(work_dir / 'iter_2.pth', weights_only=False)
    averaged = first['states'][1]
    torch.testing.assert_close(saved['state_dict'], averaged, rtol=0, atol=0)

    two, one = tmp_path / 'two.pkl', tmp_path / 'one.pkl'
    argv = 'test', config, work_dir / 'iter_2.pth', '--work-dir', tmp_path
    logs = [
        run_two(*argv, '--out', two, folder=tmp_path),
        tiny.run_tool(*argv, '--out', one),
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
        log = run_two(
            *('train', path, '--work-dir', work_dir, '--seed', 0),
            *('--resume', '--cfg-options', f'train_cfg.max_epochs={epochs}'),
            folder=tmp_path,
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
    state = expected['states'][0]
    torch.testing.assert_close(
        saved['state_dict'], state, rtol=1e-4, atol=1e-5
    )
    # It was 0.
    assert state['backbone.patch_embed1.1.bias'].abs().max() > 0.01


def test_a_process_dies(tmp_path):
    """The job ends with an error instead of a hang."""
    script = shutil.copy(TOOLS / 'dist_train.sh', tmp_path)
    (tmp_path / 'train.py').write_text(
        'import os, time\n'
        'os.environ["RANK"] == "1" and os.kill(os.getpid(), 9)\n'
        'time.sleep(1000)\n'
    )
    job = subprocess.run(
        [script, 'config.py', '2'],
        env=os.environ | dict(PORT=forked.free_port(), PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert job.returncode == 1
    assert 'rank      : 1 (local_rank: 1)' in job.stderr
    assert 'SIGKILL' in job.stderr


RUN = (
    'python -m torch.distributed.run --nnodes {} --node_rank {} '
    '--master_addr {} --master_port {} --nproc_per_node 4 '
    f'{TOOLS}/{{}} --launcher pytorch'
)
NODES = "NNODES=3 NODE_RANK=2 MASTER_ADDR='gpu 7' PORT=1234"
SRUN = (
    "srun 1234 --partition part --job-name 'a job' --gres gpu:{} --ntasks {} "
    '--ntasks-per-node {} --cpus-per-task 5 --kill-on-bad-exit=1 --time 1:00 '
    f"--exclusive python -u {TOOLS}/train.py 'a b.py' --launcher slurm"
)
JOB = "slurm_train.sh part 'a job' 'a b.py'"
TIME = "SRUN_ARGS='--time 1:00  --exclusive' PORT=1234"


@pytest.mark.parametrize(
    'variables, command, words',
    [
        (
            *('', "dist_train.sh 'a b.py' 4"),
            RUN.format(1, 0, '127.0.0.1', 29500, "train.py 'a b.py'"),
        ),
        (
            *(NODES, "dist_test.sh 'a b.py' '$c.pth' 4"),
            RUN.format(3, 2, "'gpu 7'", 1234, "test.py 'a b.py' '$c.pth'"),
        ),
        (TIME, JOB, SRUN.format(8, 8, 8)),
        (f'{TIME} GPUS=32', JOB, SRUN.format(8, 32, 8)),
        # As in MMDetection
        (
            *(f'{TIME} GPUS=4', f"{JOB} 'my work'"),
            SRUN.format(4, 4, 4) + " --work-dir 'my work'",
        ),
    ],
)
def test_words(variables, command, words, tmp_path):
    """Scripts keep words as they are; defaults are those of OpenMMLab.

    python and srun only show their words here.
    """
    for name in ('python', 'srun'):
        show = f'#!/bin/sh\nprintf "%s\\n" {name} $MASTER_PORT "$@"\n'
        (tmp_path / name).write_text(show)
        (tmp_path / name).chmod(0o755)
    path = f'PATH={tmp_path}:$PATH'
    options = "--cfg-options 'a.b=[1, 2]' '*' ''"
    shown = subprocess.check_output(
        f'env -i {path} {variables} {TOOLS}/{command} {options}',
        shell=True,
        text=True,
    )
    assert shown.splitlines() == shlex.split(f'{words} {options}')
