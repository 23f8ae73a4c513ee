"""The memory of tensors stays with the process, if nobody minds."""

import os
import subprocess
import sys

import pytest

from mmoverlock import cli

SIZE = 2**22  # bytes of each of the five blocks that exist at a time
CODE = f"""
import resource
from mmoverlock.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [b'1' * {SIZE} for _ in range(5)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""
PAGES = 10 * 5 * SIZE // os.sysconf('SC_PAGE_SIZE')


@pytest.mark.parametrize('settings', [{}, {'MALLOC_ARENA_MAX': '4'}])
def test_page_faults(settings):
    """Fewer once it is called, unless the environment has settings."""
    own = 'MALLOC_', 'GLIBC_TUNABLES'
    environ = {k: os.environ[k] for k in os.environ if not k.startswith(own)}
    output = subprocess.check_output(
        [sys.executable, '-c', CODE], env=environ | settings
    )
    before, after = map(int, output.split())
    assert before > PAGES / 10
    assert (after < PAGES / 10) == (not settings)


def test_tools_want_it_so(monkeypatch):
    called = []
    monkeypatch.setattr(cli, 'keep_freed_memory', lambda: called.append(1))
    cli.set_up()
    assert called
