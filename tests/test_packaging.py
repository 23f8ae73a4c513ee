"""The wheel, what importing it costs, and its configs and tools by name."""

import os
import re
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


def build_wheel(source, folder, **env):
    """Builds a wheel offline with this environment's setuptools."""
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-index', '--no-deps']
    command += ['--no-build-isolation', '-w', str(folder), str(source)]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob('*.whl')))


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
    wheel = build_wheel(clone, folder, PYTHONPATH=str(folder))
    litter = {path.name for path in {*clone.iterdir()} - before}
    assert litter <= {'build', 'mmoverlock.egg-info'}
    return wheel


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
    assert 'mmoverlock/.mim/tools/train.py' in expected
    assert 'mmoverlock/.mim/tools/dist_train.sh' in expected
    names = {n for n in wheel.namelist() if not n.startswith(INFO)}
    assert names == expected.keys()
    for name, path in expected.items():
        assert wheel.read(name) == path.read_bytes(), name
    assert any(name.endswith('/LICENSE') for name in wheel.namelist())


def test_wheel_from_sdist_is_the_same(clone, wheel, tmp_path):
    code = 'import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])'
    command = [sys.executable, '-c', code, tmp_path]
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    again = build_wheel(next(tmp_path.glob('*.tar.gz')), tmp_path)
    assert {*again.namelist()} == {*wheel.namelist()}


def test_links_of_the_package_hold_anywhere(metadata):
    links = re.findall(r'\]\(([^)]+)\)', metadata.get_payload())
    links += [url.split(', ')[1] for url in metadata.get_all('Project-URL')]
    assert len(links) > 2
    assert all(link.startswith('https://') for link in links)


def test_extras_are_ranges_with_the_pins_in_them(metadata):
    """A torch that is there, of any release that will do, stays."""
    found = {'onedl': [], 'openmmlab': [], None: []}
    for text in metadata.get_all('Requires-Dist'):
        requirement = Requirement(text)
        marker = re.search('extra == "(.*)"', str(requirement.marker))
        found[marker and marker[1]].append(requirement)
    assert [str(requirement) for requirement in found.pop(None)] == [
        'safetensors'
    ]
    setup_env = tiny.load_tool('setup_env', 'dev')
    pins = setup_env.read_pins(ROOT / 'requirements')
    for stack, requirements in found.items():
        assert len(requirements) > 9
        for requirement in requirements:
            assert '==' not in str(requirement.specifier), requirement
            pin = Requirement(pins[stack][requirement.name])
            for item in pin.specifier:
                if item.operator == '==':
                    assert requirement.specifier.contains(item.version), pin
        [torch] = [item for item in requirements if item.name == 'torch']
        assert str(torch.specifier) == '>=2.6'


# --------------------------------------------------------------- installed


def run(folder, *argv):
    """Run python where a package in a folder is installed."""
    path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
    env = os.environ | {'PYTHONPATH': path}
    options = dict(env=env, cwd=folder, capture_output=True, text=True)
    return subprocess.run([sys.executable, *argv], **options)


INSTALLED = """
import pkgutil, random, runpy, sys
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
from mmoverlock import cli
cli.set_up()
print(*(one == other for one, other in zip(state(), before)))
own = [m for name, m in sys.modules.items() if name.startswith('mmoverlock')]
print(all(module.__file__.startswith(sys.argv[1]) for module in own))

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
    done = run(tmp_path, '-c', INSTALLED, str(tmp_path))
    assert done.stderr.splitlines()[-1] == (
        'test.py: checkpoint no.pth does not exist'
    )
    lines = [line for line in done.stdout.splitlines() if 'OneDL' not in line]
    said = 'set()', 'True', 'False False True True True', 'True', 'MaskRCNN'
    assert lines == [*said]


@pytest.mark.parametrize(
    ('argv', 'status'), [([], 0), (['--help'], 0), (['trian'], 2)]
)
def test_list_of_tools(argv, status):
    done = run(ROOT, '-m', 'mmoverlock', *argv)
    assert done.returncode == status
    names = sorted(path.stem for path in ROOT.glob('tools/*.py'))
    assert ', '.join(names) in done.stdout + done.stderr


# ----------------------------------------------------------------- by name


def test_config_is_the_file():
    assert Path(mmoverlock.config(NAME)).samefile(ROOT / 'configs' / NAME)
    argv = 'get_flops', 'mmoverlock::mask_rcnn/x.py'
    message = tiny.run_tool(*argv, status=2)
    words = "get_flops.py: .* no config 'mask_rcnn/x.py', but .*dino"
    assert re.match(words, message)


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
    cfg = Config.fromfile(path)
    expected = Config.fromfile(ROOT / 'configs' / NAME)
    assert cfg.model.backbone.pop('arch') == 't'
    assert expected.model.backbone.pop('arch') == 'xt'
    assert cfg.to_dict() == expected.to_dict()


def test_base_of_others_is_as_before():
    pytest.importorskip('mmdet')
    name = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    path, scope = cli.config_of(name, 'own.py')
    assert Path(path).is_file() and scope == 'mmdet'
    found = cli.config_of('base.py', 'folder/own.py')
    assert found == ('folder/base.py', None)
