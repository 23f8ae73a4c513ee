"""The set-up script, without setting anything up."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, load_tool


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module whose .venv is an empty folder."""
    monkeypatch.delenv('PYTHON', raising=False)
    module = load_tool('setup_env', 'dev')
    monkeypatch.setattr(module, 'VENV', tmp_path)
    monkeypatch.setattr(module, 'PY', Path(sys.executable))
    return module


@pytest.mark.parametrize(
    'stack, version, words',
    [
        ('mmcv', (3, 11), "no stack 'mmcv': STACK is one of onedl, openmml"),
        ('openmmlab', (3, 12), 'the stack openmmlab needs 3.10 to 3.11'),
        ('onedl', (3, 12), r"no C\+\+ compiler 'no-such-c\+\+'"),
    ],
)
def test_unfit_host(setup_env, tmp_path, monkeypatch, stack, version, words):
    """One paragraph says why, and nothing is set up."""
    monkeypatch.setattr(setup_env, 'STACK', stack)
    monkeypatch.setattr(setup_env, 'CXX', 'no-such-c++')
    monkeypatch.setattr(sys, 'version_info', version)
    with pytest.raises(setup_env.SetupError, match=words) as error:
        setup_env.main()
    assert '\n' not in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    'stack, folder', [('', '.venv'), ('openmmlab', '.venv-openmmlab')]
)
def test_stacks_have_environments_of_their_own(monkeypatch, stack, folder):
    monkeypatch.setenv('STACK', stack)
    assert load_tool.__wrapped__('setup_env', 'dev').VENV == ROOT / folder
    command = ['make', '-n', 'test', 'clean', f'STACK={stack}']
    output = subprocess.check_output(command, cwd=ROOT, text=True)
    assert {*re.findall(r'\.venv[\w-]*', output)} == {folder}


def test_finished_environment_is_recognized(setup_env, tmp_path, monkeypatch):
    """By its pins and, where one is named, its interpreter."""
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


@pytest.mark.parametrize('fits', [True, False])
def test_gpu_without_nvcc_is_hidden(setup_env, tmp_path, monkeypatch, fits):
    """It has to be of the CUDA release of torch."""
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "tools, release 13.1, V13.1.80"\n')
    nvcc.chmod(0o755)
    cuda = '13.0' if fits else '12.8'
    build = ['cpython-312', '2.13.0', cuda, str(tmp_path), [9, 0]]
    answer = json.dumps([build, []]), ''
    monkeypatch.setattr(setup_env, 'python', {setup_env.PROBE: answer}.get)
    assert setup_env.inspect_torch() == (build, [], not fits)
    assert (tmp_path / 'cpu-only').exists() == (not fits)
    for home in None, str(nvcc):
        assert not setup_env.has_nvcc('13.0', home)
