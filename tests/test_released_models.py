"""The released detectors and segmenters, and hostile files, in the tools."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import load, state_dict
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_tools import MASK_RCNN, TINY, TOOLS, data_options, run
from tiny import load_tool

from mmoverlock.models.weights import fit

CONFIGS = Path(__file__).parents[1] / 'configs'
BN = 'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'
CONV = 'weight', 'bias'
CONV_BN = 'conv.weight', *(f'bn.{name}' for name in BN)
# What mmdet 2.28 and mmseg 0.30 save beside the backbone: modules, how many,
# and the ends of names.
MASK_RCNN_PARTS = [
    ('neck.lateral_convs.N.conv', 4, CONV),
    ('neck.fpn_convs.N.conv', 4, CONV),
    ('rpn_head.rpn_conv', 1, CONV),
    ('rpn_head.rpn_cls', 1, CONV),
    ('rpn_head.rpn_reg', 1, CONV),
    ('roi_head.bbox_head.fc_cls', 1, CONV),
    ('roi_head.bbox_head.fc_reg', 1, CONV),
    ('roi_head.bbox_head.shared_fcs.N', 2, CONV),
    ('roi_head.mask_head.convs.N.conv', 4, CONV),
    ('roi_head.mask_head.upsample', 1, CONV),
    ('roi_head.mask_head.conv_logits', 1, CONV),
]
UPERNET_PARTS = [
    ('decode_head.conv_seg', 1, CONV),
    ('decode_head.psp_modules.N.1', 4, CONV_BN),
    ('decode_head.bottleneck', 1, CONV_BN),
    ('decode_head.lateral_convs.N', 3, CONV_BN),
    ('decode_head.fpn_convs.N', 3, CONV_BN),
    ('decode_head.fpn_bottleneck', 1, CONV_BN),
    ('auxiliary_head.conv_seg', 1, CONV),
    ('auxiliary_head.convs.N', 1, CONV_BN),
]


@pytest.mark.parametrize(
    'config, keys, parts',
    [
        ('mask_rcnn/overlock_xt_1x.py', 'det_xt', MASK_RCNN_PARTS),
        ('mask_rcnn/overlock_t_1x.py', 'det_t', MASK_RCNN_PARTS),
        ('mask_rcnn/overlock_t_3x.py', 'det_t', MASK_RCNN_PARTS),
        ('upernet/overlock_xt_160k.py', 'seg_xt', UPERNET_PARTS),
        ('upernet/overlock_s_160k.py', 'seg_s', UPERNET_PARTS),
    ],
)
def test_names(config, keys, parts):
    """All of a released model fits the config's, and fills it."""
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        state = {
            f'backbone.{name}': torch.empty(shape)
            for name, shape in load(f'keys_{keys}').items()
        }
        rest = {
            name: weight
            for name, weight in model.state_dict().items()
            if not name.startswith('backbone.')
        }
    assert Counter(re.sub(r'\.\d+', '.N', name, count=1) for name in rest) == {
        f'{part}.{end}': number for part, number, ends in parts for end in ends
    }
    fitting = fit({**state, **rest}, model, 'file', ())
    assert fitting.keys() == model.state_dict().keys()


# ------------------------------------------------------------ in the tools


