"""The wheel, what importing it costs, and its configs and tools by name."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes

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
        f'from setuptools import build_meta as b; b.build_{kind}("{folder}")'
    )
    subprocess.run(
        [sys.executable, '-c', code],
        cwd=source,
        env=os.environ | env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    [file] = folder.glob('*.tar.gz' if kind == 'sdist' else '*.whl')
    return file


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A used clone: what packages are made of, and compiled files."""
    folder = tmp_path_factory.mktemp('clone')
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ('configs', 'docs', 'mmoverlock', 'tools'):
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
        (folder / name / '__pycache__').mkdir(exist_ok=True)
        (folder / name / '__pycache__' / 'x.cpython-312.pyc').touch()
    return folder


@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory):
    """The wheel, built where torch cannot be imported."""
    folder = tmp_path_factory.mktemp('wheel')
    (folder / 'torch.py').write_text('raise SystemExit("torch imported")')
    file = build('wheel', clone, folder, PYTHONPATH=str(folder))
    return zipfile.ZipFile(file)


@pytest.fixture(scope='module')
def run(wheel, tmp_path_factory):
    """Runs a command in a folder with the wheel; returns the process."""
    folder = tmp_path_factory.mktemp('installed')
    wheel.extractall(folder)
    path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
    return functools.partial(
        subprocess.run,
        cwd=folder,
        env=os.environ | {'PYTHONPATH': path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_wheel_has_package_and_mim(clone, wheel):
    """All files of configs and tools, as they are in the clone."""
    files = [clone / 'mmoverlock/py.typed', *clone.glob('mmoverlock/**/*.py')]
    expected = {str(file.relative_to(clone)): file for file in files}
    patterns = 'configs/**/*.py', 'configs/**/*.yml', 'tools/*.[ps][yh]'
    for pattern in (*patterns, 'model-index.yml'):
        for file in clone.glob(pattern):
            expected[f'mmoverlock/.mim/{file.relative_to(clone)}'] = file
    assert f'mmoverlock/.mim/configs/{NAME}' in expected
    assert 'mmoverlock/.mim/tools/dist_train.sh' in expected
    names = {n for n in wheel.namelist() if not n.startswith(INFO)}
    assert names == expected.keys()
    for name, file in expected.items():
        assert wheel.read(name) == file.read_bytes(), name
    assert any(name.endswith('/LICENSE') for name in wheel.namelist())


def test_wheel_from_sdist_is_the_same(clone, wheel, tmp_path):
    sdist = build('sdist', clone, tmp_path)
    shutil.unpack_archive(sdist, tmp_path, filter='data')
    source = tmp_path / sdist.name.removesuffix('.tar.gz')
    again = zipfile.ZipFile(build('wheel', source, tmp_path))
    assert {*again.namelist()} == {*wheel.namelist()}


def test_links_of_the_package_hold_anywhere(wheel):
    metadata = message_from_bytes(wheel.read(f'{INFO}/METADATA'))
    links = re.findall(r'\]\(([^)]+)\)', metadata.get_payload())
    links += [url.split(', ')[1] for url in metadata.get_all('Project-URL')]
    assert len(links) > 2
    assert all(link.startswith('https://') for link in links)


def test_extras_are_ranges_with_the_pins_in_them(wheel):
    """A torch that is there, of any release that will do, stays."""
    metadata = message_from_bytes(wheel.read(f'{INFO}/METADATA'))
    always, *extras = map(Requirement, metadata.get_all('Requires-Dist'))
    assert str(always) == 'safetensors'
    pins = tiny.load_tool('setup_env', 'dev').read_pins(ROOT / 'requirements')
    for stack in ('onedl', 'openmmlab'):
        mine = [e for e in extras if e.marker.evaluate({'extra': stack})]
        ranges = {extra.name: extra.specifier for extra in mine}
        assert len(ranges) > 9 and str(ranges['torch']) == '>=2.6'
        for name, versions in ranges.items():
            assert '==' not in str(versions), name
            for pin in re.findall('==([^ ;,]+)', pins[stack][name]):
                assert versions.contains(pin), name


# --------------------------------------------------------------- installed

INSTALLED = """
import importlib, pkgutil, random, runpy, sys
import mmoverlock
assert not {'torch', 'mmengine', 'mmcv', 'numpy'} & {*sys.modules}

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
before = state()  # also after reloading, which notebooks do
for module in pkgutil.walk_packages(mmoverlock.__path__, 'mmoverlock.'):
    if '.triton' not in module.name and module.name != 'mmoverlock.timm':
        loaded = importlib.reload(importlib.import_module(module.name))
        parent, _, name = module.name.rpartition('.')
        assert getattr(sys.modules[parent], name) is loaded, module.name
assert state() == before

name = 'mmoverlock::imagenet/overlock_xt_300e.py'
sys.argv = [mmoverlock.__file__, 'test', name, 'no.pth']
runpy.run_module('mmoverlock', run_name='__main__')
"""


def test_installed(run):
    """Configs and tools by name; importing is light, and changes nothing.

    No function hides the module of its name.

    How mmengine treats files, and what draws, is for the process to say.
    """
    tiny.need_openmmlab()
    out = run([sys.executable, '-c', INSTALLED]).stdout
    assert out.endswith('\ntest.py: checkpoint no.pth does not exist\n'), out


def test_list_of_tools(run):
    names = ', '.join(sorted(path.stem for path in ROOT.glob('tools/*.py')))
    for argv, status in (([], 0), (['--help'], 0), (['trian'], 2)):
        done = run([sys.executable, '-m', 'mmoverlock', *argv])
        assert names in done.stdout and done.returncode == status


MIM = (  # and what it imports beside torch's requirements
    'openmim==0.3.9 pandas==2.2.3 python-dateutil pytz setuptools<82 six '
    'certifi charset-normalizer idna requests urllib3 click colorama markdown '
    'model-index ordered-set pyyaml rich tabulate'
)


@pytest.mark.slow  # downloads some 60 MB
def test_mim(run):
    """It finds configs and runs tools, which say what is missing."""
    pip = '-m', 'pip', 'install', '-q', '--no-deps', '--target', '.'
    done = run([sys.executable, *pip, '--no-build-isolation', *MIM.split()])
    if done.returncode:
        pytest.skip(f'mim does not install: {done.stdout}')

    def mim(*command):
        return '\n' + run([sys.executable, '-m', 'mim', *command]).stdout

    out = mim('search', 'mmoverlock', '--model', 'upernet')
    assert 'config id: upernet_overlock_xt_160k' in out
    name = 'mmoverlock::imagenet/overlock_xt_300e.py'
    out = mim('run', 'mmoverlock', 'get_flops', name)
    assert 'without auxiliary head     16.97 M' in out
    config = 'overlock_xt_160k.py'
    for tool, *more in ('train',), ('test', '--checkpoint', 'no.pth'):
        out = mim(tool, 'mmoverlock', config, *more, '--gpus', '0')
        assert f'\n{tool}.py: ' in out


# ----------------------------------------------------------------- by name


def test_no_such_config(mistake):
    said = mistake('get_flops', 'mmoverlock::mask_rcnn/x.py')
    assert re.search("no config 'mask_rcnn/x.py', but .*dino", said)


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


def test_docstrings_and_annotations():
    """All but kernels are annotated; docstrings begin with their subject."""
    for path in (ROOT / 'mmoverlock').rglob('*.py'):
        text = path.read_text()
        assert '"""What' not in text, path
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            if 'jit' in ' '.join(map(ast.unparse, node.decorator_list)):
                continue
            where = f'{path}:{node.lineno}'
            args = [*node.args.args, *node.args.kwonlyargs]
            bare = {arg.arg for arg in args if not arg.annotation}
            assert bare <= {'self', 'cls'}, where
            assert node.returns or node.name == '__init__', where
