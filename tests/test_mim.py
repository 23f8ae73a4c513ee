"""Both mims, with the package from a wheel and from a clone.

How far each goes is on docs/usage.md; what goes no further is theirs.
"""

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


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Where mims and the package from a wheel are."""
    folder = tmp_path_factory.mktemp('mims')
    for pins in (SHARED, OPENMIM, ONEDL):
        done = install(folder / pins, *pins.split())
        if done.returncode:
            pytest.skip(f'{pins} does not install: {done.stderr}')
    clone = folder / 'clone'  # building leaves files behind
    ignored = shutil.ignore_patterns('.[!m]*', 'build', '*egg-info')
    shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored)
    done = install(folder / 'wheel', clone)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=['wheel', 'clone'])
def source(request):
    if request.param == 'clone':
        found = distributions(name='mmoverlock')
        urls = [d.read_text('direct_url.json') or '{}' for d in found]
        infos = [json.loads(url).get('dir_info', {}) for url in urls]
        if not any(info.get('editable') for info in infos):
            pytest.skip('mmoverlock is not installed from a clone')
    return request.param


@pytest.fixture
def mim(request, folders, source, tmp_path):
    """Runs a command of a mim; returns status and output."""
    path = [folders / 'wheel'] * (source == 'wheel')
    path += [folders / request.param, folders / SHARED]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, path))}

    def run(*command):
        done = subprocess.run(
            [sys.executable, '-m', 'mim', *command],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return run


def check_search_and_run(mim):
    status, out = mim('search', 'mmoverlock', '--model', 'upernet')
    assert status == 0, out
    for arch in 'xt', 't', 's', 'b':
        assert f'config id: upernet_overlock_{arch}_160k' in out
    config = 'mmoverlock::imagenet/overlock_xt_300e.py'
    status, out = mim('run', 'mmoverlock', 'get_flops', config)
    assert status == 0, out
    assert 'without auxiliary head     16.97 M' in out


def check_search_fails(mim, index):
    status, out = mim('search', 'mmoverlock')
    assert status and index in out


def starts(mim, config):
    """Whether both tools start, and say which data or weights are missing."""
    gpus = '--gpus', '0'
    _, train = mim('train', 'mmoverlock', config, *gpus)
    weights = '--checkpoint', 'no.pth'
    _, test = mim('test', 'mmoverlock', config, *weights, *gpus)
    said = '\ntrain.py: ' in f'\n{train}'
    assert said == ('\ntest.py: ' in f'\n{test}'), train + test
    return said


@pytest.mark.parametrize('mim', [OPENMIM], indirect=True)
def test_openmim(mim, source):
    if source == 'wheel':
        check_search_and_run(mim)
        assert starts(mim, Path(CONFIG).name)
    else:
        check_search_fails(mim, 'mmoverlock/model-index.yml')


@pytest.mark.parametrize('mim', [ONEDL], indirect=True)
def test_onedl_mim(mim, source):
    if source == 'clone':
        check_search_and_run(mim)
        assert starts(mim, str(ROOT / 'configs' / CONFIG))
        assert not starts(mim, Path(CONFIG).name)
    else:
        check_search_fails(mim, 'dist-info/model-index.yml')
