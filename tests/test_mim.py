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


def is_installed_from_a_clone():
    found = distributions(name='mmoverlock')
    urls = [d.read_text('direct_url.json') or '{}' for d in found]
    infos = [json.loads(url).get('dir_info', {}) for url in urls]
    return any(info.get('editable') for info in infos)


@pytest.mark.parametrize('pin', ['openmim==0.3.9', 'onedl-mim==0.5.1'])
def test_mim(pin, tmp_path):
    """It finds configs and runs tools, which say what is missing.

    The first one with the package from a wheel. The other one with it from a
    clone; it does not know configs by name.
    """
    folders = [tmp_path / 'shared', tmp_path / 'mim']
    for folder, pins in zip(folders, (SHARED, pin), strict=True):
        done = install(folder, *pins.split())
        if done.returncode:
            pytest.skip(f'{pins} does not install: {done.stderr}')
    if pin.startswith('openmim'):
        config = Path(CONFIG).name
        ignored = shutil.ignore_patterns('.[!m]*', 'build', '*egg-info')
        clone = tmp_path / 'clone'  # building leaves files behind
        shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored)
        done = install(folders[1], clone)
        assert done.returncode == 0, done.stderr
    else:
        config = str(ROOT / 'configs' / CONFIG)
        if not is_installed_from_a_clone():
            pytest.skip('mmoverlock is not installed from a clone')

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
        out = mim(tool, 'mmoverlock', config, *more, '--gpus', '0')
        assert f'\n{tool}.py: ' in f'\n{out}'
