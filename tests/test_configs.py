"""Every config: what it builds, its recipe, and a run of every family."""

import itertools
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
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import PixelData

from mmoverlock.models import OverLoCK

tiny.need_openmmlab()

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


def readers(model, channels):
    """Configs of what reads the backbone's maps, and their in_channels."""
    heads = 'head', 'decode_head', 'auxiliary_head', 'panoptic_head'
    has_neck = 'in_channels' in (model.get('neck') or {})
    for name in ['neck'] if has_neck else heads:
        part = model.get(name) or {}
        if isinstance(part.get('in_channels'), int):
            yield part, channels[part.get('in_index', -1)]
        elif 'in_channels' in part:
            yield part, list(channels)


def assert_fits(model):
    """What reads the maps of the backbone takes their channels."""
    arch = model.backbone.arch
    for names, settings in OverLoCK.arch_zoo.items():
        arch = settings if arch in names else arch
    shallow = dict(arch, depths=(1, 1, 1, 1), focus_depths=(1, 1))
    with torch.device('meta'):
        backbone = MODELS.build(dict(model.backbone, arch=shallow))
    found = [*readers(model, backbone.out_channels)]
    assert found
    for reader, channels in found:
        assert reader.in_channels == channels


@pytest.mark.parametrize('path', PATHS)
def test_config(path):
    """Its arch is in its name; heads fit; norms and biases do not decay."""
    cfg = read(path)
    assert_fits(cfg.model)
    folder, arch = re.fullmatch(r'(.*)/overlock_(\w+?)_\w+\.py', path).groups()
    backbone = cfg.model.backbone
    assert arch in ('mini', backbone.arch)
    init_cfg = None
    if arch != 'mini' and cfg.default_scope != 'mmpretrain':
        assert cfg.sync_bn == 'torch'
        weights = f'{RELEASE}overlock_{arch}_in1k_224.pth'
        init_cfg = {'type': 'Pretrained', 'checkpoint': weights}
        if folder != 'drop_in':
            fused = folder in ('mask_rcnn', 'cascade_mask_rcnn')
            assert backbone.get('fuse_overview', False) == fused
    assert backbone.get('init_cfg') == init_cfg
    if cfg.default_scope == 'mmseg':  # tools of mmseg read it at the top
        assert cfg.data_preprocessor == cfg.model.data_preprocessor

    if folder == 'ablation' or (folder != 'drop_in' and arch in 'tsb'):
        return  # what follows is that of imagenet/ or of arch xt
    backbone.arch = tiny.ARCH
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = cfg.optim_wrapper.to_dict()  # a ConfigDict takes long
    optimizer = build_optim_wrapper(model, wrapper).optimizer
    assert len(optimizer.param_groups) < 70  # few launches; 65 of the layers
    assert optimizer.defaults['fused']
    keys = cfg.optim_wrapper.get('paramwise_cfg', {}).get('custom_keys', {})
    if path in DROP_IN and ('norm' not in keys or 'backbone' in keys):
        return  # the rule is that of another recipe
    decays = {
        id(parameter): group['weight_decay']
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    decay = cfg.optim_wrapper.optimizer.weight_decay
    for name, parameter in model.named_parameters():
        spared = 'norm' in name or 'relative_position_bias_table' in name
        expected = 0 if spared else decay
        assert decays.pop(id(parameter)) == expected, name
    assert not decays


def test_upernet_sizes():
    """Sides are multiples of 32, in a test and in its twelve views."""
    cfg = read('upernet/overlock_t_160k.py')
    _, resize, round_up, *_ = cfg.test_dataloader.dataset.pipeline
    assert round_up.interpolation == 'bicubic'

    def view(steps, height, width):
        image = np.zeros((height, width, 3), np.uint8)
        results = {'img': image, 'img_shape': image.shape[:2], 'scale': None}
        results = Compose(steps)(results)
        assert results['img_shape'] == results['img'].shape[:2]
        return *results['img_shape'], results.get('flip')

    assert view([resize, round_up], 500, 333)[:2] == (800, 512)  # 769
    # The long side is 2048 at most
    assert view([resize, round_up], 100, 1000)[:2] == (224, 2048)
    steps = cfg.tta_pipeline[1].transforms[:-2]  # without labels and packing
    sizes = [(256, 384), (384, 608), (512, 800)]
    sizes += [(640, 992), (768, 1184), (896, 1376)]
    assert {view(some, 333, 500) for some in itertools.product(*steps)} == {
        (*size, flip) for size in sizes for flip in (True, False)
    }


def test_metafiles():
    """Every config is in the metafile of its folder, and nothing else.

    Its file name, which is a work dir's, is its own as well.
    """
    listed = {}
    folders = sorted({Path(path).parent.as_posix() for path in PATHS})
    files = load(ROOT / 'model-index.yml')['Import']
    assert sorted(files) == [f'configs/{f}/metafile.yml' for f in folders]
    for folder in folders:
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
    for names in listed.values(), [Path(path).name for path in PATHS]:
        assert len({*names}) == len(PATHS)


# --------------------------------------------------------------------- runs

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
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={'img_shape': (64, 64)})
        labels = torch.randint(150, (1, 64, 64))
        sample.gt_sem_seg = PixelData(data=labels)
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
        samples.append({'inputs': image, 'data_samples': sample})
    return pseudo_collate(samples)


