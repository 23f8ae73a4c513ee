"""Every config: what it builds, its recipe, and a run of every family."""

import importlib.util
import itertools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fusion import assert_fuses, far
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.fileio import load
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

from mmoverlock.models import OverLoCK

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

ROOT = tiny.ROOT
CONFIGS = ROOT / 'configs'
PATHS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.glob('*/*.py')
    if path.parent.name != '_base_'
)
DROP_IN = [path for path in PATHS if path.startswith('drop_in/')]
RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'


def read(path):
    """The config, with its scope as the default."""
    cfg = Config.fromfile(CONFIGS / path)
    init_default_scope(cfg.default_scope)
    return cfg


def readers(model):
    """The configs of what reads the maps of the backbone: neck or heads."""
    names = 'head', 'decode_head', 'auxiliary_head', 'panoptic_head'
    parts = [model.get(name) or {} for name in ('neck', *names)]
    parts = [part for part in parts if 'in_channels' in part]
    return parts[:1] if 'in_channels' in (model.get('neck') or {}) else parts


def channels_for(reader, channels):
    """``in_channels`` of a reader of maps of these channels."""
    if isinstance(reader.in_channels, int):
        return channels[reader.get('in_index', -1)]
    return list(channels)


# ----------------------------------------------------------------- as built


def test_there_are_configs():
    """Of every arch; a name is a work dir's, and what mim finds it by."""
    for arch, (folder, schedule) in itertools.product(
        ('xt', 't', 's', 'b'),
        [
            ('mask_rcnn', '1x'),
            ('mask_rcnn', '3x'),
            ('cascade_mask_rcnn', 'cascade_3x'),
            ('upernet', '160k'),
            ('imagenet', '300e'),
        ],
    ):
        assert f'{folder}/overlock_{arch}_{schedule}.py' in PATHS
    names = [Path(path).name for path in PATHS]
    assert sorted(names) == sorted({*names})


@pytest.mark.parametrize('path', PATHS)
def test_backbone(path):
    """Of the arch that the name says, with heads that fit it."""
    cfg = read(path)
    with torch.device('meta'):
        channels = MODELS.build(cfg.model.backbone).out_channels
    assert readers(cfg.model)
    for reader in readers(cfg.model):
        assert reader.in_channels == channels_for(reader, channels)
    folder, arch = re.fullmatch(r'(.*)/overlock_(\w+?)_\w+\.py', path).groups()
    backbone = cfg.model.backbone
    if arch == 'mini':  # no arch of the paper: there are no weights for it
        assert isinstance(backbone.arch, dict)
        assert 'init_cfg' not in backbone
        return
    assert backbone.arch == arch
    if cfg.default_scope == 'mmpretrain':
        assert 'init_cfg' not in backbone
        return
    assert cfg.sync_bn == 'torch'
    assert backbone.init_cfg == {
        'type': 'Pretrained',
        'checkpoint': f'{RELEASE}overlock_{arch}_in1k_224.pth',
    }
    if folder != 'drop_in':
        fused = folder in ('mask_rcnn', 'cascade_mask_rcnn')
        assert backbone.get('fuse_overview', False) == fused


