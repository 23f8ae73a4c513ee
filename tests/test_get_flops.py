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
POSITIONS = {  # of the maps at 224 x 224
    **{'patch_embed1': 56**2, 'blocks1': 56**2},
    **{'patch_embed2': 28**2, 'blocks2': 28**2},
    **{'patch_embed3': 14**2, 'blocks3': 14**2, 'sub_blocks3': 14**2},
    **{'patch_embed4': 7**2, 'blocks4': 7**2, 'sub_blocks4': 7**2},
    'patch_embedx': 7**2,
}


def contmix_flops(positions, groups, width, channels, kernel_size):
    """Affinities, kernels and gathering, as the tool's docstring says."""
    taps = 5**2 + kernel_size**2
    return (
        positions * groups * width * 7**2,
        positions * groups * 7**2 * taps,
        positions * channels // 2 * taps,
    )


@pytest.mark.parametrize(
    'kernel_size, height, width', [(7, 7, 9), (13, 14, 20)]
)
def test_contmix(kernel_size, height, width):
    """The backend that is counted does what the formula says, no more."""
    groups, c, channels = 4, 3, 24
    sizes = (5, kernel_size)
    taps = sum(k**2 for k in sizes)
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        contmix(
            torch.empty(1, groups * c, height, width),
            torch.empty(1, groups * c, 7, 7),
            torch.empty(1, channels, height, width),
            torch.empty(taps, 49),
            torch.empty(taps),
            tuple(torch.empty(groups, 2 * k - 1, 2 * k - 1) for k in sizes),
            'reference',
        )
    expected = contmix_flops(height * width, groups, c, channels, kernel_size)
    assert counter.get_total_flops() == 2 * sum(expected)


def table_flops(arch, total):
    """What the tool's docstring says the paper's table counts."""
    with torch.device('meta'):
        backbone = MODELS.build(
            dict(type='OverLoCK', arch=arch, classifier=True, deploy=True)
        )
    for name, module in backbone.named_modules():
        positions = POSITIONS.get(name.split('.')[0])
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


@pytest.fixture
def classifier(tmp_path):
    """A function that writes the config of a tiny classifier."""
    return lambda **backbone: tiny.write_model(
        'cls',
        tmp_path,
        {f'model.backbone.{name}': backbone[name] for name in backbone},
    )[0]


def test_forms_and_backends(classifier):
    """Branches are merged for inference in either form; so is any backend."""
    totals = {
        tool.count(Config.fromfile(classifier(**backbone)), (64, 96))[1]
        for backbone in (
            dict(contmix_backend='reference'),
            dict(contmix_backend='tiled', deploy=True),
        )
    }
    assert len(totals) == 1


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


def test_channels(classifier):
    """Each costs as much in the first convolution, and none elsewhere."""
    totals = []
    for channels in (3, 5):
        config = classifier(in_channels=channels)
        _, total, found = tool.count(Config.fromfile(config), (64, 96))
        assert found == channels
        totals.append(total)
    # 3 x 3 taps, half of 8 channels, at stride 2.
    assert totals[1] - totals[0] == 2 * 9 * 4 * 32 * 48


def test_output(classifier):
    """Of one model by its parts, and a row for Markdown."""
    config = classifier(in_channels=5)
    cfg = Config.fromfile(config)
    parts, total, _ = tool.count(cfg, (64, 96))
    options = '--shape', '64', '96'
    out = tiny.run_tool('get_flops', config, *options)
    title, _, *rows = out.splitlines()[-7:]
    assert title == f'{config}, 5 x 64 x 96'
    assert [row.split('  ')[0] for row in rows] == [
        *('backbone', 'head.head', 'head.aux_head'),
        *('total', 'without auxiliary head'),
    ]
    counts = [parameters for parameters, _ in parts.values()]
    inference = f'{sum(counts[:2]) / 1e6:.2f}'
    assert f'{sum(counts) / 1e6:.2f} M' in rows[3]
    assert f'{inference} M' in rows[4]
    # Links are from the folder of the last config.
    other = os.path.relpath(config)
    out = tiny.run_tool('get_flops', other, config, '--table', *options)
    title, line, *rows = out.splitlines()[-4:]
    assert title == '| Config | Parameters (M) | FLOPs (G) |'
    assert line == '| --- | --- | --- |'
    assert (
        rows[0]
        == rows[1]
        == (f'| [cls.py](cls.py) | {inference} | {total / 1e9:.2f} |')
    )


@pytest.mark.parametrize(
    'options, words',
    [
        (['--shape', '0', '96'], '--shape takes'),
        (['--cfg-options', 'model.backbone.dept=1'], "argument 'dept'"),
        (['--cfg-options', 'modle.type=A'], 'did you mean model'),
    ],
)
def test_mistakes(options, words):
    config = tiny.ROOT / 'configs/imagenet/overlock_xt_300e.py'
    message = tiny.run_tool('get_flops', config, *options, status=2)
    message = message.splitlines()[-1]
    assert message.startswith('get_flops.py: ') and words in message