def check_training(cfg, batch=None):
    """One loss and backward of a config, with a tiny backbone."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.backbone.update(arch=tiny.ARCH, init_cfg=None)
    with torch.device('meta'):
        backbone = MODELS.build(model.backbone)
    for reader, channels in readers(model, backbone.out_channels):
        reader.in_channels = channels
    options = Config({'model': model})
    for part in (model, model.get('decode_head', {})):
        for key, value in CHEAPER.get(part.get('type'), {}).items():
            options.merge_from_dict({f'model.{key}': value})
    model = revert_sync_batchnorm(MODELS.build(options.model))
    model.init_weights()
    model.train()
    batch = batch or random_batch(cfg.default_scope)
    data = model.data_preprocessor(batch, True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert isinstance(model.backbone, OverLoCK)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.backbone.patch_embed1[0].weight.grad.any()
    return model, data


# Two are Mask R-CNN, which test_tools.py and test_distributed.py train.
@pytest.mark.parametrize(
    'path',
    [p for p in DROP_IN if not p.endswith(('_fsdp.py', '_layer_decay.py'))],
)
def test_drop_in(path):
    """It trains, and fused it computes the same."""
    model, data = check_training(read(path))

    def call(images, samples):
        if 'mask2former_semantic' in path:
            return model.decode_head(model.extract_feat(images), samples)
        return model(images, samples)

    images = data['inputs'].double()
    assert_fuses(far(model), images, data['data_samples'], call=call)


def test_recipe_of_readme(tmp_path):
    """What README says to write, over a config of the installed package."""
    section = (ROOT / 'README.md').read_text().split('## In your own config')
    recipe = re.search('```python\n(.*?)```', section[1], re.DOTALL)[1]
    (tmp_path / 'config.py').write_text(recipe)
    cfg = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(cfg.default_scope)
    assert_fits(cfg.model)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW


def test_cascade(tmp_path):
    """It trains on images that are resized to several scales and cropped."""
    tiny.run_tool('make_sample_data', 'coco', tmp_path, '--images=2')
    cfg = read('cascade_mask_rcnn/overlock_xt_cascade_3x.py')
    for head in cfg.model.roi_head.bbox_head:
        head.update(conv_out_channels=16, fc_out_channels=32)
    for stage in cfg.model.train_cfg.rcnn:
        stage.sampler.num = 8
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root=str(tmp_path))
    dataset.pipeline = tiny.shrunk(dataset.pipeline, 8)
    dataset = DATASETS.build(dataset)
    model, _ = check_training(cfg, pseudo_collate([dataset[0], dataset[1]]))
    assert len(model.roi_head.mask_head) == 3


def test_no_tta():
    test = tiny.load_tool('test')
    with pytest.raises(test.cli.UserError, match='there is no tta_model'):
        test.augment_test_time(read('mask_rcnn/overlock_xt_1x.py'))
