"""Every config: what it builds, its recipe, and a run of every family."""

import importlib.util
import itertools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fusion import assert_fuses, far
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.fileio import load
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from tiny import load_tool
from torch import nn

from mmoverlock.models import OverLoCK

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
PATHS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.glob('*/*.py')
    if path.parent.name != '_base_'
)
DROP_IN = [path for path in PATHS if path.startswith('drop_in/')]
RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
ARCHS = 'xt', 't', 's', 'b'
DETECTION = {'xt': 0.1, 't': 0.2, 's': 0.4, 'b': 0.6}
DROP_PATH = {
    'mask_rcnn': DETECTION,
    'cascade_mask_rcnn': DETECTION,
    'upernet': {'xt': 0.1, 't': 0.2, 's': 0.3, 'b': 0.5},
    'imagenet': {'xt': 0.1, 't': 0.15, 's': 0.4, 'b': 0.5},
    'drop_in': DETECTION,
    'ablation': {'xt': 0.1},
}


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


@pytest.fixture(scope='module', params=PATHS)
def built(request):
    """The path of a config, the config and its model, without values."""
    cfg = read(request.param)
    with torch.device('meta'):
        return request.param, cfg, MODELS.build(cfg.model)


@pytest.mark.parametrize(
    'folder, schedule',
    [
        ('mask_rcnn', '1x'),
        ('mask_rcnn', '3x'),
        ('cascade_mask_rcnn', 'cascade_3x'),
        ('upernet', '160k'),
    ],
)
def test_there_are_configs(folder, schedule):
    for arch in ARCHS:
        assert f'{folder}/overlock_{arch}_{schedule}.py' in PATHS


def test_names_are_unique():
    """A config's name is its work dir's, and what mim finds it by."""
    names = [Path(path).name for path in PATHS]
    assert sorted(names) == sorted({*names})


def test_heads_fit_backbone(built):
    _, cfg, model = built
    assert readers(cfg.model)
    for reader in readers(cfg.model):
        expected = channels_for(reader, model.backbone.out_channels)
        assert reader.in_channels == expected


def test_name_says_arch(built):
    path, cfg, _ = built
    folder, arch = re.fullmatch(r'(.*)/overlock_(\w+?)_\w+\.py', path).groups()
    backbone = cfg.model.backbone
    if arch == 'mini':  # no arch of the paper: there are no weights for it
        assert isinstance(backbone.arch, dict)
        assert 'init_cfg' not in backbone
        return
    assert backbone.arch == arch
    assert backbone.drop_path_rate == DROP_PATH[folder][arch]
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


def test_optimizer(built):
    """No norm and no table of position biases decays, and all others do."""
    path, cfg, model = built
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


@pytest.mark.parametrize(
    'path, lr, epochs, steps',
    [
        ('mask_rcnn/overlock_t_1x.py', 2e-4, 12, [8, 11]),
        ('mask_rcnn/overlock_t_3x.py', 1e-4, 36, [27, 33]),
        ('cascade_mask_rcnn/overlock_t_cascade_3x.py', 1e-4, 36, [27, 33]),
    ],
)
def test_detection_recipe(path, lr, epochs, steps):
    cfg = read(path)
    assert cfg.train_cfg == {
        'type': 'EpochBasedTrainLoop',
        'max_epochs': epochs,
        'val_interval': 1,
    }
    warm_up, decay = cfg.param_scheduler
    assert warm_up == {
        'type': 'LinearLR',
        'start_factor': 1e-3,
        'by_epoch': False,
        'begin': 0,
        'end': 500,
    }
    assert decay == {
        'type': 'MultiStepLR',
        'by_epoch': True,
        'begin': 0,
        'end': epochs,
        'milestones': steps,
        'gamma': 0.1,
    }
    assert cfg.optim_wrapper.optimizer == {
        'type': 'AdamW',
        'lr': lr,
        'betas': (0.9, 0.999),
        'weight_decay': 0.05,
    }
    assert cfg.auto_scale_lr == {'enable': False, 'base_batch_size': 16}
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.neck.out_channels == 256
    assert cfg.model.neck.num_outs == 5


@pytest.mark.parametrize(
    'path',
    [
        'mask_rcnn/overlock_t_3x.py',
        'cascade_mask_rcnn/overlock_t_cascade_3x.py',
    ],
)
def test_multi_scale_and_crop(path):
    cfg = read(path)
    *_, choice, pack = cfg.train_dataloader.dataset.pipeline
    assert (choice.type, pack.type) == ('RandomChoice', 'PackDetInputs')
    [resize], [first, crop, second] = choice.transforms
    assert resize == second
    shorts = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert resize.scales == [(short, 1333) for short in shorts]
    assert first.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert crop.crop_type == 'absolute_range'
    assert crop.crop_size == (384, 600)


