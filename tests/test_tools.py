"""tools/train.py and tools/test.py: real runs, and what users get wrong."""

import importlib.util
import os
import pickle
import re
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


# ------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ('kind', 'metric'),
    [
        ('detector', 'coco/segm_mAP'),
        ('segmentor', 'mIoU'),
        ('classifier', 'accuracy/top1'),
    ],
)
def test_test(tmp_path, kind, metric):
    """It logs scores, saves results, and draws every image."""
    config = getattr(tiny, kind)(tmp_path)
    tiny.save_model(Config.fromfile(config), tmp_path / 'model.pth')
    log = tiny.run_tool(
        *('test', config, tmp_path / 'model.pth', '--work-dir', tmp_path),
        *('--out', tmp_path / 'new' / 'out.pkl'),
        *('--show-dir', tmp_path / 'drawn'),
    )
    assert metric in log
    results = pickle.loads((tmp_path / 'new' / 'out.pkl').read_bytes())
    drawn = sorted((tmp_path / 'drawn').rglob('*.??g'))
    assert len(drawn) == len({Path(r['img_path']).name for r in results}) > 0
    if kind == 'classifier':
        assert [r['gt_label'].item() for r in results] == [0] * 4 + [1] * 4
        assert all(r['pred_score'].shape == (2,) for r in results)
        return
    for result, picture in zip(results, drawn, strict=True):
        if kind == 'segmentor':
            labels = result['pred_sem_seg']['data']
            assert labels.shape == (1, *result['ori_shape'])
            assert 'seg_logits' not in result
            continue
        instances = result['pred_instances']
        assert len(instances['bboxes']) == len(instances['masks']) > 0
        assert instances['masks'][0]['size'] == list(result['ori_shape'])
        original = np.asarray(Image.open(result['img_path']), dtype=int)
        picture = np.asarray(Image.open(picture), dtype=int)
        prediction = picture[:, original.shape[1] :]  # the truth is left of it
        assert abs(prediction - original).max() > 64


@pytest.mark.parametrize('wrapped', [False, True])
def test_fuse(monkeypatch, files, wrapped):
    """--fuse fuses what is tested: with EMAHook, the averaged weights."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    runner = mock.Mock(model=nn.DataParallel(model) if wrapped else model)
    monkeypatch.setattr(test.cli, 'build_runner', lambda *_, **__: runner)
    argv = [str(files / 'detector.py'), str(files / 'empty.pth')]
    test.main(argv)
    assert not runner.register_hook.called
    test.main([*argv, '--fuse'])
    [[hook]] = [call.args for call in runner.register_hook.call_args_list]
    average = EMAHook()
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


# --------------------------------------------------------------- mistakes

MINE = dict(type='Mine', data_root='mine')
REPEATED = dict(
    type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[MINE])
)
IMAGENET = dict(type='ImageNet', data_root='data/imagenet', split='train')
SMALL = {
    'imagenet': dict(train_dataloader=dict(dataset=IMAGENET)),
    'mine': dict(train_dataloader=dict(dataset=REPEATED)),
    'untested': dict(test_dataloader=None),
    'cifar': dict(test_dataloader=dict(dataset=dict(type='CIFAR10'))),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder of configs and of a checkpoint that is empty.

    Only detector.py has all its data.
    """
    folder = tmp_path_factory.mktemp('files')
    tiny.detector(folder)
    (folder / 'empty.pth').touch()
    (folder / 'baseless.py').write_text("_base_ = 'nowhere.py'")
    for name, config in SMALL.items():
        Config({'model': {}, **config}).dump(folder / f'{name}.py')
    return folder


STOCK = f'train {MASK_RCNN}'
OPTION = f'{STOCK} --cfg-options'
TRAIN = 'train FILES/detector.py --cfg-options'
TEST = 'test FILES/detector.py FILES/empty.pth'
INIT = 'model.backbone.init_cfg'
DATASET = 'train_dataloader.dataset'


