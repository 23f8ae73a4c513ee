"""The wheel, its .mim folder and what importing the package costs."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny import load_tool

import mmoverlock

ROOT = Path(__file__).parents[1]
STACKS = 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'


def build_wheel(source, folder, **env):
    """Builds a wheel offline with this environment's setuptools."""
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-index', '--no-deps']
    command += ['--no-build-isolation', '-w', str(folder), str(source)]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob('*.whl')))


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the files that git tracks or would."""
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    command = 'git', 'ls-files', '-z', '-co', '--exclude-standard'
    names = subprocess.check_output(command, cwd=ROOT, text=True).split('\0')
    folder = tmp_path_factory.mktemp('clone')
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory):
    """The wheel of a used clone, built where torch cannot be imported."""
    folder = tmp_path_factory.mktemp('wheel')
    (folder / 'torch.py').write_text('raise SystemExit("torch imported")')
    for top in 'configs', 'mmoverlock', 'tools':
        (clone / top / '__pycache__').mkdir()
        (clone / top / '__pycache__' / 'x.cpython-312.pyc').touch()
    before = set(clone.iterdir())
    wheel = build_wheel(clone, folder, PYTHONPATH=str(folder))
    litter = {path.name for path in set(clone.iterdir()) - before}
    assert litter <= {'build', 'mmoverlock.egg-info'}
    return wheel


def mim_files(root):
    """The files that .mim has to offer, relative to the root."""
    paths = [*root.glob('configs/**/*.py'), *root.glob('configs/**/*.yml')]
    paths += [*root.glob('tools/*.py'), *root.glob('tools/*.sh')]
    paths.append(root / 'model-index.yml')
    return {path.relative_to(root).as_posix() for path in paths}


def test_wheel_has_package_and_mim(clone, wheel):
    expected = {f'mmoverlock/.mim/{name}' for name in mim_files(clone)}
    assert 'mmoverlock/.mim/configs/mask_rcnn/overlock_t_1x.py' in expected
    assert 'mmoverlock/.mim/tools/train.py' in expected
    assert 'mmoverlock/.mim/tools/dist_train.sh' in expected
    modules = (clone / 'mmoverlock').rglob('*.py')
    expected |= {path.relative_to(clone).as_posix() for path in modules}
    expected.add('mmoverlock/py.typed')
    info = f'mmoverlock-{mmoverlock.__version__}.dist-info/'
    names = {n for n in wheel.namelist() if not n.startswith(info)}
    assert names == expected
    assert any(name.endswith('/LICENSE') for name in wheel.namelist())


def test_wheel_from_sdist_is_the_same(clone, wheel, tmp_path):
    code = 'import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])'
    subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        cwd=clone,
        check=True,
        capture_output=True,
    )
    again = build_wheel(next(tmp_path.glob('*.tar.gz')), tmp_path)
    assert set(again.namelist()) == set(wheel.namelist())


@pytest.fixture(scope='module')
def metadata(wheel):
    info = f'mmoverlock-{mmoverlock.__version__}.dist-info/METADATA'
    return message_from_bytes(wheel.read(info))


def test_stacks_are_extras(metadata):
    extras = set(metadata.get_all('Provides-Extra'))
    assert extras == {'onedl', 'openmmlab'}
    requirements = metadata.get_all('Requires-Dist')
    hard = [text for text in requirements if '; extra ==' not in text]
    assert hard == ['safetensors']


@pytest.mark.parametrize('stack', ['onedl', 'openmmlab'])
def test_extras_are_ranges_with_the_pins_in_them(metadata, stack):
    """A torch that is there, of any release that will do, stays."""
    requirements = [
        requirement
        for requirement in map(Requirement, metadata.get_all('Requires-Dist'))
        if str(requirement.marker) == f'extra == "{stack}"'
    ]
    assert len(requirements) > 9
    setup_env = load_tool('setup_env', 'dev')
    pins = setup_env.read_pins(ROOT / 'requirements')[stack]
    for requirement in requirements:
        assert '==' not in str(requirement.specifier), requirement
        [pin] = Requirement(pins[requirement.name]).specifier or [None]
        if pin and pin.operator == '==':
            assert requirement.specifier.contains(pin.version), requirement
    [torch] = [item for item in requirements if item.name == 'torch']
    assert str(torch.specifier) == '>=2.6'


def test_extras_replace_nothing(wheel):
    """Where the stack is installed, an extra adds nothing to it."""
    found = {d.metadata['Name'].lower() for d in distributions()}
    stack = 'onedl' if 'onedl-mmcv' in found else 'openmmlab'
    if not {'mmcv', 'onedl-mmcv'} & found:
        pytest.skip('no stack is installed')
    command = [sys.executable, '-m', 'pip', 'install', '--dry-run', '-q']
    command += ['--no-index', '--report', '-', f'{wheel.filename}[{stack}]']
    report = json.loads(subprocess.check_output(command, text=True))
    names = [item['metadata']['name'] for item in report['install']]
    assert names == ['mmoverlock']


def test_installed(wheel, tmp_path):
    """mmengine finds all configs, bases and all, and the tools run."""
    for package in ('mmcv._ext', 'mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(package)
    from mmengine.config import Config

    wheel.extractall(tmp_path)
    code = """
