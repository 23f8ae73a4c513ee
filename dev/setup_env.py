"""Sets up a stack pinned in requirements/, the tools of the tests, mmoverlock.

`make env` runs this. The default stack goes to .venv; with STACK=openmmlab in
the environment, the other one goes to .venv-openmmlab. A finished environment
is recognized at once, and an interrupted run goes on where it stopped; changed
pins start a new one.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STACK = os.environ.get('STACK') or 'onedl'
NEWEST_PYTHON = {'onedl': (3, 13), 'openmmlab': (3, 11)}
VENV = ROOT / ('.venv' if STACK == 'onedl' else f'.venv-{STACK}')
PY = VENV / 'bin' / 'python'
SHIM = ROOT / 'dev' / 'torchvision_shim.py'
CACHE = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'))

BUILD_TOOLS = 'ninja', 'packaging', 'psutil', 'setuptools>=77', 'wheel'
CXX = os.environ.get('CXX', 'c++')
CXX_FLAGS = '-O2', '-DNDEBUG', '-g0', '-w'

PROBE = """
import json, sys, torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths
python = sys.implementation.cache_tag
gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()
build = [python, torch.__version__, torch.version.cuda, CUDA_HOME, gpu]
flags = [f'-I{path}' for path in include_paths()]
if not torch.compiled_with_cxx11_abi():
    flags.append('-D_GLIBCXX_USE_CXX11_ABI=0')
