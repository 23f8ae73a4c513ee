"""Tiny models of the project's configs, their data, and runs of the tools."""

import contextlib
import functools
import importlib.util
import io
import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import ManagerMixin
from PIL import Image
from yapf.yapflib import yapf_api

# MMEngine formats the configs that it writes, which takes longer than a tiny
# training.
FORMAT_CODE = yapf_api.FormatCode
yapf_api.FormatCode = lambda text, **options: (text, False)
# Seconds that a loader waits for its workers when the garbage collector finds
# it: after its queues, so that the workers do not know.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1

ROOT = Path(__file__).parents[1]
ARCH = dict(
    depths=(1, 1, 1, 1),
    channels=(8, 16, 24, 32),
    focus_depths=(1, 1),
    focus_heads=(2, 2),
)
DEEPER = ARCH | dict(depths=(1, 2, 1, 1), focus_depths=(2, 1))
TEST_SET = 'test_dataloader.dataset'
# Config files, and what makes their models tiny and their images small.
CONFIGS = {
    'det': (
        'mask_rcnn/overlock_xt_1x.py',
        {
            'model.neck.in_channels': [8, 16, 32, 40],
            'model.neck.out_channels': 16,
            'model.rpn_head.in_channels': 16,
            'model.rpn_head.feat_channels': 16,
            'model.roi_head.bbox_roi_extractor.out_channels': 16,
            'model.roi_head.bbox_head.in_channels': 16,
            'model.roi_head.bbox_head.fc_out_channels': 32,
            'model.roi_head.mask_roi_extractor.out_channels': 16,
            'model.roi_head.mask_head.in_channels': 16,
            'model.roi_head.mask_head.conv_out_channels': 16,
            'model.train_cfg.rcnn.sampler.num': 32,
            'model.test_cfg.rcnn.score_thr': 0.0,
            'model.test_cfg.rcnn.max_per_img': 5,
            'default_hooks.visualization.score_thr': 0.0,
            f'{TEST_SET}.pipeline.1.scale': (96, 96),
        },
    ),
    'seg': (
        'upernet/overlock_xt_160k.py',
        {
            'model.decode_head.in_channels': [8, 16, 32, 40],
            'model.decode_head.channels': 16,
            'model.auxiliary_head.in_channels': 32,
            'model.auxiliary_head.channels': 8,
            f'{TEST_SET}.pipeline.1.scale': (96, 64),
            'test_pipeline.1.scale': (96, 64),  # which mmseg's API reads
        },
    ),
    'cls': (
        'imagenet/overlock_xt_300e.py',
        {
            'model.head.in_channels': [32, 40],
            f'{TEST_SET}.pipeline.1.scale': 72,
            f'{TEST_SET}.pipeline.2.crop_size': 64,
        },
    ),
}


@functools.cache
def load_tool(name, folder='tools'):
    """The module of tools/<name>.py, or of a script in another folder."""
    path = ROOT / folder / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'{name}_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need_openmmlab():
    """Skip a module of tests where OpenMMLab's packages are not complete."""
    for package in ('mmcv._ext', 'mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(package, reason=f'needs {package}')


def randomize(model):
    """Give norms, scales and biases values, which initially are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.std(correction=0) == 0:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(noise + 0.5)
    return model


def shrunk(node, factor):
    """A pipeline's config, with all sizes of images divided by a factor."""
    if isinstance(node, dict):
        return {
            key: _divided(value, factor)
            if key in ('scale', 'scales', 'crop_size')
            else shrunk(value, factor)
            for key, value in node.items()
        }
    if type(node) is list:
        return [shrunk(child, factor) for child in node]
    return node


def _divided(size, factor):
    if isinstance(size, int):
        return size // factor
    return type(size)(_divided(side, factor) for side in size)


def forget_instances():
    """Forget MMEngine's loggers and their kind.

    They are kept by the second in which a run starts.
    """
    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


def no_curves():
    """Leave the curves of a training out, which take as long as it does."""
    return mock.patch('mmoverlock.engine.hooks.draw_curves', lambda *args: {})


def run_tool(name, *argv, status=0, curves=False):
    """Run ``tools/NAME.py ARGV`` in this process; return what it prints.

    forked.py runs them in processes of their own.
    """
    output = io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, LOCAL_RANK='0'))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        stack.callback(forget_instances)
        if not curves:
            stack.enter_context(no_curves())
        try:
            load_tool(name).main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
    assert code == status, output.getvalue()
    return output.getvalue()


def shrink(task):
    """The config of a task, of a tiny model and small images."""
    name, changes = CONFIGS[task]
    cfg = Config.fromfile(ROOT / 'configs' / name)
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.merge_from_dict(changes)
    return cfg


