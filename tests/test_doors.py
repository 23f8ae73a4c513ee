"""Configs and tools of the package by name, from anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

import mmoverlock
from mmoverlock import cli

ROOT = Path(__file__).parents[1]
NAME = 'mask_rcnn/overlock_xt_1x.py'


def write(folder, base):
    path = folder / 'own.py'
    path.write_text(
        f'_base_ = {base}\nmodel = dict(backbone=dict(arch="t"))\n'
    )
    return str(path)


def test_config_is_the_file():
    assert Path(mmoverlock.config(NAME)).samefile(ROOT / 'configs' / NAME)
    with pytest.raises(
        FileNotFoundError, match="'mask_rcnn/x.py', but .*dino"
    ):
        mmoverlock.config('mask_rcnn/x.py')


@pytest.mark.parametrize(
    'base',
    [f"'mmoverlock::{NAME}'", f"__import__('mmoverlock').config('{NAME}')"],
)
def test_base(base, tmp_path, monkeypatch):
    """By name in the tools here; by its file in those of all packages."""
    pytest.importorskip('mmdet')
    own = Config._get_cfg_path
    if '::' in base:
        cli.set_up()
    try:
        cfg = Config.fromfile(write(tmp_path, base))
    finally:
        Config._get_cfg_path = staticmethod(own)
    expected = Config.fromfile(ROOT / 'configs' / NAME)
    assert (cfg.model.backbone.arch, expected.model.backbone.arch) == (
        't',
        'xt',
    )
    cfg.model.backbone.arch = 'xt'
    assert cfg.to_dict() == expected.to_dict()


def test_base_of_others_is_as_before(monkeypatch):
    pytest.importorskip('mmdet')
    path, scope = cli.config_of(
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'own.py'
    )
    assert Path(path).is_file() and scope == 'mmdet'
    assert cli.config_of('base.py', 'folder/own.py') == (
        'folder/base.py',
        None,
    )


def run(*arguments, folder):
    return subprocess.run(
        [sys.executable, '-m', 'mmoverlock', *arguments],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_tools_by_name(tmp_path):
    pytest.importorskip('mmpretrain')
    name = 'mmoverlock::imagenet/overlock_xt_300e.py'
    done = run('get_flops', name, '--shape', '32', '32', folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'{name}, 3 x 32 x 32' in done.stdout
    assert not [*tmp_path.iterdir()]
    done = run('get_flops', 'mmoverlock::imagenet/x.py', folder=tmp_path)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        "get_flops.py: mmoverlock has no config 'imagenet/x"
    )


def test_list_of_tools(tmp_path):
    names = ', '.join(sorted(path.stem for path in ROOT.glob('tools/*.py')))
    for arguments, code in ((), 0), (['--help'], 0), (['trian'], 2):
        done = run(*arguments, folder=tmp_path)
        assert done.returncode == code
        assert names in done.stdout + done.stderr