print(json.dumps([build, flags]))
"""
CHECK = 'import mmengine, mmcv._ext, mmdet, mmseg, mmpretrain, mmoverlock'


class SetupError(Exception):
    """A problem, and what to do about it."""


def read_pins(folder):
    """Returns the requirements by name, of every file of a folder."""
    return {
        path.stem: {
            re.match(r'[\w-]+', line)[0]: line.split('#')[0].strip()
            for line in path.read_text().splitlines()
            if not line.startswith('#')
        }
        for path in sorted(folder.glob('*.txt'))
    }


def check_host():
    newest = NEWEST_PYTHON[STACK]
    if not (3, 10) <= sys.version_info[:2] <= newest:
        newest = '.'.join(map(str, newest))
        raise SetupError(
            f'This is Python {platform.python_version()}, and the stack '
            f'{STACK} needs 3.10 to {newest}. Install one (Debian: python3; '
            f'conda: python={newest}) and name it with PYTHON, as in '
            f'PYTHON=python{newest} make env.'
        )
    if not importlib.util.find_spec('ensurepip'):
        raise SetupError(
            f'{sys.executable} cannot create virtual environments: install '
            'its venv module (Debian: python3-venv; conda: python).'
        )
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        raise SetupError(
            f'{sys.executable} has no C headers, which the compiled ops of '
            'mmcv need: install them (Debian: python3-dev; conda: python).'
        )
    if not shutil.which(CXX):
        raise SetupError(
            f'There is no C++ compiler {CXX!r}, which the compiled ops of '
            'mmcv need: install one (Debian: g++; conda: cxx-compiler).'
        )


def is_current(stamp, digest):
    """Whether a stamp has these pins and the interpreter asked for, if any.

    So an interpreter chosen once with PYTHON stays until another is named.
    """
    if not (PY.exists() and stamp.exists()):
        return False
    pins, python = stamp.read_text().split()
    asked = 'PYTHON' in os.environ
    return pins == digest and (
        not asked or python == platform.python_version()
    )


def say(text, end='\n'):
    clear = '\r\033[K' if sys.stdout.isatty() else ''
    print(f'{clear}{text}', end=end, flush=True)


def clock(start):
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f'{minutes}:{seconds:02d}'


def run(log, *command, env=None):
    """Runs a command; its output goes to <log>.log in VENV."""
    path = VENV / f'{log}.log'
    with path.open('a') as out:
        code = subprocess.call(
            command, stdout=out, stderr=subprocess.STDOUT, env=env
        )
    if code:
        tail = [line[:200] for line in path.read_text().splitlines()[-20:]]
        raise SetupError(
            '\n'.join(tail) + '\n\nThe set-up failed; above is the end of '
            f'{path}. When the cause is mended, the same command goes on from '
            'here.'
        )


def pip(log, *args, env=None):
    run(log, PY, '-m', 'pip', *args, env=env)


def python(code):
    """Runs code in the environment; returns (output, last error line)."""
    done = subprocess.run([PY, '-c', code], capture_output=True, text=True)
    error = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return done.stdout, ''.join(error)


def compiled(log):
    """Returns (files done, files in all) by the last ninja line of a log."""
    steps = re.findall(r'^ *\[(\d+)/(\d+)\] ', log, re.MULTILINE)
    return tuple(map(int, steps[-1])) if steps else (0, 0)


def follow(jobs):
    """Runs jobs, a dict by title, side by side; shows how far they are."""
    start, shown, failure = time.monotonic(), 0, None
    log = VENV / 'mmcv.log'
    with ThreadPoolExecutor() as pool:
        running = {pool.submit(job): title for title, job in jobs.items()}
        while running:
            for job in wait(running, 0.5, FIRST_COMPLETED).done:
                title = running.pop(job)
                failure = failure or job.exception()
                if not job.exception():
                    say(f'  {clock(start)}  {title}')
            state = f'  {clock(start)}  {", ".join(running.values())} ...'
            done, total = compiled(log.read_text() if log.exists() else '')
            if 0 < done < total:
                state += f' {done} of {total} files, {100 * done // total} %'
            if running and sys.stdout.isatty():
                say(state, end='')
            elif running and done < total and done // 10 > shown:
                shown = done // 10
                say(state)
    if failure:
        raise failure


def has_nvcc(cuda, cuda_home):
    """Whether there is an nvcc of the CUDA release that torch is built for."""
    nvcc = Path(cuda_home or '', 'bin', 'nvcc')
    if not cuda_home or not nvcc.exists():
        return False
    text = subprocess.check_output([nvcc, '--version'], text=True)
    return f'release {cuda.split(".")[0]}.' in text


def inspect_torch():
    """Returns what mmcv is built for, torch's flags, and whether without CUDA.

    mmcv builds for CUDA where torch finds a GPU. Without an nvcc that fits,
    the file cpu-only tells the Makefile to hide the GPU.
    """
    output, error = python(PROBE)
    if error:
        raise SetupError(f'torch is installed but does not work: {error}')
    build, flags = json.loads(output)
    *_, cuda, cuda_home, gpu = build
    cpu_only = bool(gpu) and not has_nvcc(cuda, cuda_home)
    if cpu_only:
        (VENV / 'cpu-only').touch()
        say(
            f'WARNING: there is a GPU but no nvcc of CUDA {cuda}. The ops of '
            'mmcv are built without CUDA, and make runs everything on the '
            'CPU. To use the GPU, install the CUDA toolkit (conda: '
            f'cuda-toolkit), then run make clean env STACK={STACK}.'
        )
    return build, flags, cpu_only


def build_mmcv(pin, folder, flags, cpu_only):
    """Builds a wheel of mmcv with its ops in a folder.

    Without build isolation: with it, pip leaves the ops out. Most of the time
    would go into reading torch's headers again for every file; precompiled,
    they cost a third of it. The sources stay for the case of an interruption.
    """
    options = '--no-deps', '--no-build-isolation'
    source = folder / 'source'
    if not source.exists():
        shutil.rmtree(folder, ignore_errors=True)
        sdist, unpacked = folder / 'sdist', folder / 'unpacked'
        only = '--no-binary=:all:'
        pip('mmcv', 'download', *options, only, '-d', sdist, pin)
        shutil.unpack_archive(next(sdist.iterdir()), unpacked)
        next(unpacked.iterdir()).rename(source)

    header, precompiled = folder / 'torch.h', folder / 'torch.h.gch'
    if not precompiled.exists():
        header.write_text('#include <torch/types.h>\n')
        flags = *CXX_FLAGS, '-std=c++17', '-fPIC', *flags, '-x', 'c++-header'
        run('mmcv', CXX, *flags, header, '-o', folder / 'part')
        (folder / 'part').rename(precompiled)

    env = {'MAX_JOBS': str(len(os.sched_getaffinity(0))), **os.environ}
    flags = (
        env.get('CFLAGS', ''),
        *CXX_FLAGS,
        '-include',
        shlex.quote(str(header)),
    )
    env.update(CXX=CXX, CFLAGS=' '.join(flags))
    if cpu_only:
        env['CUDA_VISIBLE_DEVICES'] = ''
    pip('mmcv', 'wheel', '-v', *options, '-w', folder, source, env=env)


def install_mmoverlock(mmcv_wheel):
    options = '--no-build-isolation', '-e', ROOT
    pip('mmoverlock', 'install', mmcv_wheel, *options)
    if 'torchvision::nms does not exist' in python('import torchvision')[1]:
        packages = next(VENV.glob('lib/python*/site-packages'))
        shutil.copy(SHIM, packages)
        hook = packages / 'torchvision_shim.pth'
        hook.write_text('import torchvision_shim\n')
    error = python(CHECK)[1]
    if error:
        raise SetupError(
            f'The environment is installed but does not work: {error}. Remove '
            f'{CACHE / "mmoverlock"}, then run make clean env STACK={STACK}.'
        )


def main():
    if STACK not in NEWEST_PYTHON:
        raise SetupError(
            f'There is no stack {STACK!r}: STACK is one of '
            f'{", ".join(NEWEST_PYTHON)}.'
        )
    pins_of = read_pins(ROOT / 'requirements')
    inputs = ROOT, pins_of, Path(__file__).read_text(), SHIM.read_text()
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
    started, complete = VENV / 'started', VENV / 'complete'
    if is_current(complete, digest):
        return
    start = time.monotonic()
    say(f'Setting up {VENV} (logs: {VENV}/*.log)')
    if not is_current(started, digest):
        check_host()
        subprocess.check_call([sys.executable, '-m', 'venv', '--clear', VENV])
        started.write_text(f'{digest} {platform.python_version()}')
    for log in VENV.glob('*.log'):
        log.unlink()

    pins = pins_of[STACK]
    base = [pins.get(name, name) for name in ('torch', 'numpy', *BUILD_TOOLS)]
    follow({pins['torch']: lambda: pip('torch', 'install', *base)})
    build, flags, cpu_only = inspect_torch()

    mmcv = pins.pop('onedl-mmcv' if 'onedl-mmcv' in pins else 'mmcv')
    key = repr([mmcv, *build, cpu_only, *CXX_FLAGS]).encode()
    key = hashlib.sha256(key).hexdigest()[:16]
    folder, cache = VENV / f'mmcv-{key}', CACHE / 'mmoverlock' / key
    cached = any(cache.glob('*.whl'))
    # Side by side, because these packages replace nothing that the build of
    # mmcv uses: torch, numpy and the build tools are there as pinned.
    packages = {**pins_of['tests'], **pins}.values()
    jobs = {'packages': lambda: pip('packages', 'install', *packages)}
    # Apart: mmseg imports it where it finds it, which takes a second.
    timm = '--no-deps', '-t', VENV / 'timm', *pins_of['timm'].values()
    jobs['timm'] = lambda: pip('timm', 'install', *timm)
    if not cached:
        jobs[mmcv] = lambda: build_mmcv(mmcv, folder, flags, cpu_only)
    follow(jobs)

    wheel = next((cache if cached else folder).glob('*.whl'))
    follow({'mmoverlock, checks': lambda: install_mmoverlock(wheel)})
    if not cached:
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, cache / 'part')
            (cache / 'part').rename(cache / wheel.name)
        shutil.rmtree(folder)
    started.rename(complete)
    say(f'Done in {clock(start)}.')


if __name__ == '__main__':
    try:
        main()
    except SetupError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit('\nInterrupted; the same command goes on from here.')
