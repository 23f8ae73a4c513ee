"""Parameters and FLOPs: what get_flops.py counts, and what pages say."""

import os
import re

import pytest
import tiny
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmoverlock.models.variants import MIXERS, REMOVALS

tiny.need_openmmlab()

tool = tiny.load_tool('get_flops')
CONFIGS = tiny.ROOT / 'configs'
NAME = 'imagenet/overlock_xt_300e.py'


def read(path):
    """A config, from configs/ or by its whole path; it is the scope, too."""
    cfg = Config.fromfile(CONFIGS / path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return cfg


def quick(values, *few):
    """All of some values as parameters, of which a few are quick."""
    slow = pytest.mark.slow
    return [pytest.param(v, marks=() if v in few else slow) for v in values]


# --------------------------------------------------------------- the tool


def test_options():
    """The form and the backend do not matter; each channel costs as much."""

    def total(**options):
        cfg = tiny.shrink('cls')
        cfg.model.backbone.update(options)
        _, flops, channels = tool.count(cfg, (64, 96))
        assert channels == options.get('in_channels', 3)
        return flops

    plain = total(contmix_backend='reference')
    assert total(contmix_backend='tiled', deploy=True) == plain
    # 3 x 3 taps, half of 8 channels, at stride 2.
    assert total(in_channels=5) - plain == 2 * 9 * 4 * 32 * 48


@pytest.mark.parametrize(
    'task, names',
    [
        ('det', ['backbone', 'neck', 'rpn_head', 'roi_head']),
        ('seg', ['backbone', 'decode_head', 'auxiliary_head']),
        ('cls', ['backbone', 'head.head', 'head.aux_head']),
    ],
)
def test_parts(task, names):
    """Only auxiliary heads cost nothing."""
    cfg = tiny.shrink(task)
    parts, total, _ = tool.count(cfg, (64, 96))
    assert list(parts) == names
    for name, (parameters, flops) in parts.items():
        assert parameters > 0 and (flops > 0) == ('aux' not in name)
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
    out = tiny.run_tool('get_flops', CONFIGS / NAME, '--shape', 64, 96)
    title, *rows = out.splitlines()
    assert title.endswith(f'{NAME}, 5 x 64 x 96')
    assert rows[3].split() == 'head.aux_head 0.50 M 0.00 G'.split()
    assert rows[4].split() == 'total 24.50 M 4.20 G'.split()
    assert rows[5].split() == 'without auxiliary head 24.00 M 4.20 G'.split()
    other = os.path.relpath(CONFIGS / 'upernet/overlock_xt_160k.py')
    out = tiny.run_tool('get_flops', other, CONFIGS / NAME, '--table')
    assert out.splitlines()[2:] == [
        '| [overlock_xt_160k.py](../upernet/overlock_xt_160k.py) '
        '| 24.00 | 4.20 |',
        '| [overlock_xt_300e.py](overlock_xt_300e.py) | 24.00 | 4.20 |',
    ]


# -------------------------------------------------------------- metafiles

METADATA = {
    model['Config'].removeprefix('configs/'): model.get('Metadata', {})
    for path in sorted(CONFIGS.glob('*/metafile.yml'))
    if path.parent.name != 'ablation'
    for model in yaml.safe_load(path.read_text())['Models']
}
COUNTED = [path for path in METADATA if 'FLOPs' in METADATA[path]]
DETECTOR = 'mask_rcnn/overlock_xt_1x.py'


@pytest.mark.parametrize(
    'path', quick(METADATA, DETECTOR, 'upernet/overlock_xt_160k.py')
)
def test_parameters(path):
    with torch.device('meta'):
        model = MODELS.build(read(path).model)
    count = sum(weight.numel() for weight in model.parameters())
    assert METADATA[path]['Parameters'] == count
    # FLOPs of the paper's models are there; drop-ins are not counted.
    assert (path in COUNTED) == ('mini' not in path and 'drop_in' not in path)


@pytest.mark.parametrize('path', quick(COUNTED, NAME))
def test_flops(path):
    cfg = read(path)
    _, total, _ = tool.count(cfg, tool.SHAPES[cfg.default_scope])
    assert METADATA[path]['FLOPs'] == total


# -------------------------------------------------------------- ablations

ABLATION = CONFIGS / 'ablation'
README = (ABLATION / 'README.md').read_text()
ROWS = re.findall(r'^\| \[.*\]\((.*)\) \| (.*) \| (.*) \|$', README, re.M)
QUICK = [row for row in ROWS if 'neighborhood_attention_300e' in row[0]]


def test_ablations():
    """Every config, once, behind the full network, and every variant."""
    found = set()
    for schedule, base in (('300e', 'imagenet'), ('160k', 'upernet')):
        links = [link for link, *_ in ROWS if schedule in link]
        names = sorted(p.name for p in ABLATION.glob(f'*_{schedule}.py'))
        assert links == [f'../{base}/overlock_xt_{schedule}.py', *names]
        for file in names:
            backbone = read(ABLATION / file).model.backbone
            name = re.fullmatch('overlock_xt_(.*)_[^_]*', file)[1]
            mixer = backbone.get('mixer', 'contmix')
            mixer = mixer if isinstance(mixer, str) else mixer.type
            changed = [*backbone.get('remove', ())] or [mixer]
            assert re.sub('^no_|_[ks].$', '', name) == changed[0]
            found.add(changed[0])
    assert found == {*REMOVALS, *MIXERS}


@pytest.mark.parametrize('row', quick(ROWS, *QUICK))
def test_rows(row):
    """They are what the tool prints."""
    link, parameters, flops = row
    cfg = read(ABLATION / link)
    with torch.device('meta'):
        parts, total, _ = tool.count(cfg, tool.SHAPES[cfg.default_scope])
    expected = f'| [{link.split("/")[-1]}]({link}) | {parameters} | {flops} |'
    assert tool.table_row(link, parts, total) == expected
