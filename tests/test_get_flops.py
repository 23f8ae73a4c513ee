"""tools/get_flops.py: what it counts, and how that fits the paper's table."""

import os

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_metafiles import METADATA
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.layers import ResDWConv
from mmoverlock.ops import contmix

tiny.need_openmmlab()

tool = tiny.load_tool('get_flops')

# Parameters in M, FLOPs in G.
PAPER = {'xt': (16, 2.6), 't': (33, 5.5), 'b': (95, 16.7)}
SIDES = {  # of the maps at 224 x 224
    **{'patch_embed1': 56, 'blocks1': 56, 'patch_embed2': 28, 'blocks2': 28},
    **{'patch_embed3': 14, 'blocks3': 14, 'sub_blocks3': 14},
    **{'patch_embed4': 7, 'blocks4': 7, 'sub_blocks4': 7, 'patch_embedx': 7},
}


def contmix_flops(positions, groups, width, channels, kernel_size):
    """Affinities, kernels and gathering, as the tool's docstring says."""
    taps = 5**2 + kernel_size**2
    return (
        positions * groups * width * 7**2,
        positions * groups * 7**2 * taps,
        positions * channels // 2 * taps,
    )


def test_contmix():
    """The backend that is counted does what the formula says, no more."""
    taps = 5**2 + 13**2
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        contmix(
            torch.empty(1, 4 * 3, 14, 20),
            torch.empty(1, 4 * 3, 7, 7),
            torch.empty(1, 24, 14, 20),
            torch.empty(taps, 49),
            torch.empty(taps),
            (torch.empty(4, 9, 9), torch.empty(4, 25, 25)),
            'reference',
        )
    expected = contmix_flops(14 * 20, 4, 3, 24, 13)
    assert counter.get_total_flops() == 2 * sum(expected)


def table_flops(arch, total):
    """What the tool's docstring says the paper's table counts."""
    with torch.device('meta'):
        backbone = MODELS.build(
            dict(type='OverLoCK', arch=arch, classifier=True, deploy=True)
        )
    for name, module in backbone.named_modules():
        positions = SIDES.get(name.split('.')[0], 0) ** 2
        if isinstance(module, ResDWConv):
            total -= positions * module.weight.numel()
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            total += 4 * positions * module.weight.numel()
        elif isinstance(module, FocusBlock):
            channels, groups = module.splits[0], len(module.rpb1)
            affinities, _, gathering = contmix_flops(
                *(positions, groups, channels // groups // 2),
                *(channels, module.kernel_size),
            )
            total -= affinities + gathering
    return total


@pytest.mark.parametrize(
    'arch',
    ['xt', *(pytest.param(a, marks=pytest.mark.slow) for a in ('t', 'b'))],
)
def test_classifiers(arch):
    """Without the auxiliary head, at 224 x 224, in deploy form."""
    path = f'configs/imagenet/overlock_{arch}_300e.py'
    cfg = Config.fromfile(tiny.ROOT / path)
    cfg.model.backbone.deploy = True
    parts, total, _ = tool.count(cfg, (224, 224))
    assert list(parts) == ['backbone', 'head.head', 'head.aux_head']
    auxiliary, skipped = parts.pop('head.aux_head')
    assert auxiliary > 300_000 and skipped == 0
    assert total == sum(flops for _, flops in parts.values())
    assert total == METADATA[path]['FLOPs']
    parameters = sum(parameters for parameters, _ in parts.values())
    of_table = round(table_flops(arch, total) / 1e9, 1)
    assert (round(parameters / 1e6), of_table) == PAPER[arch]


def test_options(tmp_path):
    """The form and the backend do not matter; each channel costs as much."""
    totals = []
    for channels, options in (
        (3, dict(contmix_backend='reference')),
        (3, dict(contmix_backend='tiled', deploy=True)),
        (5, dict(in_channels=5)),
    ):
        options['arch.kernel_sizes'] = (5, 5, 5, 5)
        options = {f'model.backbone.{k}': v for k, v in options.items()}
        config, _ = tiny.write_model('cls', tmp_path, options)
        _, total, found = tool.count(Config.fromfile(config), (64, 96))
        assert found == channels
        totals.append(total)
    assert totals[0] == totals[1]
    # 3 x 3 taps, half of 8 channels, at stride 2.
    assert totals[2] - totals[0] == 2 * 9 * 4 * 32 * 48


@pytest.mark.parametrize(
    'task, names',
    [
        ('det', ['backbone', 'neck', 'rpn_head', 'roi_head']),
        ('seg', ['backbone', 'decode_head', 'auxiliary_head']),
    ],
)
def test_dense_predictors(task, names, tmp_path):
    cfg = Config.fromfile(tiny.write_model(task, tmp_path)[0])
    parts, total, _ = tool.count(cfg, (64, 96))
    assert list(parts) == names
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    for name, (parameters, flops) in parts.items():
        part = getattr(model, name)
        assert parameters == sum(p.numel() for p in part.parameters())
        assert (flops > 0) == (name != 'auxiliary_head')
    assert sum(flops for _, flops in parts.values()) == total
    if 'neck' in names:  # 1x1 and 3x3 convolutions at strides 4 to 32
        areas = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
        widths = cfg.model.neck.in_channels
        assert parts['neck'][1] == sum(
            area * 16 * (width + 9 * 16)
            for area, width in zip(areas, widths, strict=True)
        )


def test_output(monkeypatch):
    """By parts; or rows, with links from the folder of the last config."""
    parts = {
        'backbone': (20_000_000, 3 * 10**9),
        'head.head': (4_000_000, 10**9),
        'head.aux_head': (500_000, 0),
    }
    counted = parts, 42 * 10**8, 5
    monkeypatch.setattr(tool, 'count', lambda cfg, shape: counted)
    config = tiny.ROOT / 'configs/imagenet/overlock_xt_300e.py'
    out = tiny.run_tool('get_flops', config, '--shape', 64, 96)
    assert out.splitlines() == [
        f'{config}, 5 x 64 x 96',
        '                        parameters       FLOPs',
        'backbone                   20.00 M      3.00 G',
        'head.head                   4.00 M      1.00 G',
        'head.aux_head               0.50 M      0.00 G',
        'total                      24.50 M      4.20 G',
        'without auxiliary head     24.00 M      4.20 G',
    ]
    other = config.parents[1] / 'upernet/overlock_xt_160k.py'
    argv = os.path.relpath(other), config, '--table'
    assert tiny.run_tool('get_flops', *argv).splitlines() == [
        '| Config | Parameters (M) | FLOPs (G) |',
        '| --- | --- | --- |',
        f'| [{other.name}](../upernet/{other.name}) | 24.00 | 4.20 |',
        f'| [{config.name}]({config.name}) | 24.00 | 4.20 |',
    ]


@pytest.mark.parametrize(
    'options, words',
    [
        (['--shape', '0', '96'], '--shape takes'),
        (['--cfg-options', 'model.backbone.dept=1'], "argument 'dept'"),
    ],
)
def test_mistakes(options, words):
    config = tiny.ROOT / 'configs/imagenet/overlock_xt_300e.py'
    out = tiny.run_tool('get_flops', config, *options, status=2)
    message = out.splitlines()[-1]  # mmengine logs what it builds
    assert message.startswith('get_flops.py: ') and words in message
