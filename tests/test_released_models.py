"""The released detectors and segmentors in the tools."""

import re
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from golden import load
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmoverlock.models.weights import fit

tiny.need_openmmlab()

CONFIGS = tiny.ROOT / 'configs'
CONV = 'weight', 'bias'
NORM = 'running_mean', 'running_var', 'num_batches_tracked', *CONV
# What mmdet 2.28 and mmseg 0.30 save beside the backbone: modules with a
# convolution, and how many; those of UPERNET have a norm.
MASK_RCNN = {
    **{'neck.lateral_convs.N.conv': 4, 'neck.fpn_convs.N.conv': 4},
    **{'rpn_head.rpn_conv': 1, 'rpn_head.rpn_cls': 1, 'rpn_head.rpn_reg': 1},
    'roi_head.bbox_head.shared_fcs.N': 2,
    **{'roi_head.bbox_head.fc_cls': 1, 'roi_head.bbox_head.fc_reg': 1},
    'roi_head.mask_head.convs.N.conv': 4,
    **{'roi_head.mask_head.upsample': 1, 'roi_head.mask_head.conv_logits': 1},
}
SEG_HEADS = {'decode_head.conv_seg': 1, 'auxiliary_head.conv_seg': 1}
UPERNET = {
    **{'decode_head.psp_modules.N.1': 4, 'decode_head.lateral_convs.N': 3},
    **{'decode_head.fpn_convs.N': 3, 'decode_head.fpn_bottleneck': 1},
    **{'decode_head.bottleneck': 1, 'auxiliary_head.convs.N': 1},
}


@pytest.mark.parametrize(
    'config, keys, convs, normed',
    [
        ('mask_rcnn/overlock_t_3x.py', 'det_t', MASK_RCNN, {}),
        ('upernet/overlock_s_160k.py', 'seg_s', SEG_HEADS, UPERNET),
    ],
)
def test_names(config, keys, convs, normed):
    """All of a released model fits the config's, and fills it."""
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        state = {
            f'backbone.{name}': torch.empty(shape)
            for name, shape in load(f'keys_{keys}').items()
        }
    own = model.state_dict()
    rest = {k: own[k] for k in own if not k.startswith('backbone.')}
    expected = Counter()
    for module, count in convs.items():
        expected.update({f'{module}.{end}': count for end in CONV})
    for module, count in normed.items():
        expected[f'{module}.conv.weight'] = count
        expected.update({f'{module}.bn.{end}': count for end in NORM})
    found = Counter(re.sub(r'\.\d+', '.N', name, count=1) for name in rest)
    assert found == expected
    assert fit({**state, **rest}, model, 'file', ()).keys() == own.keys()


def test_released_mask_rcnn(tmp_path):
    """tools/test.py takes a file of mmcv 1.7, also to merge the branches."""
    config = tiny.detector(tmp_path)
    init_default_scope('mmdet')
    state = MODELS.build(Config.fromfile(config).model).state_dict()
    meta = {
        'mmcv_version': '1.7.2',
        'config': 'raise SystemExit(7)',
        'CLASSES': ('airplane', 'ball'),
        'PALETTE': np.zeros((2, 3), np.uint8),
        'hook_msgs': {'best_score': np.float64(0.48)},
    }
    file = tmp_path / 'maskrcnn1x.pth'
    torch.save({'meta': meta, 'state_dict': state}, file)
    argv = 'test', config, file, '--work-dir', tmp_path / 'work'
    deploy = '--cfg-options', 'model.backbone.deploy=True'
    log = tiny.run_tool(*argv, *deploy)
    assert 'coco/segm_mAP' in log
    assert re.search(r'loaded .*: (\d+) of \1 tensors fit\n', log)