@pytest.mark.parametrize(
    ('command', 'words'),
    [
        ('summarize FILES/coco', 'no config in'),
        (f'train {MASK_RCNN.parent}/overlock_tx_1x.py', f' {MASK_RCNN} '),
        (f'train {ROOT}/LICENSE', 'no .py or .yml'),
        ('train FILES/baseless.py', 'nowhere.py'),
        (f'test {MASK_RCNN} no.pth', 'checkpoint no.pth does not exist'),
        (f'{STOCK} --resume no.pth', 'load_from: checkpoint no.pth does not'),
        (f'{OPTION} {INIT}.checkpoint=no.pth', 'checkpoint no.pth does not'),
        # Data that are missing, and how to get them
        (
            STOCK,
            'data/coco/train2017/ does not exist (train_dataloader.dataset). '
            'Unpack train2017.zip, val2017.zip and annotations_trainval2017'
            '.zip from https://cocodataset.org/#download so that data/coco '
            'holds train2017/, val2017/ and annotations/, or draw sample '
            'data: python tools/make_sample_data.py coco data/coco\n',
        ),
        ('train FILES/imagenet.py', 'data/imagenet/train does not exist'),
        ('train FILES/mine.py', f'({DATASET}.dataset.datasets.0)'),
        (f'{TRAIN} {DATASET}.ann_file=no.json', 'FILES/coco/no.json does not'),
        (f'{TRAIN} val_evaluator.ann_file=no.json', 'file no.json does not'),
        (
            f'{TEST} --cfg-options {DATASET}.data_root=nowhere '
            'test_dataloader.dataset.data_prefix.img=elsewhere',
            'FILES/coco/elsewhere does not exist (test_dataloader.dataset)',
        ),
        ('test FILES/untested.py FILES/empty.pth', 'd.py has no test set'),
        # Options
        (f'{OPTION} foo', "KEY=VALUE, not 'foo'"),
        (f'{OPTION} a=[1,(2]', 'brackets'),
        (f'{OPTION} modle.type=A', 'there is no modle; did you mean model'),
        (f'{OPTION} model.bakbone.arch=t', 'model; did you mean backbone?'),
        (f'{OPTION} model.bakbone.arch._delete_=True', 'no bakbone in model'),
        (f'{OPTION} model.backbone.arch.depths=1', 'backbone.arch._delete_='),
        (f'{OPTION} param_scheduler.2.end=5', 'is a list of 2'),
        (f'{OPTION} param_scheduler.0=5', 'is a list of 2'),
        (
            f'{OPTION} data_root=/data/coco/',
            'data_root is a variable of the config file, which is used while '
            'it is read; set what is made from it: '
            'test_dataloader.dataset.data_root, test_evaluator.ann_file, '
            f'{DATASET}.data_root, val_dataloader.dataset.data_root, '
            'val_evaluator.ann_file\n',
        ),
        (f'{OPTION} train_pipeline.0.type=A', 'train_pipeline is a variable'),
        (f'{OPTION} {INIT}=None {INIT}.type=Constant', f'both {INIT} and'),
        (
            f'{OPTION} {DATASET}.metainfo.classes=[a_light,car]',
            'classes=[a light,car]: blanks in the elements of a list',
        ),
        (f'{STOCK} --seed {2**32}', f'--seed {2**32} is not in [0, 2^32)'),
        (f'{OPTION} auto_scale_lr=None --auto-scale-lr', '.base_batch_size'),
        (f'{TEST} --out out.json', 'out.json does not end in .pkl'),
        (
            'test FILES/cifar.py FILES/empty.pth --show-dir drawn',
            'mmdet, mmseg, mmpretrain',
        ),
    ],
)
def test_mistake(mistake, files, command, words):
    """One line says it, and nothing is written."""
    argv = command.replace('FILES', str(files)).split()
    argv = [word.replace('a_light', 'a light') for word in argv]
    assert words.replace('FILES', str(files)) in mistake(*argv)


def test_config_in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)
    message = tiny.run_tool('train', 'overlock_xt_1x', status=2)
    assert 'configs/mask_rcnn/overlock_xt_1x.py' in message


def test_good_options():
    """New leaves, list elements, Runner's arguments and replaced dicts.

    Values are taken as they are: who types them may type code, and mmengine
    would remove blanks.
    """
    options = {
        'load_from': '/data/My Drive (old)/epoch_1.pth',
        'work_dir': '__import__("os")',
        'find_unused_parameters': True,
        'model.backbone.with_cp': True,
        'model.backbone.arch._delete_': True,
        'model.backbone.arch.depths': (1, 1, 1, 1),
        'param_scheduler.1.milestones': [1],
        'randomness.seed': 0,
    }
    given = [f'{key}={value}' for key, value in options.items()]
    argv = [str(MASK_RCNN), '--cfg-options', *given]
    cfg = train.cli.load_config(train.build_parser().parse_args(argv))
    for key in ('load_from', 'work_dir', 'find_unused_parameters'):
        assert cfg[key] == options[key]
    assert cfg.model.backbone.with_cp
    assert cfg.model.backbone.arch == {'depths': (1, 1, 1, 1)}
    assert cfg.param_scheduler[1].milestones == [1]
    assert cfg.randomness == {'seed': 0}


def test_ops_missing(mistake, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    message = mistake('train', MASK_RCNN)
    assert 'mmcv._ext' in message and '--no-build-isolation' in message


def test_launcher_without_gpu(mistake, monkeypatch, files):
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    argv = files / 'detector.py', '--launcher', 'slurm'
    assert '--launcher slurm needs GPUs; ' in mistake('train', *argv)


def test_local_rank_under_mpi(monkeypatch):
    """mmengine reads LOCAL_RANK, which mpirun does not set."""
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '3')
    monkeypatch.setenv('LOCAL_RANK', '0')
    argv = [str(MASK_RCNN), '--launcher', 'mpi']
    train.cli.load_config(train.build_parser().parse_args(argv))
    assert os.environ['LOCAL_RANK'] == '3'


URL = 'http://127.0.0.1:9/overlock.pth'  # nothing listens there


def test_mistake_that_building_finds(files, tmp_path):
    """A key or value that the class does not take, a URL without a file."""
    path = 'model.backbone.drop_pathrate'
    new = f'{INIT}._delete_=True', f'{INIT}.type=Pretrained'
    for options, words in (
        ([f'{path}=0.1'], f"{path}: .*unexpected .*argument 'drop_pathrate'"),
        (['model.backbone.drop_path_rate=2'], 'OverLoCK of the .*: drop_path'),
        (
            [*new, f'{INIT}.checkpoint={URL}'],
            f'cannot download {URL}.*{INIT}.checkpoint=FILE.*{INIT}=None',
        ),
    ):
        argv = files / 'detector.py', '--work-dir', tmp_path, '--cfg-options'
        message = tiny.run_tool('train', *argv, *options, status=2)
        assert 'Traceback' not in message
        assert re.search(words, message)
    with pytest.raises(TypeError, match='other'):  # with its traceback
        with train.cli.explain_failures(Config(), {'model.x': 1}):
            raise TypeError("unexpected keyword argument 'other'")