def test_cascade_heads():
    model = read('cascade_mask_rcnn/overlock_t_cascade_3x.py').model
    stds = [0.1, 0.2], [0.05, 0.1], [0.033, 0.067]
    for head, (xy, wh) in zip(model.roi_head.bbox_head, stds, strict=True):
        assert head.type == 'Shared4Conv1FCBBoxHead'
        assert head.norm_cfg.type == 'BN'  # sync_bn makes it SyncBN
        assert head.reg_decoded_bbox
        assert head.loss_bbox == {'type': 'GIoULoss', 'loss_weight': 10.0}
        assert head.bbox_coder.target_stds == [xy, xy, wh, wh]
    ious = [stage.assigner.pos_iou_thr for stage in model.train_cfg.rcnn]
    assert ious == [0.5, 0.6, 0.7]


def test_upernet_recipe():
    cfg = read('upernet/overlock_t_160k.py')
    assert cfg.train_cfg == {
        'type': 'IterBasedTrainLoop',
        'max_iters': 160_000,
        'val_interval': 16_000,
    }
    warm_up, decay = cfg.param_scheduler
    assert warm_up == {
        'type': 'LinearLR',
        'start_factor': 1e-6,
        'by_epoch': False,
        'begin': 0,
        'end': 1500,
    }
    assert decay == {
        'type': 'PolyLR',
        'power': 1.0,
        'eta_min': 0.0,
        'by_epoch': False,
        'begin': 1500,
        'end': 160_000,
    }
    assert cfg.optim_wrapper.optimizer == {
        'type': 'AdamW',
        'lr': 6e-5,
        'betas': (0.9, 0.999),
        'weight_decay': 0.01,
    }
    assert cfg.auto_scale_lr == {'enable': False, 'base_batch_size': 16}
    assert cfg.train_dataloader.batch_size == 2
    crops = [t for t in cfg.train_pipeline if t.type == 'RandomCrop']
    assert [crop.crop_size for crop in crops] == [(512, 512)]
    assert cfg.model.data_preprocessor.size == (512, 512)
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.channels, head.num_classes) == (512, 150)
    assert (auxiliary.type, auxiliary.in_index) == ('FCNHead', 2)
    assert auxiliary.loss_decode.loss_weight == 0.4
    assert cfg.default_hooks.checkpoint.interval == 16_000
    assert not cfg.default_hooks.checkpoint.by_epoch


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


PUBLISHED = {
    'mask_rcnn_overlock_t_1x': (48.3, 43.3),
    'mask_rcnn_overlock_s_1x': (49.4, 44.0),
    'mask_rcnn_overlock_b_1x': (49.9, 44.4),
    'mask_rcnn_overlock_t_3x': (49.6, 43.9),
    'mask_rcnn_overlock_s_3x': (51.0, 45.0),
    'mask_rcnn_overlock_b_3x': (51.4, 45.3),
    'upernet_overlock_t_160k': (50.3,),
    'upernet_overlock_s_160k': (51.3,),
    'upernet_overlock_b_160k': (51.7,),
}