class Call:
    """Pickled, a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'coco'
    run(
        *(TOOLS / 'make_sample_data.py', 'coco', folder),
        *('--images=4', '--size=64'),
    )
    return folder


def options(coco, arch='xt'):
    """Options for small data and heads, and for another arch than xt."""
    return [
        option
        for option in [*TINY, *data_options(coco, 64)]
        if arch != 'xt' or '.arch' not in option
    ]


def mmcv_checkpoint(path, state, **meta):
    """A file as mmcv 1.7 writes it."""
    meta = {
        'mmcv_version': '1.7.2',
        'time': 'Tue Jan 14 2025',
        'config': 'raise SystemExit(7)',
        'CLASSES': ('airplane', 'ball'),
        'PALETTE': np.zeros((2, 3), np.uint8),
        'epoch': 12,
        'iter': 88000,
        'hook_msgs': {'best_score': np.float64(0.48)},
        **meta,
    }
    torch.save({'meta': meta, 'state_dict': state}, path)


def test_released_mask_rcnn(coco, tmp_path):
    """tools/test.py takes the file as it is, also to merge the branches."""
    cfg = Config.fromfile(CONFIGS / 'mask_rcnn/overlock_xt_1x.py')
    init_default_scope('mmdet')
    args = (
        load_tool('test')
        .build_parser()
        .parse_args(['c', 'f', '--cfg-options', *options(coco)])
    )
    args.cfg_options['model.neck.in_channels'] = [56, 112, 340, 420]
    cfg.merge_from_dict(args.cfg_options)
    state = MODELS.build(cfg.model).state_dict()
    for name, weight in state_dict(load('keys_det_xt')).items():
        if weight.is_floating_point():
            weight = weight.float()
        state[f'backbone.{name}'] = weight
    mmcv_checkpoint(tmp_path / 'maskrcnn1x.pth', state)
    for deploy in (False, True):
        log, _ = run(
            *(TOOLS / 'test.py', MASK_RCNN, tmp_path / 'maskrcnn1x.pth'),
            *('--work-dir', tmp_path / 'work', '--cfg-options'),
            *(*options(coco), 'model.neck.in_channels=[56,112,340,420]'),
            f'model.backbone.deploy={deploy}',
        )
        assert 'coco/segm_mAP' in log
        assert re.search(r'loaded .*: (\d+) of \1 tensors fit\n', log)


ENTRIES = {
    'test': lambda file: [MASK_RCNN, file],
    'resume': lambda file: [MASK_RCNN, '--resume', file],
    'load_from': lambda file: [MASK_RCNN],
    'init_cfg': lambda file: [MASK_RCNN],
    'convert': lambda file: [file, f'{file}.out.pth'],
}


def failure(entry, file, coco, tmp_path, monkeypatch, capsys):
    """The message with which a tool refuses a checkpoint."""
    name = {'test': 'test', 'convert': 'convert_checkpoint'}.get(
        entry, 'train'
    )
    argv = [str(arg) for arg in ENTRIES[entry](file)]
    if entry != 'convert':
        chosen = options(coco, 'tiny')
        if entry == 'load_from':
            chosen.append(f'load_from={file}')
        if entry == 'init_cfg':
            chosen = [o for o in chosen if not o.endswith('init_cfg=None')]
            chosen.append(f'model.backbone.init_cfg.checkpoint={file}')
        argv += ['--work-dir', str(tmp_path), '--cfg-options', *chosen]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        load_tool(name).main(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f'{name}.py: {file}')
    return message


@pytest.mark.parametrize('entry', ENTRIES)
def test_code_does_not_run(entry, coco, tmp_path, monkeypatch, capsys):
    """A pickle that makes a folder, at every way into the tools."""
    marker, file = tmp_path / 'marker', tmp_path / 'file.pth'
    mmcv_checkpoint(
        file, {'weight': torch.ones(1)}, seed=Call(os.mkdir, str(marker))
    )
    message = failure(entry, file, coco, tmp_path, monkeypatch, capsys)
    assert 'is refused: it asks for posix.mkdir' in message
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize('entry', ENTRIES)
def test_other_network(entry, coco, tmp_path, monkeypatch, capsys):
    file = tmp_path / 'file.pth'
    mmcv_checkpoint(file, {'conv1.weight': torch.ones(1)})
    message = failure(entry, file, coco, tmp_path, monkeypatch, capsys)
    assert 'has no OverLoCK, but conv1.weight' in message


def test_hostile_dataset_files(coco, tmp_path, capsys):
    """mmengine unpickles .pkl, and makes what a .yml asks for."""
    for suffix in ('pkl', 'pickle', 'yml', 'yaml'):
        file = tmp_path / f'annotations.{suffix}'
        file.touch()
        ann_file = f'train_dataloader.dataset.ann_file={file}'
        with pytest.raises(SystemExit):
            load_tool('train').main(
                [str(MASK_RCNN), '--cfg-options', *options(coco), ann_file]
            )
        message = capsys.readouterr().err
        assert f'{file} is not read' in message
        assert 'save what it holds as .json' in message


def test_options_are_not_evaluated(tmp_path, monkeypatch):
    """Not when they are read, merged, nor when the config is saved."""
    monkeypatch.chdir(tmp_path)
    value = '!!python/object/apply:os.mkdir [marker]'
    args = (
        load_tool('train')
        .build_parser()
        .parse_args([str(MASK_RCNN), '--cfg-options', f'work_dir={value}'])
    )
    cfg = load_tool('train').cli.load_config(args)
    cfg.dump('config.py')
    again = Config.fromfile('config.py')
    assert again.work_dir == args.cfg_options['work_dir']
    assert not (tmp_path / 'marker').exists()
