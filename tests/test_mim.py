"""openmim with the package from a wheel, as docs/usage.md says."""

import os
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

pytestmark = pytest.mark.slow  # downloads some 60 MB
SHARED = (  # what it imports beside torch's requirements
    'pandas==2.2.3 python-dateutil pytz setuptools<82 six certifi '
    'charset-normalizer idna requests urllib3 click colorama markdown '
    'model-index ordered-set pyyaml rich tabulate'
)


def install(folder, *requirements):
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps']
    return subprocess.run(
        [*command, '--no-build-isolation', '-t', folder, *requirements],
        capture_output=True,
        text=True,
    )


def test_mim(tmp_path):
    """It finds configs and runs tools, which say what is missing."""
    folders = [tmp_path / 'shared', tmp_path / 'mim']
    for folder, pins in zip(folders, (SHARED, 'openmim==0.3.9'), strict=True):
        done = install(folder, *pins.split())
        if done.returncode:
            pytest.skip(f'{pins} does not install: {done.stderr}')
    ignored = shutil.ignore_patterns('.[!m]*', 'build', '*egg-info')
    clone = tmp_path / 'clone'  # building leaves files behind
    shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored)
    done = install(folders[1], clone)
    assert done.returncode == 0, done.stderr

    def mim(*command):
        return subprocess.run(
            [sys.executable, '-m', 'mim', *command],
            env=os.environ | {'PYTHONPATH': ':'.join(map(str, folders))},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ).stdout

    out = mim('search', 'mmoverlock', '--model', 'upernet')
    for arch in 'xt', 't', 's', 'b':
        assert f'config id: upernet_overlock_{arch}_160k' in out
    name = 'mmoverlock::imagenet/overlock_xt_300e.py'
    out = mim('run', 'mmoverlock', 'get_flops', name)
    assert 'without auxiliary head     16.97 M' in out
    for tool, *more in ('train',), ('test', '--checkpoint', 'no.pth'):
        config = 'overlock_xt_160k.py'
        out = mim(tool, 'mmoverlock', config, *more, '--gpus', '0')
        assert f'\n{tool}.py: ' in f'\n{out}'
