"""The released detectors and segmentors in the tools."""

import re

import numpy as np
import pytest
import tiny
import torch
from golden import load
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmoverlock.models.weights import add_prefixes

tiny.need_openmmlab()


@pytest.mark.parametrize(
    'config, task, arch',
    [
        ('mask_rcnn/overlock_t_3x.py', 'det', 't'),
        ('upernet/overlock_s_160k.py', 'seg', 's'),
    ],
)
def test_names(config, task, arch):
    """Those of the release, and of the heads of mmdet 2.28 and mmseg 0.30."""
    cfg = Config.fromfile(tiny.ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    own = {name: [*value.shape] for name, value in model.state_dict().items()}
    expected = {name: own.get(name) for name in load(f'heads_{task}')}
    assert own == expected | add_prefixes(load(f'keys_{task}_{arch}'))


def test_released_mask_rcnn(tmp_path):
    """tools/test.py takes a file of mmcv 1.7, also to merge the branches."""
    config = tiny.detector(tmp_path)
    init_default_scope('mmdet')
    state = MODELS.build(Config.fromfile(config).model).state_dict()
    meta = {
        'mmcv_version': '1.7.2',
        'config': 'raise SystemExit(7)',
        'CLASSES': ('person', 'bicycle'),
        'PALETTE': np.zeros((2, 3), np.uint8),
        'hook_msgs': {'best_score': np.float64(0.48)},
    }
    file = tmp_path / 'maskrcnn1x.pth'
    torch.save({'meta': meta, 'state_dict': state}, file)
    argv = 'test', config, file, '--work-dir', tmp_path / 'work'
    argv += '--cfg-options', 'model.backbone.deploy=True'
    log = tiny.run_tool(*argv)
    assert 'coco/segm_mAP' in log
    assert re.search(r'loaded .*: (\d+) of \1 tensors fit\n', log)