def test_published_results():
    """Results and weights are where the authors have some."""
    names = {'t': 'tiny', 's': 'small', 'b': 'base'}
    found = {}
    for folder in ('mask_rcnn', 'cascade_mask_rcnn', 'upernet', 'drop_in'):
        for model in load(CONFIGS / folder / 'metafile.yml')['Models']:
            if 'Results' not in model:
                assert 'Weights' not in model
                continue
            found[model['Name']] = tuple(
                value
                for result in model['Results']
                for value in result['Metrics'].values()
            )
            *_, arch, schedule = model['Name'].split('_')
            file = (
                f'upernet_overlock_{names[arch]}_ade20k.pth'
                if folder == 'upernet'
                else f'maskrcnn{schedule}_overlock_{names[arch]}_coco.pth'
            )
            assert model['Weights'] == RELEASE + file
    assert found == PUBLISHED


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
    """One loss and backward of a config, with arch xt for the sake of time."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.backbone.update(arch='xt', init_cfg=None)
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


@pytest.fixture(scope='module', autouse=True)
def plain_dumps():
    """Write configs unformatted: that takes longer than the runs."""

    def text(cfg):
        return ''.join(f'{k} = {v!r}\n' for k, v in cfg.to_dict().items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'pretty_text', property(text))
        yield


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


def write_small(path, folder, dataset, **options):
    """Write a config for arch xt, small sample data and one iteration.

    Returns:
        Path: The config file. ``folder/data`` holds the data.
    """
    data = folder / 'data'
    load_tool('make_sample_data').main(
        [dataset, str(data), '--images=2', '--size=96']
    )
    cfg = read(path)
    cfg.model.backbone.init_cfg = None
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.save_optimizer = False
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
        loader.dataset.pipeline = shrunk(loader.dataset.pipeline)
        loader.dataset.indices = 2
        if split != 'train' and 'ann_file' in cfg[f'{split}_evaluator']:
            cfg[f'{split}_evaluator'].ann_file = str(
                data / loader.dataset.ann_file
            )
    if 'tta_pipeline' in cfg:
        cfg.tta_pipeline = shrunk(cfg.tta_pipeline)
    cfg.merge_from_dict(options)
    file = folder / Path(path).name
    cfg.dump(file)
    return file


def scalars(work_dir):
    """What a run logged: the last value of every name."""
    [log] = work_dir.glob('*/vis_data/scalars.json')
    lines = log.read_text().splitlines()
    return {k: v for line in lines for k, v in json.loads(line).items()}


def test_run_cascade(tmp_path):
    """One iteration with multi-scale and crop, and the validation after it.

    test_tools.py does the same with Mask R-CNN.
    """
    sampling = {f'model.train_cfg.rcnn.{i}.sampler.num': 8 for i in range(3)}
    config = write_small(
        'cascade_mask_rcnn/overlock_xt_cascade_3x.py',
        tmp_path,
        'coco',
        **sampling,
        **{
            'train_cfg.max_epochs': 1,
            'default_hooks.checkpoint.save_best': None,
            'model.test_cfg.rpn.max_per_img': 20,
            'model.test_cfg.rcnn.score_thr': 0.0,
            'model.test_cfg.rcnn.max_per_img': 5,
        },
    )
    work_dir = tmp_path / 'work'
    load_tool('train').main([str(config), '--work-dir', str(work_dir)])
    logged = scalars(work_dir)
    for name in ('s0.loss_cls', 's1.loss_bbox', 's2.loss_mask', 'loss'):
        assert np.isfinite(logged[name])
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= logged.keys()
    assert (work_dir / 'epoch_1.pth').exists()


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """Config and work dir of UperNet after one iteration."""
    folder = tmp_path_factory.mktemp('upernet')
    config = write_small(
        'upernet/overlock_xt_160k.py',
        folder,
        'ade20k',
        **{
            'model.data_preprocessor.size': (64, 64),
            'train_cfg.max_iters': 1,
            'train_cfg.val_interval': 1,
            'default_hooks.checkpoint.interval': 1,
        },
    )
    load_tool('train').main([str(config), '--work-dir', str(folder / 'work')])
    return config, folder / 'work'


def test_run_upernet(segmentor):
    _, work_dir = segmentor
    logged = scalars(work_dir)
    for name in ('decode.loss_ce', 'aux.loss_ce', 'loss'):
        assert np.isfinite(logged[name])
    assert 'mIoU' in logged
    assert (work_dir / 'iter_1.pth').exists()
    assert list(work_dir.glob('best_mIoU_iter_1.pth'))


def test_tta(segmentor, tmp_path, monkeypatch):
    """--tta averages twelve views of an image."""
    from mmseg.models import EncoderDecoder

    config, work_dir = segmentor
    sizes = []
    predict = EncoderDecoder.predict

    def spy(self, inputs, data_samples=None):
        sizes.append(tuple(inputs.shape[-2:]))
        return predict(self, inputs, data_samples)

    monkeypatch.setattr(EncoderDecoder, 'predict', spy)
    load_tool('test').main(
        [
            *(str(config), str(work_dir / 'iter_1.pth'), '--tta'),
            *('--work-dir', str(tmp_path), '--out', str(tmp_path / 'out.pkl')),
            *('--cfg-options', 'test_dataloader.dataset.indices=1'),
        ]
    )
    assert len(sizes) == 12
    assert len(set(sizes)) > 2
    assert all(side % 32 == 0 for size in sizes for side in size)
    [result] = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    labels = result['pred_sem_seg']['data']
    assert labels.shape[-2:] == result['ori_shape']


@pytest.mark.parametrize('key', ['tta_model', 'tta_pipeline'])
def test_tta_without_config(segmentor, tmp_path, capsys, key):
    config, work_dir = segmentor
    cfg = Config.fromfile(config)
    cfg.pop(key)
    cfg.dump(tmp_path / 'config.py')
    with pytest.raises(SystemExit) as stop:
        load_tool('test').main(
            [
                *(str(tmp_path / 'config.py'), str(work_dir / 'iter_1.pth')),
                *('--tta', '--work-dir', str(tmp_path / 'work')),
            ]
        )
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f'there is no {key}' in message
    assert message.count('\n') == 1