@pytest.mark.parametrize('path', PATHS)
def test_optimizer(path):
    """No norm and no table of position biases decays, and all others do."""
    cfg = read(path)
    cfg.model.backbone.arch = tiny.ARCH  # the rule is one for all
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = cfg.optim_wrapper.to_dict()  # a ConfigDict takes long
    optimizer = build_optim_wrapper(model, wrapper).optimizer
    decays = {
        id(parameter): group['weight_decay']
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    keys = cfg.optim_wrapper.get('paramwise_cfg', {}).get('custom_keys', {})
    if path in DROP_IN and ('norm' not in keys or 'backbone' in keys):
        return  # the rule is that of another recipe
    decay = cfg.optim_wrapper.optimizer.weight_decay
    for name, parameter in model.named_parameters():
        spared = 'norm' in name or 'relative_position_bias_table' in name
        expected = 0 if spared else decay
        assert decays.pop(id(parameter)) == expected, name
    assert not decays


# ------------------------------------------------------------------ recipes

# By config, what the paper and the release say.
EPOCHS = 'train_cfg.max_epochs'
LR = 'optim_wrapper.optimizer.lr'
DECAY = 'optim_wrapper.optimizer.weight_decay'
WARM_UP, STEPS = 'param_scheduler.0.end', 'param_scheduler.1.milestones'
DROP_PATH = 'model.backbone.drop_path_rate'
THREE_TIMES = {EPOCHS: 36, LR: 1e-4, DECAY: 0.05, STEPS: [27, 33]}
RECIPES = {
    'mask_rcnn/overlock_t_1x': {
        **{EPOCHS: 12, LR: 2e-4, DECAY: 0.05, WARM_UP: 500, STEPS: [8, 11]},
        DROP_PATH: 0.2,
    },
    'mask_rcnn/overlock_xt_3x': THREE_TIMES | {DROP_PATH: 0.1},
    'cascade_mask_rcnn/overlock_b_cascade_3x': THREE_TIMES | {DROP_PATH: 0.6},
    'upernet/overlock_s_160k': {
        'train_cfg.max_iters': 160_000,
        **{LR: 6e-5, DECAY: 0.01, WARM_UP: 1500, DROP_PATH: 0.3},
    },
    'imagenet/overlock_b_300e': {
        **{EPOCHS: 300, LR: 2e-3, DECAY: 0.05, DROP_PATH: 0.5},
        'auto_scale_lr.base_batch_size': 2048,
        'optim_wrapper.clip_grad.max_norm': 5.0,
        'test_dataloader.dataset.pipeline.1.scale': 229,
    },
}


@pytest.mark.parametrize('path', RECIPES)
def test_recipe(path):
    cfg = read(f'{path}.py')
    for key, expected in RECIPES[path].items():
        value = cfg
        for part in key.split('.'):
            value = value[int(part) if part.isdigit() else part]
        assert value == expected, key


def test_upernet_test_sizes():
    """The short side is 512; both are rounded up to a multiple of 32."""
    cfg = read('upernet/overlock_t_160k.py')
    _, resize, round_up, *_ = cfg.test_dataloader.dataset.pipeline
    assert round_up.interpolation == 'bicubic'
    transform = Compose([resize, round_up])

    def size(height, width):
        image = np.zeros((height, width, 3), np.uint8)
        results = transform({'img': image, 'img_shape': image.shape[:2]})
        assert results['img_shape'] == results['img'].shape[:2]
        return results['img_shape']

    assert size(333, 500) == (512, 800)  # 769
    assert size(256, 256) == (512, 512)
    assert size(500, 333) == (800, 512)
    assert size(100, 1000) == (224, 2048)  # the long side is 2048 at most


def test_upernet_views():
    """Six scales, mirrored and not, of the sizes of single-scale testing."""
    cfg = read('upernet/overlock_t_160k.py')
    steps = cfg.tta_pipeline[1].transforms[:-2]  # without labels and packing
    views = set()
    image = np.arange(333 * 500 * 3, dtype=np.uint8).reshape(333, 500, 3)
    for choice in itertools.product(*steps):
        results = Compose(choice)(
            {'img': image, 'img_shape': image.shape[:2], 'scale': None}
        )
        views.add((*results['img_shape'], results['flip']))
    sizes = [(256, 384), (384, 608), (512, 800)]
    sizes += [(640, 992), (768, 1184), (896, 1376)]
    assert views == {(*s, flip) for s in sizes for flip in (True, False)}


def test_metafiles():
    """Every config is in the metafile of its folder, and nothing else."""
    listed = {}
    for folder in {Path(path).parent for path in PATHS}:
        metafile = load(CONFIGS / folder / 'metafile.yml')
        collections = {c['Name']: c for c in metafile['Collections']}
        for model in metafile['Models']:
            listed[model['Config']] = model['Name']
            readme = collections[model['In Collection']]['README']
            assert readme == f'configs/{folder}/README.md'
            text = (ROOT / readme).read_text()
            assert f'({Path(model["Config"]).name})' in text
            for result in model.get('Results', []):
                for value in result['Metrics'].values():
                    assert f' {value} ' in text
            if 'Weights' in model:
                assert f'({model["Weights"]})' in text
    assert sorted(listed) == [f'configs/{path}' for path in PATHS]
    assert len(set(listed.values())) == len(listed)


# ------------------------------------------------------------------ drop-in

# Smaller heads, and as many queries as 64 px images have positions for.
CHEAPER = {
    'DINO': {
        'num_queries': 20,
        'dn_cfg.group_cfg.num_dn_queries': 10,
        'encoder.num_layers': 1,
        'decoder.num_layers': 1,
    },
    'Mask2Former': {
        'data_preprocessor.batch_augments': None,
        'panoptic_head.transformer_decoder.num_layers': 1,
        'train_cfg.num_points': 112,
    },
    'MaskRCNN': {'train_cfg.rcnn.sampler.num': 16},
    'FasterRCNN': {'train_cfg.rcnn.sampler.num': 16},
    'EncoderDecoder': {'data_preprocessor.size': (64, 64)},
    'Mask2FormerHead': {
        'decode_head.transformer_decoder.num_layers': 1,
        'decode_head.train_cfg.num_points': 112,
    },
}


def random_batch(scope):
    """Two images of 64 px with labels, as a data loader gives them."""
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2, (3, 64, 64), num_items=[1, 2], num_classes=80, with_mask=True
        )
    samples = []
    for i in range(2):
        if scope == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo={'img_shape': (64, 64)})
            labels = torch.randint(150, (1, 64, 64))
            sample.gt_sem_seg = PixelData(data=labels)
        else:
            from mmpretrain.structures import DataSample

            sample = DataSample().set_gt_label(i)
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
        samples.append({'inputs': image, 'data_samples': sample})
    return pseudo_collate(samples)


