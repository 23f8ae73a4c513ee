"""Rows for tests of benchmarks/gpu.py, whose processes import this alone."""

import os
import subprocess
import time
from pathlib import Path


def value(number):
    return dict(ms=number, process=os.getpid())


def fail():
    raise ValueError('it fails')


def need():
    import a_package_that_is_not_there  # noqa: F401


def crash():
    os._exit(3)


def hang(file=None):
    """Start a process that would go on; write its id."""
    process = subprocess.Popen(['sleep', '600'])
    if file:
        Path(file).write_text(str(process.pid))
    time.sleep(600)
