"""configs/ablation: the tables of its README, and what its configs build."""

import re

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmoverlock.models.variants import MIXERS, REMOVALS

tiny.need_openmmlab()

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
    """Under its name."""
    found = set()
    for link, *_ in ROWS:
        backbone = read(link).model.backbone
        name = re.fullmatch('.*overlock_xt_?(.*)_[^_]*', link)[1]
        mixer = backbone.get('mixer', name)
        mixer = mixer if isinstance(mixer, str) else mixer.type
        removed = [f'no_{part}' for part in backbone.get('remove', ())]
        assert removed == [name] or name.startswith(mixer)
        found.add(name)
    assert {f'no_{name}' for name in REMOVALS} | {*MIXERS} - {
        'contmix'
    } < found


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
