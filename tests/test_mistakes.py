"""Mistakes of users: one line says it, and nothing is written.

Nor does a file that a tool is given run code; configs and options are code.
"""

import importlib.util
import os
import pickle
import shutil

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image

from mmoverlock import cli

tiny.need_openmmlab()

CONFIGS = tiny.ROOT / 'configs'
CLS, MASK_RCNN, UPERNET = (
    CONFIGS / tiny.CONFIGS[task][0] for task in ('cls', 'det', 'seg')
)
# Configs of one dataset: what it is for, and its settings.
SMALL = {
    'own': ('train', dict(type='Own')),
    'mine': ('train', dict(type='Coco', metainfo=dict(classes=['a']))),
    'cifar': ('test', dict(type='CIFAR10')),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder of configs and checkpoints, and an image among results.

    Only detector.py, and what is made of it, has all its data.
    """
    folder = tmp_path_factory.mktemp('files')
    cfg = Config.fromfile(tiny.detector(folder))
    for task in ('cls', 'seg'):
        tiny.write_model(task, folder)
    (folder / 'empty.pth').touch()
    torch.save(torch.nn.Linear(1, 1).state_dict(), folder / 'linear.pth')
    (folder / 'baseless.py').write_text("_base_ = 'nowhere.py'")
    for name, (split, dataset) in SMALL.items():
        dataset = dict(data_root='data', **dataset)
        config = {'model': {}, f'{split}_dataloader': dict(dataset=dataset)}
        Config(config).dump(folder / f'{name}.py')
    (folder / 'pictures').mkdir()
    pixels = np.zeros((90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'pictures' / 'a.png')

    attack = tiny.Made(os.mkdir, (str(folder / 'attacked'),))
    contents = {'state_dict': {'a': torch.ones(1)}, 'b': attack}
    hostile, other = folder / 'hostile.pth', folder / 'hostile.np'
    torch.save(contents, hostile)
    other.write_bytes(pickle.dumps(attack))
    cfg.model.neck.init_cfg = dict(type='Pretrained', checkpoint=str(hostile))
    cfg.dump(folder / 'start.py')
    dataset = dict(cfg.val_dataloader.dataset, ann_file=str(other))
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset])
    cfg.test_evaluator.out_file_path = 'results.pkl'  # which is written
    cfg.dump(folder / 'data.py')
    for name, config in ('trained', 'cls.py'), ('data', 'data.py'):
        run = folder / name / 'run' / 'vis_data'
        run.mkdir(parents=True)
        (run / 'scalars.json').touch()
        shutil.copy(folder / config, run / 'config.py')
    shutil.copy(hostile, folder / 'trained' / 'epoch_1.pth')
    return folder


STOCK = f'train {MASK_RCNN}'
OPTION = f'{STOCK} --cfg-options'
TRAIN = 'train FILES/detector.py --work-dir WORK --cfg-options'
RESUME = 'train FILES/detector.py --work-dir WORK --resume'
TEST = 'test FILES/detector.py FILES/empty.pth'
BACKBONE = 'model.backbone'
INIT = f'{BACKBONE}.init_cfg'
HEAD = 'model.roi_head.bbox_head'
DATASET = 'train_dataloader.dataset'
MINE = f'train FILES/mine.py --cfg-options {DATASET}'
URL = 'http://127.0.0.1:9/overlock.pth'  # nothing listens there
PREDICT = 'predict FILES/cls.py FILES/cls.pth x'
KERNELS = 'visualize kernels FILES/cls.py FILES/cls.pth FILES/pictures/a.png'
PRIOR = 'visualize prior FILES/seg.py FILES/seg.pth'
FLOPS = f'get_flops {CLS}'
EXPORT = f'export {CLS} --out m.onnx'
SCRIPT = f'export {CLS} --out m.pt --format torchscript'
REFUSED = 'FILES/hostile.pth is refused: it asks for posix.mk'
UNREAD = (
    'val_dataloader.dataset.datasets.0.ann_file=FILES/hostile.np is not read, '
    'because it could run code ... save what it holds as .json'
)
MASKS = CONFIGS / 'drop_in/overlock_t_mask2former_semantic.py'


@pytest.mark.parametrize(
    ('command', 'words'),
    [
        # Files
        ('train no.py', 'config no.py: ... No such file'),
        (f'train {tiny.ROOT}/LICENSE', 'LICENSE: Only py/yml'),
        ('train FILES', 'is a folder'),
        ('train FILES/baseless.py', 'nowhere.py'),
        ('summarize FILES/coco', 'there are no scalars.json in'),
        (f'test {MASK_RCNN} no.pth', 'checkpoint no.pth does not exist'),
        ('predict FILES/cls.py FILES x', 'is a folder'),
        ('predict FILES/cls.py no.pth x', 'checkpoint no.pth does not exist'),
        ('predict FILES/cls.py FILES/seg.pth x', 'does not fit the model'),
        (f'{STOCK} --resume no.pth', 'load_from: checkpoint no.pth does not'),
        (f'{RESUME} FILES/linear.pth', 'it has no optimizer, meta, message'),
        (f'{OPTION} {INIT}.checkpoint=no.pth', 'checkpoint no.pth does not'),
        (
            f'{TRAIN} {INIT}._delete_=1 {INIT}.type=Pretrained '
            f'{INIT}.checkpoint={URL}',
            f'download ... {URL} ... {INIT}.checkpoint=FILE ... {INIT}=None',
        ),
        # Data that are missing, and how to get them
        (STOCK, f'data/coco/train2017/ does not exist ({DATASET}). Unpack'),
        (STOCK, 'into data/coco, or draw ... sample_data.py coco data/coco'),
        (f'train {UPERNET}', 'ade20k data/ade/ADEChallengeData2016'),
        (f'train {CLS}', 'data/imagenet/train does not exist'),
        ('train FILES/own.py', 'data/ does not exist ... Put the Own there'),
        ('train FILES/mine.py', 'Change the config, ... run in, or draw'),
        (f'{MINE}.data_root=FILES {DATASET}.ann_file=a', 'Put the Coco there'),
        (f'{TRAIN} {DATASET}.ann_file=no.json', 'FILES/coco/no.json does not'),
        (f'{TRAIN} val_evaluator.ann_file=no.json', 'file no.json does not'),
        ('test FILES/own.py FILES/empty.pth', 'own.py has no test set'),
        # Options
        (f'{OPTION} foo', "KEY=VALUE, not 'foo'"),
        (f'{OPTION} a=[1,(2]', 'brackets'),
        (f'{OPTION} modle.type=A', 'there is no modle; did you mean model'),
        (f'{OPTION} max_epochs=1', 'did you mean train_cfg.max_epochs?'),
        (f'{OPTION} model.bakbone.arch=t', 'model; did you mean backbone?'),
        (f'{OPTION} model.bakbone.arch._delete_=True', 'no bakbone in model'),
        (f'{OPTION} {BACKBONE}.arch.depths=1', 'You may set `_delete_=True`'),
        (f'{OPTION} param_scheduler.2.end=5', 'no 2 in param_scheduler'),
        (f'{OPTION} param_scheduler.0=5', 'param_scheduler is a list; set'),
        (f'{OPTION} model={{}} model.type=A', 'model.type: model is set too'),
        (f'{OPTION} {BACKBONE}.arch=s {BACKBONE}.arch.depths=1', 'set one of'),
        (f'{OPTION} train_cfg.max_epochs=1O', "is a number, not '1O'"),
        (f'{STOCK} --launcher pytorch', 'that torchrun starts'),
        (
            'train FILES/detector.py --work-dir FILES/cls.py',
            'folder is needed',
        ),
        (
            f'{TRAIN} val_dataloader=None',
            'val_evaluator should be either all None',
        ),
        (f'{OPTION} data_root=x', 'data_root is a variable of the config'),
        (f'{TRAIN} model.type=A', 'the config: A is not in the mmdet::model'),
        (f'{FLOPS} --cfg-options model.type=A', 'A is not in the mmpretrain'),
        (f'{FLOPS} --cfg-options {BACKBONE}.type=A', 'A is not in the mmpre'),
        (f'{FLOPS} --cfg-options {BACKBONE}.dept=1', "argument 'dept'"),
        (f'{TRAIN} {BACKBONE}.drop_path_rate=2', 'OverLoCK of the ... drop_p'),
        (f'{TRAIN} {HEAD}.num_classes=79', ' has more classes than a head'),
        (f'{STOCK} --seed {2**32}', f'--seed {2**32} is not in [0, 2^32)'),
        (f'{OPTION} auto_scale_lr=None --auto-scale-lr', '.base_batch_size'),
        (f'{TEST} --out out.json', 'out.json does not end in .pkl'),
        (f'{TEST} --tta', 'there is no tta_model'),
        ('test FILES/cls.py FILES/cls.pth --tta --show-dir x', 'one view of'),
        ('test FILES/cifar.py FILES/empty.pth --show-dir x', 'mmdet, mmseg'),
        # Checkpoints that are written
        ('publish none.pth out.pth', 'none.pth: '),
        ('publish none.pth out', 'ends in .pth: out'),
        ('convert_checkpoint none.pth out.pth', 'none.pth: '),
        ('convert_checkpoint FILES/cls.pth out', 'must end in .pth'),
        ('convert_checkpoint FILES/cls.pth FILES/cls.pth', 'exists; --over'),
        ('convert_checkpoint FILES/seg.pth out.pth', 'which has decode_head.'),
        ('convert_checkpoint FILES/linear.pth out.pth', 'has no OverLoCK'),
        # Trained models
        (f'{PREDICT} --cfg-options {tiny.TEST_SET}.type=Own', 'names the'),
        (f'{PREDICT} --cfg-options default_scope=mmpose', 'scope mmpose'),
        (
            f'{PREDICT} --cfg-options {tiny.TEST_SET}.classes=[a,b]',
            'dataset_meta ... fewer classes than a head (2, and head.num_cl',
        ),
        (f'{PREDICT} --device abacus', '--device abacus: Expected one of'),
        (f'{KERNELS} --device cuda:99', '--device cuda:99: '),
        (f'{KERNELS} --at 64,0', '64,0 is outside of a, which'),
        (f'{KERNELS} --block 1', '1: stage 3 has blocks 0 to 0'),
        (f'{PRIOR} none', 'none: there is no such file'),
        (f'{PRIOR} x --cfg-options {BACKBONE}.out_indices=(0,1)', '(0, 1)'),
        (f'{FLOPS} --shape 0 96', '--shape takes'),
        (f'{EXPORT} --shape 0 96', '--shape takes a height'),
        (f'{EXPORT} --dynamic --shape 224 250', 'multiples of 32 from 224'),
        (f'{EXPORT} --dynamic --shape 192 224', 'multiples of 32 from 224'),
        (f'{EXPORT} --format torch-export', 'writes .pt2 files, not'),
        (f'{EXPORT} --cfg-options default_scope=mmpose', 'mmdet, mmseg, mm'),
        (f'{SCRIPT} --dynamic', 'TorchScript files have a fixed size'),
        (f'export {MASKS} --out m.onnx', '--backbone-only works with it'),
        # Hostile files
        (f'{RESUME} FILES/hostile.pth', REFUSED),
        ('train FILES/start.py --work-dir WORK', REFUSED),
        ('test FILES/detector.py FILES/hostile.pth --work-dir WORK', REFUSED),
        ('predict FILES/cls.py FILES/hostile.pth FILES/pictures', REFUSED),
        ('convert_checkpoint FILES/hostile.pth out.pth', REFUSED),
        ('summarize FILES/trained', 'epoch_1.pth is refused: it asks'),
        ('train FILES/data.py --work-dir WORK', UNREAD),
        ('summarize FILES/data', UNREAD),
    ],
)
def test_mistake(files, tmp_path, mistake, command, words):
    before = {*files.rglob('*')}
    command = command.replace('WORK', str(tmp_path))
    name, *argv = command.replace('FILES', str(files)).split()
    if name in ('predict', 'visualize'):
        argv += '--out', files
    said = mistake(name, *argv)
    for part in words.replace('FILES', str(files)).split(' ... '):
        assert part in said
    assert {*files.rglob('*')} == before


def test_what_is_no_mistake_of_the_user():
    """It keeps its traceback."""
    for failure in (
        TypeError("unexpected keyword argument 'other'"),
        KeyError('other'),
        ValueError('other'),
        OSError('other'),
    ):
        with pytest.raises(type(failure), match='other'):
            with cli.explain_failures(Config(), {'model.x': 1}):
                raise failure


def test_ops_missing(mistake, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    message = mistake('train', MASK_RCNN)
    assert 'mmcv._ext' in message and '--no-build-isolation' in message


def test_launcher_without_gpu(mistake, monkeypatch, files):
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    monkeypatch.setenv('SLURM_PROCID', '0')
    argv = files / 'detector.py', '--launcher', 'slurm'
    assert '--launcher slurm needs GPUs; ' in mistake('train', *argv)
