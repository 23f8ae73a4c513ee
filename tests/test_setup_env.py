"""The set-up script, without setting anything up."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import load_tool

ROOT = Path(__file__).parents[1]


def load():
    return load_tool.__wrapped__('setup_env', 'dev')


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module whose .venv is an empty folder."""
    monkeypatch.delenv('STACK', raising=False)
    module = load()
    monkeypatch.setattr(module, 'VENV', tmp_path)
    monkeypatch.setattr(module, 'PY', Path(sys.executable))
    return module


def test_pins_come_from_files(setup_env, tmp_path):
    pins = setup_env.read_pins(ROOT / 'requirements')
    assert pins['onedl']['torch'].startswith('torch==')
    assert pins['onedl']['onedl-mmcv'].startswith('onedl-mmcv==')
    assert {*setup_env.NEWEST_PYTHON, 'tests', 'timm'} == set(pins)
    for name in ('torch', 'torchvision', 'numpy'):
        one, other = (pins[s][name] for s in ('onedl', 'openmmlab'))
        assert one == other
    (tmp_path / 'a.txt').write_text('# note\none<2  # why\ntwo-x==1\n')
    assert setup_env.read_pins(tmp_path) == {
        'a': {'one': 'one<2', 'two-x': 'two-x==1'}
    }


def break_python(monkeypatch, module):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
    monkeypatch.setattr(platform, 'python_version', lambda: '3.9.18')


def break_venv(monkeypatch, module):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)


def break_headers(monkeypatch, module):
    monkeypatch.setattr(module.sysconfig, 'get_path', lambda name: '/none')


def break_compiler(monkeypatch, module):
    monkeypatch.setattr(module, 'CXX', 'no-such-c++')


@pytest.mark.parametrize(
    'damage, package',
    [
        (break_python, '3.9.18, .* 3.10 to 3.13.*PYTHON='),
        (break_venv, 'Debian: python3-venv; conda: python'),
        (break_headers, 'Debian: python3-dev; conda: python'),
        (break_compiler, r'Debian: g\+\+; conda: cxx-compiler'),
    ],
)
def test_unfit_host_is_told_what_to_install(
    setup_env, monkeypatch, damage, package
):
    setup_env.check_host()
    damage(monkeypatch, setup_env)
    with pytest.raises(setup_env.SetupError, match=package):
        setup_env.check_host()


@pytest.mark.parametrize(
    'stack, words',
    [
        ('openmmlab', "no C++ compiler 'no-such-c++'"),
        ('mmcv', "no stack 'mmcv': STACK is one of onedl, openmmlab."),
    ],
)
def test_unfit_host_ends_with_one_paragraph(tmp_path, stack, words):
    shutil.copytree(ROOT / 'dev', tmp_path / 'dev')
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    done = subprocess.run(
        [sys.executable, tmp_path / 'dev' / 'setup_env.py'],
        env={**os.environ, 'CXX': 'no-such-c++', 'STACK': stack},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count('\n') == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        'dev',
        'requirements',
    }


def test_stacks_have_environments_of_their_own(monkeypatch):
    monkeypatch.setenv('STACK', 'openmmlab')
    assert load().VENV == ROOT / '.venv-openmmlab'
    monkeypatch.setattr(sys, 'version_info', (3, 12, 1))
    monkeypatch.setattr(platform, 'python_version', lambda: '3.12.1')
    with pytest.raises(Exception, match='3.12.1, .* openmmlab .* to 3.11'):
        load().check_host()
    monkeypatch.delenv('STACK')
    assert load().VENV == ROOT / '.venv'


@pytest.mark.parametrize('stack', ['', 'openmmlab'])
def test_make_uses_the_environment_of_the_stack(stack):
    command = ['make', '-n', 'test', 'clean', f'STACK={stack}']
    output = subprocess.check_output(command, cwd=ROOT, text=True)
    found = set(re.findall(r'\.venv[\w-]*', output))
    assert found == {'.venv-openmmlab' if stack == 'openmmlab' else '.venv'}


def test_stamp_depends_on_pins_and_on_an_explicit_python(
    setup_env, tmp_path, monkeypatch
):
    monkeypatch.delenv('PYTHON', raising=False)
    stamp = tmp_path / 'complete'
    assert not setup_env.is_current(stamp, 'pins')
    stamp.write_text('pins 3.10.0')
    assert setup_env.is_current(stamp, 'pins')
    assert not setup_env.is_current(stamp, 'other')
    monkeypatch.setenv('PYTHON', 'python3')
    assert not setup_env.is_current(stamp, 'pins')
    stamp.write_text(f'pins {platform.python_version()}')
    assert setup_env.is_current(stamp, 'pins')
    monkeypatch.setattr(setup_env, 'PY', tmp_path / 'gone')
    assert not setup_env.is_current(stamp, 'pins')


def test_failed_command_shows_the_end_of_its_log(setup_env):
    code = 'for i in range(99): print("line", i)\nraise SystemExit(1)'
    with pytest.raises(setup_env.SetupError, match='step.log') as error:
        setup_env.run('step', sys.executable, '-c', code)
    lines = str(error.value).splitlines()
    assert lines[:20] == [f'line {i}' for i in range(79, 99)]


def test_failed_job_waits_for_the_others(setup_env):
    def fail():
        raise setup_env.SetupError('broken')

    done = []
    with pytest.raises(setup_env.SetupError, match='broken'):
        setup_env.follow({'bad': fail, 'good': lambda: done.append(1)})
    assert done


@pytest.mark.parametrize('nvcc', [True, False])
def test_gpu_without_nvcc_is_hidden(
    setup_env, tmp_path, monkeypatch, capsys, nvcc
):
    build = ['cpython-312', '2.13.0', '13.0', None, [9, 0]]
    output = json.dumps([build, ['include']])
    monkeypatch.setattr(setup_env, 'python', lambda code: (output, ''))
    monkeypatch.setattr(setup_env, 'has_nvcc', lambda *args: nvcc)
    assert setup_env.inspect_torch() == (build, ['include'], not nvcc)
    assert (tmp_path / 'cpu-only').exists() == (not nvcc)
    assert ('no nvcc of CUDA 13.0' in capsys.readouterr().out) == (not nvcc)


def test_nvcc_has_to_be_of_the_cuda_release_of_torch(setup_env, tmp_path):
    nvcc = tmp_path / 'bin' / 'nvcc'
    assert not setup_env.has_nvcc('13.0', None)
    assert not setup_env.has_nvcc('13.0', str(tmp_path))
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "tools, release 13.1, V13.1.80"\n')
    nvcc.chmod(0o755)
    assert setup_env.has_nvcc('13.0', str(tmp_path))
    assert not setup_env.has_nvcc('12.8', str(tmp_path))


def test_torchvision_shim_declares_operators_first(tmp_path):
    """Tried on stand-ins for torch and torchvision."""
    shutil.copy(ROOT / 'dev' / 'torchvision_shim.py', tmp_path)
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text('defined = {}')
    (tmp_path / 'torch' / 'library.py').write_text(
        'import torch\ndefine = torch.defined.__setitem__'
    )
    (tmp_path / 'torchvision.py').write_text(
        'import torch\nprint(sorted(torch.defined))\n'
    )
    code = (
        'import sys, torchvision_shim\nprint("torch" in sys.modules)\n'
        'import torchvision'
    )
    output = subprocess.check_output(
        [sys.executable, '-S', '-c', code], cwd=tmp_path, text=True
    )
    assert output.splitlines() == [
        'False',
        "['torchvision::nms', 'torchvision::qnms']",
    ]