def check_training(cfg):
    """One loss and backward of a config, with a tiny backbone."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.backbone.update(arch=tiny.ARCH, init_cfg=None)
    with torch.device('meta'):
        backbone = MODELS.build(model.backbone)
    for reader in readers(model):
        reader.in_channels = channels_for(reader, backbone.out_channels)
    options = Config({'model': model})
    for part in (model, model.get('decode_head', {})):
        for key, value in CHEAPER.get(part.get('type'), {}).items():
            options.merge_from_dict({f'model.{key}': value})
    model = revert_sync_batchnorm(MODELS.build(options.model))
    model.init_weights()
    model.train()
    data = model.data_preprocessor(random_batch(cfg.default_scope), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert isinstance(model.backbone, OverLoCK)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.backbone.patch_embed1[0].weight.grad.any()
    return model, data


@pytest.mark.parametrize('path', DROP_IN)
def test_drop_in(path):
    """It trains, and fused it computes the same."""
    model, data = check_training(read(path))

    def call(images, samples):
        maps = model.extract_feat(images)
        if hasattr(model, 'rpn_head'):
            return maps, model.rpn_head(maps)
        if 'mask2former_semantic' in path:
            return maps, model.decode_head(maps, samples)
        return maps, model(images, samples)

    images = data['inputs'].double()
    assert_fuses(far(model), images, data['data_samples'], call=call)
    norms = [type(m) for m in model.backbone.modules()]
    assert not {nn.BatchNorm2d, nn.SyncBatchNorm} & {*norms}


SEG_MODEL = """
    pretrained=None,
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384),
"""
STOCK = {
    'mmdet': ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', None),
    'mmseg': ('upernet/upernet_r50_4xb4-160k_ade20k-512x512.py', SEG_MODEL),
    'mmpretrain': (
        'resnet/resnet50_8xb32_in1k.py',
        'head=dict(in_channels=640),\n',
    ),
}


@pytest.mark.parametrize('scope', STOCK)
def test_recipe_of_readme(scope, tmp_path):
    """What README says to write, over configs of the installed packages."""
    name, changes = STOCK[scope]
    section = (ROOT / 'README.md').read_text().split('## In your own config')
    recipe = re.search('```python\n(.*?)```', section[1], re.DOTALL)[1]
    package = Path(importlib.util.find_spec(scope).origin).parent
    base = package / '.mim' / 'configs' / name
    if scope == 'mmdet':
        assert f"_base_ = 'mmdet::{name}'\n" in recipe
    else:
        recipe = re.sub("_base_ = '.*'", f'_base_ = {str(base)!r}', recipe)
        recipe = re.sub('    neck=dict.*\n', changes, recipe)
    if scope == 'mmpretrain':
        recipe = recipe.replace("arch='t'", "arch='t', out_indices=(3,)")
    config = tmp_path / 'config.py'
    config.write_text(recipe)
    cfg = Config.fromfile(config)
    assert cfg.default_scope == scope
    init_default_scope(scope)
    with torch.device('meta'):
        channels = MODELS.build(cfg.model).backbone.out_channels
    for reader in readers(cfg.model):
        assert reader.in_channels == channels_for(reader, channels)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    check_training(cfg)


# --------------------------------------------------------------------- runs


def shrunk(node):
    """The config of a pipeline with all sizes divided by 8."""
    if isinstance(node, dict):
        return {
            key: eighth(value)
            if key in ('scale', 'scales', 'crop_size')
            else shrunk(value)
            for key, value in node.items()
        }
    return [shrunk(child) for child in node] if type(node) is list else node


def eighth(size):
    if isinstance(size, int):
        return size // 8
    return type(size)(eighth(side) for side in size)


def test_run_cascade(tmp_path):
    """One iteration with multi-scale and crop, and the validation after it.

    test_tools.py does the same with Mask R-CNN.
    """
    data, work_dir = tmp_path / 'data', tmp_path / 'work'
    tiny.run_tool('make_sample_data', 'coco', data, '--images=2', '--size=96')
    cfg = read('cascade_mask_rcnn/overlock_xt_cascade_3x.py')
    cfg.model.backbone.update(arch=tiny.ARCH, init_cfg=None)
    cfg.model.neck.in_channels = [8, 16, 32, 40]
    for head in cfg.model.roi_head.bbox_head:
        head.update(conv_out_channels=16, fc_out_channels=32)
    for stage in cfg.model.train_cfg.rcnn:
        stage.sampler.num = 8
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(data), indices=2)
        loader.dataset.pipeline = shrunk(loader.dataset.pipeline)
        if split != 'train':
            ann_file = str(data / loader.dataset.ann_file)
            cfg[f'{split}_evaluator'].ann_file = ann_file
    cfg.default_hooks.logger.interval = 1
    cfg.train_cfg.max_epochs = 1
    cfg.model.test_cfg.rpn.max_per_img = 20
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    cfg.dump(tmp_path / 'cascade.py')
    tiny.run_tool('train', tmp_path / 'cascade.py', '--work-dir', work_dir)
    [log] = work_dir.glob('*/vis_data/scalars.json')
    lines = log.read_text().splitlines()
    logged = {k: v for line in lines for k, v in json.loads(line).items()}
    for name in ('s0.loss_cls', 's1.loss_bbox', 's2.loss_mask', 'loss'):
        assert np.isfinite(logged[name])
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= logged.keys()
    assert (work_dir / 'epoch_1.pth').exists()


def test_tta(trained, tmp_path, monkeypatch):
    """--tta averages twelve views of an image."""
    from mmseg.models import EncoderDecoder

    path, work_dir, _ = trained('segmentor')
    assert [*work_dir.glob('best_mIoU_iter_2.pth')]
    cfg = Config.fromfile(path)
    cfg.tta_pipeline = shrunk(cfg.tta_pipeline)
    cfg.dump(tmp_path / 'config.py')
    sizes = []
    predict = EncoderDecoder.predict

    def spy(self, inputs, data_samples=None):
        sizes.append(tuple(inputs.shape[-2:]))
        return predict(self, inputs, data_samples)

    monkeypatch.setattr(EncoderDecoder, 'predict', spy)
    tiny.run_tool(
        *('test', tmp_path / 'config.py', work_dir / 'iter_2.pth', '--tta'),
        *('--work-dir', tmp_path, '--out', tmp_path / 'out.pkl'),
        *('--cfg-options', 'test_dataloader.dataset.indices=1'),
    )
    assert len(sizes) == 12
    assert len(set(sizes)) > 2
    assert all(side % 32 == 0 for size in sizes for side in size)
    [result] = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    labels = result['pred_sem_seg']['data']
    assert labels.shape[-2:] == result['ori_shape']


@pytest.mark.parametrize('key', ['tta_model', 'tta_pipeline'])
def test_tta_without_config(trained, tmp_path, mistake, key):
    path, work_dir, _ = trained('segmentor')
    cfg = Config.fromfile(path)
    cfg.pop(key)
    cfg.dump(tmp_path / 'config.py')
    message = mistake(
        *('test', tmp_path / 'config.py', work_dir / 'iter_2.pth', '--tta')
    )
    assert f'there is no {key}' in message
