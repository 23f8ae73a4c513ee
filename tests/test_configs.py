"""Every config builds its model and optimizer, as its README says."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')

CONFIGS = Path(__file__).parents[1] / 'configs'
PATHS = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.glob('*/*.py')
    if path.parent.name != '_base_'
)
RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'


@pytest.fixture(scope='module', params=PATHS)
def built(request):
    """The path of a config, the config and its model, not initialised."""
    cfg = Config.fromfile(CONFIGS / request.param)
    for package in ('mmdet', 'mmseg', 'mmpretrain'):
        if cfg.default_scope == package:
            pytest.importorskip(package)
    init_default_scope(cfg.default_scope)
    return request.param, cfg, MODELS.build(cfg.model)


def test_there_are_configs():
    assert 'mask_rcnn/overlock_t_1x.py' in PATHS


def test_neck_fits_backbone(built):
    _, cfg, model = built
    assert cfg.model.neck.in_channels == list(model.backbone.out_channels)


def test_name_says_arch(built):
    path, cfg, _ = built
    arch = re.fullmatch(r'.*/overlock_(\w+?)_\w+\.py', path)[1]
    if arch == 'mini':  # no arch of the paper: there are no weights for it
        assert isinstance(cfg.model.backbone.arch, dict)
        assert 'init_cfg' not in cfg.model.backbone
        return
    assert cfg.model.backbone.arch == arch
    assert cfg.model.backbone.init_cfg == {
        'type': 'Pretrained',
        'checkpoint': f'{RELEASE}overlock_{arch}_in1k_224.pth',
    }


def test_decay(built):
    """No parameter with norm in its name decays, and all others do."""
    _, cfg, model = built
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decays = {
        id(parameter): group['weight_decay']
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    decay = cfg.optim_wrapper.optimizer.weight_decay
    for name, parameter in model.named_parameters():
        expected = 0 if 'norm' in name else decay
        assert decays.pop(id(parameter)) == expected, name
    assert not decays


def test_mask_rcnn_recipe():
    """The figures of the release's recipe (12 epochs, 16 images a step)."""
    cfg = Config.fromfile(CONFIGS / 'mask_rcnn/overlock_t_1x.py')
    assert cfg.train_cfg.max_epochs == 12
    warm_up, steps = cfg.param_scheduler
    assert warm_up == {
        'type': 'LinearLR',
        'start_factor': 1e-3,
        'by_epoch': False,
        'begin': 0,
        'end': 500,
    }
    assert steps.milestones == [8, 11]
    assert cfg.optim_wrapper.optimizer == {
        'type': 'AdamW',
        'lr': 2e-4,
        'betas': (0.9, 0.999),
        'weight_decay': 0.05,
    }
    assert cfg.auto_scale_lr == {'enable': False, 'base_batch_size': 16}
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.backbone.drop_path_rate == 0.2
    assert cfg.model.backbone.fuse_overview
    assert cfg.sync_bn == 'torch'


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
            text = (CONFIGS.parent / readme).read_text()
            assert f'({Path(model["Config"]).name})' in text
            for result in model.get('Results', []):
                for value in result['Metrics'].values():
                    assert f' {value} ' in text
    assert sorted(listed) == [f'configs/{path}' for path in PATHS]
    assert len(set(listed.values())) == len(listed)
