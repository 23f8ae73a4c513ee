"""The set-up script, without setting anything up."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, load_tool


def load():
    return load_tool.__wrapped__('setup_env', 'dev')


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module whose .venv is an empty folder."""
    monkeypatch.delenv('STACK', raising=False)
    monkeypatch.delenv('PYTHON', raising=False)
    module = load()
    monkeypatch.setattr(module, 'VENV', tmp_path)
    monkeypatch.setattr(module, 'PY', Path(sys.executable))
    return module


def test_unfit_host_ends_with_one_paragraph(tmp_path):
    folders = ['dev', 'requirements']
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / name)
    for stack, words in (
        ('openmmlab', "no C++ compiler 'no-such-c++'"),
        ('mmcv', "no stack 'mmcv': STACK is one of onedl, openmmlab."),
    ):
        done = subprocess.run(
            [sys.executable, tmp_path / 'dev' / 'setup_env.py'],
            env=os.environ | {'CXX': 'no-such-c++', 'STACK': stack},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert words in done.stderr and done.stderr.count('\n') == 1
        assert sorted(os.listdir(tmp_path)) == folders


def test_stacks_have_environments_of_their_own(monkeypatch):
    monkeypatch.setenv('STACK', 'openmmlab')
    assert load().VENV == ROOT / '.venv-openmmlab'
    monkeypatch.setattr(sys, 'version_info', (3, 12, 1))
    with pytest.raises(Exception, match='stack openmmlab needs .* to 3.11'):
        load().check_host()
    monkeypatch.delenv('STACK')
    assert load().VENV == ROOT / '.venv'
    for stack, folder in (('', '.venv'), ('openmmlab', '.venv-openmmlab')):
        command = ['make', '-n', 'test', 'clean', f'STACK={stack}']
        output = subprocess.check_output(command, cwd=ROOT, text=True)
        assert {*re.findall(r'\.venv[\w-]*', output)} == {folder}


def test_stamp_depends_on_pins_and_on_an_explicit_python(
    setup_env, tmp_path, monkeypatch
):
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


def test_gpu_without_nvcc_is_hidden(setup_env, tmp_path, monkeypatch, capsys):
    """It has to be of the CUDA release of torch."""
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "tools, release 13.1, V13.1.80"\n')
    nvcc.chmod(0o755)
    for cuda, home, fits in (
        ('13.0', str(tmp_path), True),
        ('12.8', str(tmp_path), False),
        ('13.0', str(nvcc), False),
        ('13.0', None, False),
    ):
        build = ['cpython-312', '2.13.0', cuda, home, [9, 0]]
        answer = json.dumps([build, ['include']]), ''
        monkeypatch.setattr(setup_env, 'python', {setup_env.PROBE: answer}.get)
        assert setup_env.inspect_torch() == (build, ['include'], not fits)
        assert (tmp_path / 'cpu-only').exists() == (not fits)
        warned = f'no nvcc of CUDA {cuda}' in capsys.readouterr().out
        assert warned == (not fits)
