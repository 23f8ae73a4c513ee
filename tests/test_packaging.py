"""The wheel, what importing it costs, and its configs and tools by name."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import tiny
from mmengine.config import Config
from packaging.requirements import Requirement

import mmoverlock
from mmoverlock import cli

ROOT = tiny.ROOT
NAME = 'mask_rcnn/overlock_xt_1x.py'
INFO = f'mmoverlock-{mmoverlock.__version__}.dist-info'


def build(kind, source, folder, **env):
    """Build an 'sdist' or a 'wheel' with this environment's setuptools."""
    code = (
        f'import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])'
    )
    subprocess.run(
        [sys.executable, '-c', code, folder],
        cwd=source,
        env=os.environ | env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    [file] = folder.glob('*.tar.gz' if kind == 'sdist' else '*.whl')
    return file


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the files that git tracks or would."""
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    folder = tmp_path_factory.mktemp('clone')
    command = (
        'git ls-files -zco --exclude-standard | '
        'tar --null --files-from=- --ignore-failed-read -c | tar -xC "$0"'
    )
    subprocess.check_call(['bash', '-c', command, folder], cwd=ROOT)
    return folder


@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory):
    """The wheel of a used clone, built where torch cannot be imported."""
    folder = tmp_path_factory.mktemp('wheel')
    (folder / 'torch.py').write_text('raise SystemExit("torch imported")')
    for top in 'configs', 'mmoverlock', 'tools':
        (clone / top / '__pycache__').mkdir()
        (clone / top / '__pycache__' / 'x.cpython-312.pyc').touch()
    before = {*clone.iterdir()}
    file = build('wheel', clone, folder, PYTHONPATH=str(folder))
    litter = {path.name for path in {*clone.iterdir()} - before}
    assert litter <= {'build', 'mmoverlock.egg-info'}
    return zipfile.ZipFile(file)


@pytest.fixture(scope='module')
def metadata(wheel):
    return message_from_bytes(wheel.read(f'{INFO}/METADATA'))


def test_wheel_has_package_and_mim(clone, wheel):
    """All files of configs and tools, as they are in the clone."""
    expected = {'mmoverlock/py.typed': clone / 'mmoverlock/py.typed'}
    for pattern in 'configs/**/*.py', 'configs/**/*.yml', 'tools/*.[ps][yh]':
        for path in (*clone.glob(pattern), clone / 'model-index.yml'):
            name = path.relative_to(clone).as_posix()
            expected[f'mmoverlock/.mim/{name}'] = path
    for path in (clone / 'mmoverlock').rglob('*.py'):
        expected[path.relative_to(clone).as_posix()] = path
    assert f'mmoverlock/.mim/configs/{NAME}' in expected
    assert 'mmoverlock/.mim/tools/dist_train.sh' in expected
    names = {n for n in wheel.namelist() if not n.startswith(INFO)}
    assert names == expected.keys()
    for name, path in expected.items():
        assert wheel.read(name) == path.read_bytes(), name
    assert any(name.endswith('/LICENSE') for name in wheel.namelist())


def test_wheel_from_sdist_is_the_same(clone, wheel, tmp_path):
    sdist = build('sdist', clone, tmp_path)
    shutil.unpack_archive(sdist, tmp_path, filter='data')
    source = tmp_path / sdist.name.removesuffix('.tar.gz')
    again = zipfile.ZipFile(build('wheel', source, tmp_path))
    assert {*again.namelist()} == {*wheel.namelist()}


def test_links_of_the_package_hold_anywhere(metadata):
    links = re.findall(r'\]\(([^)]+)\)', metadata.get_payload())
    links += [url.split(', ')[1] for url in metadata.get_all('Project-URL')]
    assert len(links) > 2
    assert all(link.startswith('https://') for link in links)


def test_extras_are_ranges_with_the_pins_in_them(metadata):
    """A torch that is there, of any release that will do, stays."""
    found = {'onedl': {}, 'openmmlab': {}, None: {}}
    for text in metadata.get_all('Requires-Dist'):
        requirement = Requirement(text)
        marker = re.search('extra == "(.*)"', str(requirement.marker))
        found[marker and marker[1]][requirement.name] = requirement.specifier
    assert [*found.pop(None)] == ['safetensors']
    setup_env = tiny.load_tool('setup_env', 'dev')
    pins = setup_env.read_pins(ROOT / 'requirements')
    for stack, ranges in found.items():
        assert len(ranges) > 9 and str(ranges['torch']) == '>=2.6'
        for name, versions in ranges.items():
            assert '==' not in str(versions), name
            for pin in Requirement(pins[stack][name]).specifier:
                if pin.operator == '==':
                    assert versions.contains(pin.version), name


# --------------------------------------------------------------- installed

INSTALLED = """
import importlib, pkgutil, random, runpy, sys
import mmoverlock
print({'torch', 'mmengine', 'mmcv', 'numpy'} & {*sys.modules})

import matplotlib, torch
from mmengine.fileio.backends import registry_utils as backends
from mmengine.runner import CheckpointLoader
def state():
    return (
        {**CheckpointLoader._schemes},
        {**backends.backends},
        matplotlib.get_backend(auto_select=False),
        random.getstate(),
        torch.get_rng_state().tolist(),
    )
before = state()
for module in pkgutil.walk_packages(mmoverlock.__path__, 'mmoverlock.'):
    if '.triton' not in module.name and module.name != 'mmoverlock.timm':
        __import__(module.name)
print(state() == before)

# As notebooks do with what was edited.
from mmengine.registry import MODELS
old = MODELS.get('OverLoCK')
sys.path.append(sys.prefix + '/timm')  # where `make env` has it
walk = pkgutil.walk_packages(mmoverlock.__path__, 'mmoverlock.')
for module in [importlib.import_module(item.name) for item in walk]:
    importlib.reload(module)
new = sys.modules['mmoverlock.models.overlock'].OverLoCK
print(MODELS.get('OverLoCK') is new is not old)

before = state()
from mmoverlock import cli
cli.set_up()
print(*(one == other for one, other in zip(state(), before)))
own = [m for name, m in sys.modules.items() if name.startswith('mmoverlock')]
print(all(module.__file__.startswith(sys.argv[1]) for module in own))
importlib.reload(cli).set_up()

# mmengine looks only into the packages of this table.
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config
MODULE2PACKAGE['mmoverlock'] = 'mmoverlock'
print(get_config('mmoverlock::mask_rcnn/overlock_t_1x.py').model.type)

name = 'mmoverlock::imagenet/overlock_xt_300e.py'
sys.argv = ['mmoverlock', 'test', name, 'no.pth']
runpy.run_module('mmoverlock', run_name='__main__')
"""


def test_installed(wheel, tmp_path):
    """Configs and tools by name; importing is light, and changes nothing.

    How mmengine treats files, and what draws, is for the process to say.
    """
    tiny.need_openmmlab()
    wheel.extractall(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-c', INSTALLED, str(tmp_path)],
        env=os.environ | {'PYTHONPATH': path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == (
        'test.py: checkpoint no.pth does not exist'
    )
    lines = [line for line in done.stdout.splitlines() if 'OneDL' not in line]
    assert lines == [
        *('set()', 'True', 'True', 'False False True True True', 'True'),
        'MaskRCNN',
    ]


@pytest.mark.parametrize('argv', [[], ['--help'], ['trian']])
def test_list_of_tools(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmoverlock', *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('mmoverlock', run_name='__main__')
    names = sorted(path.stem for path in ROOT.glob('tools/*.py'))
    said = capsys.readouterr()
    assert ', '.join(names) in (said.err if stop.value.code else said.out)
    assert bool(stop.value.code) == (argv == ['trian'])


# ----------------------------------------------------------------- by name


def test_config_is_the_file():
    assert Path(mmoverlock.config(NAME)).samefile(ROOT / 'configs' / NAME)
    argv = 'get_flops', 'mmoverlock::mask_rcnn/x.py'
    words = "get_flops.py: .* no config 'mask_rcnn/x.py', but .*dino"
    assert re.match(words, tiny.run_tool(*argv, status=2))


@pytest.mark.parametrize(
    'base',
    [f"'mmoverlock::{NAME}'", f"__import__('mmoverlock').config('{NAME}')"],
)
def test_base(base, tmp_path, monkeypatch):
    """By name in the tools here; by its file in those of all packages."""
    tiny.need_openmmlab()
    path = tmp_path / 'own.py'
    path.write_text(f'_base_ = {base}\nmodel = dict(backbone=dict(arch="t"))')
    if '::' in base:
        own = staticmethod(Config._get_cfg_path)
        monkeypatch.setattr(Config, '_get_cfg_path', own)
        cli.set_up()
    expected = Config.fromfile(ROOT / 'configs' / NAME)
    assert expected.model.backbone.arch == 'xt'
    expected.model.backbone.arch = 't'
    assert Config.fromfile(path).to_dict() == expected.to_dict()
