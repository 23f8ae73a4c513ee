"""configs/ablation: the tables of its README, and what its configs build."""

import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import load_tool

from mmoverlock.models.variants import MIXERS, REMOVALS

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmseg', 'mmpretrain'):
    pytest.importorskip(package)

FOLDER = Path(__file__).parents[1] / 'configs' / 'ablation'
README = (FOLDER / 'README.md').read_text()
ROWS = re.findall(r'^\| \[.*\]\((.*)\) \| (.*) \| (.*) \|$', README, re.M)
tool = load_tool('get_flops')


def read(link):
    cfg = Config.fromfile(FOLDER / link)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return cfg


def test_rows():
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


@pytest.mark.parametrize('link, parameters, flops', ROWS)
def test_parameters(link, parameters, flops):
    with torch.device('meta'):
        model = MODELS.build(read(link).model)
    count = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(('head.aux_head', 'auxiliary_head'))
    )
    assert f'{count / 1e6:.2f}' == parameters


def test_table(capsys):
    """A row a config; links are from the folder of the last one."""
    names = '../imagenet/overlock_xt_300e.py', 'overlock_xt_static_300e.py'
    paths = [str(FOLDER / name) for name in names]
    tool.main(['--table', *paths, '--shape', '64', '64'])
    title, line, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert title == '| Config | Parameters (M) | FLOPs (G) |'
    assert line == '| --- | --- | --- |'
    parameters = {link: value for link, value, _ in ROWS}
    for name, row in zip(names, rows, strict=True):
        _, link, value, flops, _ = row.split('|')
        assert link.strip() == f'[{os.path.basename(name)}]({name})'
        assert value.strip() == parameters[name]
        assert 0.1 < float(flops) < 0.5


def check(link, parameters, flops):
    cfg = read(link)
    with torch.device('meta'):
        parts, total, _ = tool.count(cfg, tool.SHAPES[cfg.default_scope])
    name = os.path.basename(link)
    row = f'| [{name}]({link}) | {parameters} | {flops} |'
    assert tool.table_row(link, parts, total) == row


@pytest.mark.parametrize(
    'row', [row for row in ROWS if re.search('contmix_s3|neighbor', row[0])]
)
def test_flops(row):
    check(*row)


@pytest.mark.slow
@pytest.mark.parametrize('row', ROWS)
def test_all_flops(row):
    check(*row)
