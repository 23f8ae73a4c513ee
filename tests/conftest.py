"""Fixtures of all tests, and the interpreter of kernels."""

import contextlib
import functools
import gc
import itertools
import os

import pytest
import tiny
import torch
from torch import Tensor, distributed

# Without a GPU, Triton's kernels run in its interpreter; it looks at this
# when it is imported. Every call of a function would change the language
# anew, and every sum of integers look for an overflow that is not told: half
# of its time.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
    with contextlib.suppress(ImportError, AttributeError):
        from triton.runtime import interpreter

        interpreter._LangPatchScope.restore = lambda scope: None
        interpreter._patch_lang = functools.cache(interpreter._patch_lang)
        semantic = interpreter.interpreter_semantic
        semantic.binary_op_sanitize_overflow_impl = lambda *args: None


@pytest.fixture(scope='module', autouse=True)
def frozen():
    """Garbage is not looked for in what is imported.

    MMEngine collects it, a third of a second long, for every dataset.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_instances():
    """Nothing that MMEngine keeps by a run's name outlasts a test."""
    yield
    tiny.forget_instances()


@pytest.fixture
def process_group(tmp_path):
    """This process is a group of its own."""
    store = distributed.FileStore(str(tmp_path / 'store'), 1)
    backend = 'nccl' if torch.cuda.is_available() else 'gloo'
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def mistake(tmp_path, monkeypatch):
    """Runs a tool where it must fail; returns the line that says why.

    Above it, mmengine logs what it builds.
    """
    cwd = tmp_path / 'cwd'
    cwd.mkdir()
    monkeypatch.chdir(cwd)

    def fail(name, *argv):
        output = tiny.run_tool(name, *argv, status=2)
        *_, last = output.splitlines()
        assert last.startswith(f'{name}.py: ') and 'Traceback' not in output
        assert 'Epoch(train)' not in output and not any(cwd.iterdir())
        return last

    return fail


def fill_new_memory(monkeypatch, fill):
    def filled(make):
        return lambda *args, **kwargs: fill(make(*args, **kwargs))

    makers = [(torch, 'empty'), (torch, 'empty_like')]
    for owner, name in [*makers, (torch.Tensor, 'new_empty')]:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote is NaN, or a large number."""

    def fill(tensor):
        return tensor.fill_(
            float('nan') if tensor.is_floating_point() else 2**30
        )

    fill_new_memory(monkeypatch, fill)


@pytest.fixture
def never_the_same(monkeypatch):
    """Memory that nobody wrote differs from call to call."""
    count = itertools.count()

    def fill(tensor):
        # Operators run on subclasses as well, while they are traced.
        return tensor.fill_(next(count)) if type(tensor) is Tensor else tensor

    fill_new_memory(monkeypatch, fill)


@pytest.fixture
def auto_is_triton(monkeypatch):
    """'auto' takes the kernels here, as it does on a GPU, untried."""
    backends = 'mmoverlock.ops.backends'
    monkeypatch.setattr(f'{backends}.why_not_triton', lambda device: None)
    monkeypatch.setattr(f'{backends}._try', lambda *args: None)
    monkeypatch.setattr(f'{backends}._runs', {})
