"""Both mims, as far as docs/usage.md says that they go."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from tiny import ROOT

pytestmark = pytest.mark.slow  # downloads some 60 MB
CONFIG = 'upernet/overlock_xt_160k.py'
OPENMIM, ONEDL = 'openmim==0.3.9', 'onedl-mim==0.5.1'
SHARED = (  # what both import beside torch's requirements
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


@pytest.fixture
def mim(request, tmp_path):
    """Runs a command of a mim; returns its output."""
    folders = [tmp_path / 'shared', tmp_path / 'mim']
    for folder, pins in zip(folders, (SHARED, request.param), strict=True):
        done = install(folder, *pins.split())
        if done.returncode:
            pytest.skip(f'{pins} does not install: {done.stderr}')
    env = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, folders))}

    def run(*command):
        return subprocess.run(
            [sys.executable, '-m', 'mim', *command],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ).stdout

    return run


def check(mim, config):
    """It finds configs and runs tools, which say what is missing."""
    out = mim('search', 'mmoverlock', '--model', 'upernet')
    for arch in 'xt', 't', 's', 'b':
        assert f'config id: upernet_overlock_{arch}_160k' in out
    name = 'mmoverlock::imagenet/overlock_xt_300e.py'
    out = mim('run', 'mmoverlock', 'get_flops', name)
    assert 'without auxiliary head     16.97 M' in out
    gpus = '--gpus', '0'
    out = mim('train', 'mmoverlock', config, *gpus)
    assert '\ntrain.py: ' in f'\n{out}'
    weights = '--checkpoint', 'no.pth'
    out = mim('test', 'mmoverlock', config, *weights, *gpus)
    assert '\ntest.py: ' in f'\n{out}'


@pytest.mark.parametrize('mim', [OPENMIM], indirect=True)
def test_openmim(mim, tmp_path):
    """With the package from a wheel."""
    ignored = shutil.ignore_patterns('.[!m]*', 'build', '*egg-info')
    clone = tmp_path / 'clone'  # building leaves files behind
    shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored)
    done = install(tmp_path / 'mim', clone)
    assert done.returncode == 0, done.stderr
    check(mim, Path(CONFIG).name)


@pytest.mark.parametrize('mim', [ONEDL], indirect=True)
def test_onedl_mim(mim):
    """With the package from a clone; it does not know configs by name."""
    found = distributions(name='mmoverlock')
    urls = [d.read_text('direct_url.json') or '{}' for d in found]
    infos = [json.loads(url).get('dir_info', {}) for url in urls]
    if not any(info.get('editable') for info in infos):
        pytest.skip('mmoverlock is not installed from a clone')
    check(mim, str(ROOT / 'configs' / CONFIG))
