"""tools/train.py and tools/test.py: real runs, and their options."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, LoggerHook
from mmengine.runner import get_priority
from PIL import Image
from torch import nn

from mmoverlock import cli
from mmoverlock.engine import CurvesHook

tiny.need_openmmlab()

ROOT = tiny.ROOT
MASK_RCNN = ROOT / 'configs' / 'mask_rcnn' / 'overlock_xt_1x.py'
train, test = map(tiny.load_tool, ('train', 'test'))


@pytest.mark.parametrize(
    'name',
    sorted({p.stem for p in ROOT.glob('tools/*.py')} - {'make_sample_data'}),
)
def test_main_sets_up_the_process(name, monkeypatch):
    """Before it looks at anything."""
    called = []
    monkeypatch.setattr(cli, 'set_up', lambda: called.append(name))
    tiny.run_tool(name, '--help')
    assert called == [name]


@pytest.mark.parametrize(
    ('kind', 'metric'),
    [
        ('detector', 'coco/segm_mAP'),
        ('segmentor', 'mIoU'),
        ('classifier', 'accuracy/top1'),
    ],
)
def test_test(tmp_path, kind, metric):
    """It logs scores, saves results, and draws every image; fused or not."""
    config = getattr(tiny, kind)(tmp_path)
    tiny.save_model(Config.fromfile(config), tmp_path / 'model.pth')
    argv = 'test', config, tmp_path / 'model.pth', '--work-dir', tmp_path
    out, drawn = tmp_path / 'new' / 'out.pkl', tmp_path / 'drawn'
    with mock.patch.object(test, 'fuse', wraps=test.fuse) as fuse:
        log = tiny.run_tool(*argv, '--out', out, '--show-dir', drawn)
        assert metric in log and not fuse.called
        argv += '--fuse', '--cfg-options', 'resume=True'  # of the training
        assert metric in tiny.run_tool(*argv) and fuse.called
    results = pickle.loads(out.read_bytes())
    drawn = sorted(drawn.rglob('*.??g'))
    assert len(drawn) == len({Path(r['img_path']).name for r in results}) > 0
    result, size = results[0], list(results[0]['ori_shape'])
    if kind == 'classifier':
        assert [r['gt_label'].item() for r in results] == [0] * 4 + [1] * 4
        assert result['pred_score'].shape == (2,)
    elif kind == 'segmentor':
        assert [*result['pred_sem_seg']['data'].shape] == [1, *size]
        assert 'seg_logits' not in result
    else:
        instances = result['pred_instances']
        assert len(instances['bboxes']) == len(instances['masks']) > 0
        assert instances['masks'][0]['size'] == size
        original = np.asarray(Image.open(result['img_path']), dtype=int)
        prediction = np.asarray(Image.open(drawn[0]))[:, size[1] :]
        assert abs(prediction - original).max() > 64


@pytest.mark.parametrize('wrapped', [False, True])
def test_fused_hook(wrapped):
    """It fuses what is tested, with EMAHook the averaged weights."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    runner = mock.Mock(model=nn.DataParallel(model) if wrapped else model)
    hook, average = test.Fuse(), EMAHook()
    average.before_run(runner)
    nn.init.ones_(average.ema_model.module[0].weight)
    x = torch.randn(2, 3, 4, 4)
    before, expected = model(x), average.ema_model.module(x)
    hooks = sorted((hook, average), key=lambda h: get_priority(h.priority))
    for each in hooks:
        each.before_test_epoch(runner)
    tested = runner.model.module if wrapped else runner.model
    assert hasattr(tested[1], 'fused')
    torch.testing.assert_close(tested(x), expected)
    for each in hooks:
        each.after_test_epoch(runner)
    torch.testing.assert_close(model(x), before)


def test_logged_twice():
    """Curves have points though the logger's interval is longer."""
    for iterations, interval in (1, 1), (7, 3), (1000, 50):
        logger = LoggerHook(interval=50)
        runner = SimpleNamespace(max_iters=iterations, hooks=[logger])
        CurvesHook().before_train(runner)
        assert logger.interval == interval


def load(*argv):
    argv = [str(MASK_RCNN), *argv]
    return train.cli.load_config(train.build_parser().parse_args(argv))


def test_good_options():
    """New leaves, list elements, Runner's arguments and replaced dicts.

    Values are taken as they are: who types them may type code, and mmengine
    would remove blanks.
    """
    cfg = load(
        '--cfg-options',
        'load_from=/data/My Drive (old)/epoch_1.pth',
        'work_dir=__import__("os")',
        'find_unused_parameters=True',
        'model.backbone.with_cp=True',
        'model.backbone.arch._delete_=True',
        'model.backbone.arch.depths=(1, 1, 1, 1)',
        'param_scheduler.1.milestones=[1]',
        'model.test_cfg._delete_=True',
        'model.test_cfg.new.key=1',
        'randomness.seed=0',
    )
    assert cfg.load_from == '/data/My Drive (old)/epoch_1.pth'
    assert cfg.work_dir == '__import__("os")'
    assert cfg.find_unused_parameters is cfg.model.backbone.with_cp is True
    assert cfg.model.backbone.arch == {'depths': (1, 1, 1, 1)}
    assert cfg.param_scheduler[1].milestones == [1]
    assert cfg.model.test_cfg == {'new': {'key': 1}}
    assert cfg.randomness == {'seed': 0}


def test_local_rank_under_mpi(monkeypatch):
    """mmengine reads LOCAL_RANK, which mpirun does not set."""
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '3')
    monkeypatch.setenv('LOCAL_RANK', '0')
    load('--launcher', 'mpi')
    assert os.environ['LOCAL_RANK'] == '3'
