"""The memory of tensors stays with the process, if nobody minds."""

import os
import subprocess
import sys

import pytest

from mmoverlock import cli

SIZE = 2**22  # bytes of each of the COUNT blocks that exist at a time
COUNT = 5
CODE = f"""
import ctypes, resource
from mmoverlock.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def step():
    blocks = [ctypes.c_void_p(libc.malloc({SIZE})) for _ in range({COUNT})]
    for block in blocks:
        libc.memset(block, 1, {SIZE})
    for block in blocks:
        libc.free(block)
def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
keep_freed_memory()
print(before, faults())
"""
PAGES = 10 * COUNT * SIZE // os.sysconf('SC_PAGE_SIZE')


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


def test_set_up(monkeypatch):
    """Tools want it so, before they treat files in their way."""
    called = []
    names = 'keep_freed_memory', 'load_safely', 'save_safely'
    for name in names:
        monkeypatch.setattr(cli, name, lambda name=name: called.append(name))
    cli.set_up()
    assert called == [*names]
