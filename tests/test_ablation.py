"""configs/ablation: the tables of its README, and what its configs build."""

import re

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmoverlock.models.variants import MIXERS, REMOVALS

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmseg', 'mmpretrain'):
    pytest.importorskip(package)

FOLDER = tiny.ROOT / 'configs' / 'ablation'
README = (FOLDER / 'README.md').read_text()
ROWS = re.findall(r'^\| \[.*\]\((.*)\) \| (.*) \| (.*) \|$', README, re.M)
QUICK = [row for row in ROWS if 'neighborhood_attention_300e' in row[0]]
tool = tiny.load_tool('get_flops')


def read(link):
    cfg = Config.fromfile(FOLDER / link)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return cfg


def test_order():
    """Every config, once, behind the full network."""
    for schedule, base in (('300e', 'imagenet'), ('160k', 'upernet')):
        names = sorted(path.name for path in FOLDER.glob(f'*_{schedule}.py'))
        links = [link for link, *_ in ROWS if schedule in link]
        assert links == [f'../{base}/overlock_xt_{schedule}.py', *names]


def test_every_variant_has_a_config():
    names = {path.stem for path in FOLDER.glob('*_300e.py')}
    wanted = {f'no_{name}' for name in REMOVALS} | {*MIXERS} - {'contmix'}
    assert {f'overlock_xt_{name}_300e' for name in wanted} <= names
    for link, *_ in ROWS:
        backbone = read(link).model.backbone
        name = re.fullmatch('.*overlock_xt_?(.*)_[^_]*', link)[1]
        if name.startswith('no_'):
            assert backbone.remove == [name.removeprefix('no_')]
        elif name:
            mixer = backbone.mixer
            mixer = mixer if isinstance(mixer, str) else mixer.type
            assert name.startswith(mixer)


@pytest.mark.parametrize('row', [row for row in ROWS if '300e' in row[0]])
def test_parameters(row):
    """As many as configs build; test_rows counts the others too."""
    link, parameters, _ = row
    with torch.device('meta'):
        model = MODELS.build(read(link).model)
    count = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith('head.aux_head')
    )
    assert f'{count / 1e6:.2f}' == parameters


@pytest.mark.parametrize(
    'row',
    [
        pytest.param(row, marks=() if row in QUICK else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_rows(row):
    """They are what the tool prints."""
    link, parameters, flops = row
    cfg = read(link)
    with torch.device('meta'):
        parts, total, _ = tool.count(cfg, tool.SHAPES[cfg.default_scope])
    expected = f'| [{link.split("/")[-1]}]({link}) | {parameters} | {flops} |'
    assert tool.table_row(link, parts, total) == expected
