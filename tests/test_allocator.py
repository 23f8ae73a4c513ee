"""The memory of tensors stays with the process, if nobody minds."""

import os
import subprocess
import sys

import pytest

from mmoverlock import cli

SIZE = 2**24  # bytes of each of the COUNT blocks that exist at a time
COUNT = 5
CODE = f"""
import ctypes, resource
SETTING
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def step():
    blocks = [ctypes.c_void_p(libc.malloc({SIZE})) for _ in range({COUNT})]
    for block in blocks:
        libc.memset(block, 1, {SIZE})
    for block in blocks:
        libc.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""
CALL = 'from mmoverlock.allocator import keep_freed_memory as f; f()'
PAGES = 10 * COUNT * SIZE // os.sysconf('SC_PAGE_SIZE')


@pytest.mark.parametrize(
    ('setting', 'variable', 'kept'),
    [
        (CALL, None, True),
        ('import mmoverlock.allocator', None, False),
        (CALL, 'MALLOC_ARENA_MAX', False),
    ],
)
def test_page_faults(setting, variable, kept):
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))
    }
    if variable:
        environ[variable] = '4'
    code = CODE.replace('SETTING', setting)
    output = subprocess.check_output([sys.executable, '-c', code], env=environ)
    assert (int(output) < PAGES / 10) == kept


def test_set_up(monkeypatch):
    """Tools want it so, before they treat files in their way."""
    called = []
    names = 'keep_freed_memory', 'load_safely', 'save_safely'
    for name in names:
        monkeypatch.setattr(cli, name, lambda name=name: called.append(name))
    cli.set_up()
    assert called == [*names]
