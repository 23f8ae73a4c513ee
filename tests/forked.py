"""Runs the tools in processes forked from one that has their imports."""

import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image
from tiny import BACKBONE, CONFIGS, ROOT, load_tool

TIMEOUT = 1800  # seconds, because machines may be busy

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['mmdet.apis', 'mmpretrain', 'mmseg.apis'])


def start(*argv, log, prepare=None, tool='train', gpu=False):
    """Start ``tools/train.py ARGV``; return the process.

    Args:
        argv: Of the command line.
        log (Path): File for stdout and stderr.
        prepare (callable, optional): What the process does first.
        tool (str): Another tool than train.
        gpu (bool): Whether it sees GPUs. Defaults to False.
    """
    argv = [str(arg) for arg in argv]
    process = _context.Process(
        target=_run, args=(tool, argv, log, prepare, gpu)
    )
    process.start()
    return process


def run(*argv, log, status=0, **options):
    """Run ``tools/train.py ARGV`` as `start` does; return its output."""
    process = start(*argv, log=log, **options)
    process.join(TIMEOUT)
    process.kill()
    output = log.read_text()
    assert process.exitcode == status, output
    return output


def _run(tool, argv, log, prepare, gpu):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(file, 'w', buffering=1)
    os.environ['LOCAL_RANK'] = '0'
    if not gpu:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    if prepare:
        prepare()
    load_tool(tool).main(argv)


def classifier(folder, **settings):
    """Write the config and the images of a tiny classifier.

    Its training draws random numbers in the data pipeline and the model.

    Args:
        folder (Path): Where to.
        settings: What else is in the config, or other than here.

    Returns:
        Path: The config.
    """
    random = np.random.default_rng(0)
    for name in ('train/a', 'train/b', 'val/a', 'val/b'):
        images = folder / 'data' / name
        images.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f'{i}.png')
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(type='RandomResizedCrop', scale=64),
        dict(type='PackInputs'),
    ]

    def loader(split, pipeline):
        return dict(
            batch_size=4,
            num_workers=0,
            dataset=dict(
                type='CustomDataset',
                data_root=str(folder / 'data'),
                data_prefix=split,
                pipeline=pipeline,
            ),
            sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
        )

    config = dict(
        default_scope='mmpretrain',
        custom_imports=dict(imports=['mmoverlock.models']),
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(
                num_classes=2, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True
            ),
            backbone=dict(
                type='OverLoCK',
                arch=dict(
                    depths=(1, 1, 1, 1),
                    channels=(8, 16, 24, 32),
                    focus_depths=(1, 1),
                    focus_heads=(2, 2),
                ),
                out_indices=(3,),
                drop_path_rate=0.3,
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead', num_classes=2, in_channels=40, topk=(1,)
            ),
        ),
        train_dataloader=loader('train', pipeline),
        val_dataloader=loader('val', [pipeline[0], pipeline[-1]]),
        val_evaluator=dict(type='Accuracy'),
        test_dataloader=loader('val', [pipeline[0], pipeline[-1]]),
        test_evaluator=dict(type='Accuracy'),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook',
                interval=1,
                max_keep_ckpts=1,
                save_best='auto',
            ),
        ),
    )
    config.update(settings)
    path = Path(folder) / 'classifier.py'
    Config(config).dump(path)
    return path


def _shrunk(config, options, data_root, scale, images):
    """A config with a tiny backbone, small images and few to evaluate on."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.merge_from_dict(
        {f'model.backbone.{k}': v for k, v in BACKBONE.items()}
    )
    cfg.merge_from_dict(options)
    for split, resize in (('train', 2), ('val', 1), ('test', 1)):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data_root)
        loader.dataset.pipeline[resize].scale = scale
        if split != 'train':
            loader.dataset.indices = images
    return cfg


def detector(folder, config=CONFIGS['det'][0], **options):
    """Write the config of a tiny Mask R-CNN, and draw COCO-style data.

    Args:
        folder (Path): Where to; the data are in ``folder / 'coco'``.
        config (str): The config it is made of, relative to configs/.
        options: What else is in the config, by dotted keys.

    Returns:
        Path: The config.
    """
    data_root = folder / 'coco'
    load_tool('make_sample_data').main(
        ['coco', str(data_root), '--images=4', '--size=96']
    )
    cfg = _shrunk(config, CONFIGS['det'][1], data_root, (96, 96), 2)
    ann_file = str(data_root / 'annotations' / 'instances_val2017.json')
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = ann_file
    cfg.merge_from_dict({'train_cfg.max_epochs': 1, **options})
    path = Path(folder) / 'detector.py'
    cfg.dump(path)
    return path


def segmentor(folder, **options):
    """Write the config of a tiny UperNet, and draw data in ADE20K's layout.

    Args:
        folder (Path): Where to; the data are in ``folder / 'ade20k'``.
        options: What else is in the config, by dotted keys.

    Returns:
        Path: The config.
    """
    data_root = folder / 'ade20k'
    load_tool('make_sample_data').main(
        ['ade20k', str(data_root), '--images=4', '--size=96']
    )
    cfg = _shrunk(*CONFIGS['seg'], data_root, (96, 64), 3)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_dataloader.dataset.pipeline[3].crop_size = (64, 64)
    cfg.merge_from_dict(
        {
            'train_cfg.max_iters': 2,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 2,
            **options,
        }
    )
    path = Path(folder) / 'segmentor.py'
    cfg.dump(path)
    return path
