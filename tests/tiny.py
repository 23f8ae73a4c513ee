"""Tiny models of the project's configs, with random weights."""

import importlib.util
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parents[1]
BACKBONE = {
    'init_cfg': None,
    'arch._delete_': True,
    'arch.depths': [1, 1, 1, 1],
    'arch.channels': [8, 16, 24, 32],
    'arch.focus_depths': [1, 1],
    'arch.focus_heads': [2, 2],
}
HALF_FORMATS = [torch.bfloat16, torch.float16]
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
            'model.test_cfg.rcnn.score_thr': 0.0,
            'model.test_cfg.rcnn.max_per_img': 5,
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


def load_tool(name, folder='tools'):
    """The module of tools/<name>.py, or of a script in another folder."""
    path = ROOT / folder / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'{name}_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model(task, folder, settings=None):
    """Write a tiny model's config and checkpoint.

    Args:
        task (str): 'det', 'seg' or 'cls'.
        folder (Path): Where to.
        settings (dict, optional): What else is in the config, by dotted keys.

    Returns:
        tuple[str, str]: The files.
    """
    name, options = CONFIGS[task]
    cfg = Config.fromfile(ROOT / 'configs' / name)
    backbone = {f'model.backbone.{k}': v for k, v in BACKBONE.items()}
    cfg.merge_from_dict(backbone | options | (settings or {}))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger, so that outputs differ
            torch.nn.init.normal_(parameter, std=0.1)
    config, checkpoint = folder / f'{task}.py', folder / f'{task}.pth'
    cfg.dump(config)
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    return str(config), str(checkpoint)
