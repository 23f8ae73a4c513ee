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
from mmengine.registry import MODELS, init_default_scope
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
    """Readers of the backbone's maps take their channels."""
    arch = OverLoCK._parse_arch(model.backbone.arch)
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
    single = cfg.test_dataloader.dataset.pipeline[1:3]
    assert single[1].interpolation == 'bicubic'
    views = cfg.tta_pipeline[1].transforms[:-2]  # without labels and packing

    def size(steps, height, width):
        image = np.zeros((height, width, 3), np.uint8)
        results = {'img': image, 'img_shape': image.shape[:2], 'scale': None}
        return Compose(steps)(results)['img'].shape[:2]

    assert size(single, 500, 333) == (800, 512)  # 769
    assert size(single, 100, 1000) == (224, 2048)  # as long as it may be
    sizes = [(256, 384), (384, 608), (512, 800)]
    sizes += [(640, 992), (768, 1184), (896, 1376)]
    found = [size(steps, 333, 500) for steps in itertools.product(*views)]
    assert found == [size for size in sizes for _ in (True, False)]  # flipped


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

# For images of 64 px, which have positions for so many queries and points.
SMALLER = {
    'CascadeRCNN': {f'train_cfg.rcnn.{i}.sampler.num': 8 for i in range(3)},
    'DINO': {'num_queries': 20, 'dn_cfg.group_cfg.num_dn_queries': 10},
    'Mask2Former': {
        'data_preprocessor.batch_augments': None,
        'train_cfg.num_points': 112,
    },
    'EncoderDecoder': {'data_preprocessor.size': (64, 64)},
    'Mask2FormerHead': {'decode_head.train_cfg.num_points': 112},
}


def random_batch(scope):
    """Two images of 64 px with labels, as a data loader gives them."""
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2, (3, 64, 64), num_items=[1, 2], num_classes=80, with_mask=True
        )
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo={'img_shape': (64, 64)})
    labels = torch.randint(150, (1, 64, 64))
    sample.gt_sem_seg = PixelData(data=labels)
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    return pseudo_collate([{'inputs': image, 'data_samples': sample}] * 2)


# Others train in test_tools.py, test_distributed.py and test_make_config.py.
@pytest.mark.parametrize(
    'path',
    [
        'cascade_mask_rcnn/overlock_xt_cascade_3x.py',
        *(p for p in DROP_IN if not p.endswith(('_fsdp.py', '_decay.py'))),
    ],
)
def test_run(path):
    """It trains, and fused it computes the same."""
    torch.manual_seed(0)
    cfg = read(path)
    cfg.model.backbone.update(arch=tiny.ARCH, init_cfg=None)
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    for reader, channels in readers(cfg.model, backbone.out_channels):
        reader.in_channels = channels
    for part in cfg.model, cfg.model.get('decode_head', {}):
        for key, value in SMALLER.get(part.get('type'), {}).items():
            cfg.merge_from_dict({f'model.{key}': value})
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    model.init_weights()
    data = model.data_preprocessor(random_batch(cfg.default_scope), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert model.backbone.patch_embed1[0].weight.grad.any()

    def call(images, samples):
        if 'mask2former_semantic' in path:
            return model.decode_head(model.extract_feat(images), samples)
        if 'cascade' in path:  # NMS takes no float64
            return model.extract_feat(images)
        return model(images, samples)

    images = data['inputs'].double()
    assert_fuses(far(model), images, data['data_samples'], call=call)


def test_recipe_of_readme(tmp_path):
    """The config of README, over one of the installed package, builds."""
    section = (ROOT / 'README.md').read_text().split('## In your own config')
    recipe = re.search('```python\n(.*?)```', section[1], re.DOTALL)[1]
    (tmp_path / 'config.py').write_text(recipe)
    cfg = read(tmp_path / 'config.py')
    assert_fits(cfg.model)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