import json, runpy, sys
from pathlib import Path
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config
from mmengine.utils import get_installed_path

# mmengine looks only into the packages of this table.
MODULE2PACKAGE['mmoverlock'] = 'mmoverlock'
mim = Path(get_installed_path('mmoverlock'), '.mim')
found = {}
for path in (mim / 'configs').glob('[!_]*/*.py'):
    name = path.relative_to(mim / 'configs').as_posix()
    found[name] = get_config(f'mmoverlock::{name}').to_dict()
tools = {path.stem: runpy.run_path(path) for path in mim.glob('tools/*.py')}
tools['get_flops']['main'](['mmoverlock::imagenet/overlock_xt_300e.py'])
own = [m for name, m in sys.modules.items() if name.startswith('mmoverlock')]
print(json.dumps([found, [*tools], [module.__file__ for module in own]]))
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *table, last = done.stdout.splitlines()
    assert table[-1].startswith('without auxiliary head     16.97 M')
    found, tools, files = json.loads(last)
    for path in (ROOT / 'configs').glob('[!_]*/*.py'):
        name = path.relative_to(ROOT / 'configs').as_posix()
        expected = Config.fromfile(path).to_dict()
        assert found.pop(name) == json.loads(json.dumps(expected)), name
    assert not found
    assert set(tools) == {path.stem for path in ROOT.glob('tools/*.py')}
    assert all(file.startswith(str(tmp_path)) for file in files)


def test_model_index_lists_every_metafile():
    from mmengine.fileio import load

    listed = load(ROOT / 'model-index.yml')['Import']
    metafiles = ROOT.glob('configs/*/metafile.yml')
    assert sorted(listed) == sorted(
        path.relative_to(ROOT).as_posix() for path in metafiles
    )


def test_import_is_light(tmp_path):
    code = f'import sys, mmoverlock; print({set(STACKS)} & set(sys.modules))'
    output = subprocess.check_output(
        [sys.executable, '-c', code], cwd=tmp_path, text=True
    )
    assert output.strip() == 'set()'


def test_imports_change_nothing():
    """How mmengine treats files, and what draws, is for the process to say."""
    code = """
import pkgutil, random, matplotlib, torch
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
import mmoverlock
for module in pkgutil.walk_packages(mmoverlock.__path__, 'mmoverlock.'):
    if '.triton' not in module.name and module.name != 'mmoverlock.timm':
        __import__(module.name)
print(state() == before)
from mmoverlock import cli
cli.set_up()
print(*(one == other for one, other in zip(state(), before)))
"""
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert output.splitlines()[-2:] == ['True', 'False False True True True']