def _write(cfg, folder, name, options):
    cfg.merge_from_dict(options)
    path = Path(folder) / f'{name}.py'
    cfg.dump(path)
    return path


def write_model(task, folder, settings=None):
    """Write a tiny model's config and checkpoint; return the files.

    The task is 'det', 'seg' or 'cls'; the settings are by dotted keys.
    """
    cfg = shrink(task)
    config = _write(cfg, folder, task, settings or {})
    checkpoint = folder / f'{task}.pth'
    save_model(cfg, checkpoint)
    return str(config), str(checkpoint)


def save_model(cfg, checkpoint):
    """Save the weights of a config's model, large enough to differ."""
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save({'state_dict': model.state_dict()}, checkpoint)


def classifier(folder, **settings):
    """Write the config and the images of a tiny classifier; return its path.

    Its training draws random numbers in the data pipeline and the model.
    """
    for seed, name in enumerate(('train/a', 'train/b', 'val/a', 'val/b')):
        images = folder / 'data' / name
        images.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            photo(images / f'{i}.png', (40, 40), 4 * seed + i)
    flip = dict(type='RandomFlip', prob=0.5, direction='horizontal')
    crop = dict(type='RandomResizedCrop', scale=64)

    def loader(split, *steps):
        reader, pack = dict(type='LoadImageFromFile'), dict(type='PackInputs')
        dataset = dict(
            type='CustomDataset',
            data_root=str(folder / 'data'),
            data_prefix=split,
            pipeline=[reader, *steps, pack],
        )
        sampler = dict(type='DefaultSampler', shuffle=split == 'train')
        options = dict(batch_size=4, num_workers=0)
        return dict(dataset=dataset, sampler=sampler, **options)

    backbone = dict(type='OverLoCK', arch=ARCH, out_indices=(3,))
    colors = dict(mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)
    head = dict(type='LinearClsHead', num_classes=2, in_channels=40)
    saving = dict(interval=1, max_keep_ckpts=1, save_best='auto')
    config = dict(
        default_scope='mmpretrain',
        custom_imports=dict(imports=['mmoverlock.models']),
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(num_classes=2, **colors),
            backbone=dict(drop_path_rate=0.3, **backbone),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(topk=(1,), **head),
        ),
        train_dataloader=loader('train', flip, crop),
        val_dataloader=loader('val'),
        val_evaluator=dict(type='Accuracy'),
        test_dataloader=loader('val'),
        test_evaluator=dict(type='Accuracy'),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', **saving),
        ),
    )
    return _write(Config(config | settings), folder, 'classifier', {})


def _drawn(task, layout, folder, images, resize):
    """The config of a tiny model that evaluates on some drawn images.

    The step of the training's pipeline that resizes has that index.
    """
    root = folder / layout
    run_tool('make_sample_data', layout, root, '--images=4', '--size=96')
    cfg = shrink(task)
    cfg.default_hooks.logger.interval = 1
    pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline[resize].scale = pipeline[1].scale
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
        if split != 'train':
            loader.dataset.update(pipeline=pipeline, indices=images)
    return cfg


def detector(folder, **options):
    """Write the config of a tiny Mask R-CNN, and draw data in COCO's layout.

    Options are by dotted keys. As in the two below, the data are in a folder
    of the layout's name beside it.
    """
    cfg = _drawn('det', 'coco', folder, 2, 2)
    ann_file = folder / 'coco' / 'annotations' / 'instances_val2017.json'
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = str(ann_file)
    cfg.train_cfg.max_epochs = 1
    return _write(cfg, folder, 'detector', options)


def segmentor(folder, **options):
    """Write the config of a tiny UperNet, with data in ADE20K's layout."""
    cfg = _drawn('seg', 'ade20k', folder, 3, 2)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_dataloader.dataset.pipeline[3].crop_size = (64, 64)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    return _write(cfg, folder, 'segmentor', options)


def imagenet(folder, **options):
    """Write the config of a classifier, with data in ImageNet's layout."""
    cfg = _drawn('cls', 'imagenet', folder, 3, 1)
    cfg.train_dataloader.batch_size = 4
    cfg.train_cfg.max_epochs = 1
    return _write(cfg, folder, 'imagenet', options)


class Made:
    """Pickled, a call and what it makes filled: see ``object.__reduce__``."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    __call__ = __reduce__  # pickles want what they call to be callable


def photo(path, size, seed=0):
    """Write a picture of some large patches, of size (width, height)."""
    random = np.random.default_rng(seed)
    patches = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(patches).resize(size).save(path)


def code_of(page, language):
    """The code of a language on a page of the documentation."""
    text = (ROOT / page).read_text()
    return ''.join(
        re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)
    )
