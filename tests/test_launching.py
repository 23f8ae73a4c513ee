"""What is kept of launches, with kernels that do nothing."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mmoverlock.ops.environment import recorded_by

launching = pytest.importorskip('mmoverlock.ops.launching')


class Compiled(list):
    """A compiled kernel, and what it is launched with."""

    def __getitem__(self, grid):
        return lambda *args, stream=None: self.append((grid, args, stream))


def kernel(p_x, p_parts, count, eps, SIZE, FLAG):
    pass


@pytest.fixture
def compiled(monkeypatch):
    """The kernel; what Triton was asked for, and what came of it.

    The current device is that of the CPU, with stream 7.
    """
    asked = []
    driver = SimpleNamespace(
        get_current_device=lambda: -1, get_current_stream=lambda device: 7
    )
    active = SimpleNamespace(active=driver)
    monkeypatch.setattr(launching, 'driver', active)

    def run(self, *args, grid, warmup, **kwargs):
        asked.append((grid, args, kwargs, Compiled()))
        return asked[-1][-1]

    monkeypatch.setattr('triton.runtime.jit.JITFunction.run', run)
    return launching.Kernel(kernel), asked


def test_second_launch_does_without_triton(compiled):
    kernel, asked = compiled
    x, y = torch.ones(4), torch.zeros(4)
    constants = dict(FLAG=True, SIZE=4, num_warps=8)
    kernel[(2,)](x, (x, y), 3, 1e-5, **constants)
    ((grid, args, kwargs, later),) = asked
    assert (grid, kwargs) == ((2, 1, 1), constants)
    assert args[2:] == (3, 1e-5)
    kernel[5, 6](y, (y, x), 3, 0.5, **constants)
    assert len(asked) == 1
    ((grid, args, stream),) = later
    assert (grid, stream) == ((5, 6, 1), 7)
    assert args[0] is y
    assert args[1][1] is x
    assert args[2:] == (3, 0.5, 4, True)  # as the kernel lists them


@pytest.mark.parametrize(
    'changed',
    [
        dict(p_x=torch.ones(4).half()),
        dict(p_x=torch.ones(5)[1:]),  # not aligned
        dict(p_parts=(torch.ones(4), torch.ones(4).half())),
        dict(p_parts=(torch.ones(4), torch.ones(5)[1:])),
        dict(p_parts=(torch.ones(4),)),
        dict(p_parts=(torch.ones(4), None)),
        dict(count=16),
        dict(SIZE=8),
        dict(num_warps=8),
    ],
)
def test_what_is_compiled_again(compiled, changed):
    kernel, asked = compiled
    x = torch.ones(4)
    usual = dict(p_x=x, p_parts=(x, x), count=3, eps=0.1)
    constants = dict(SIZE=4, FLAG=False, num_warps=4)
    for arguments in ({}, changed, {}, changed):
        kwargs = usual | constants | arguments
        args = [kwargs.pop(name) for name in usual]
        kernel[(1,)](*args, **kwargs)
    assert len(asked) == 2


@pytest.fixture
def entered(monkeypatch):
    """Devices that were made the current one."""
    entered = []

    @contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, 'device', device)
    return entered


def test_devices(compiled, entered, monkeypatch):
    """Everything runs on the device of the tensors, whichever is current."""
    kernel, asked = compiled
    x = torch.ones(4)
    for index in (0, 1, 0, -1):
        monkeypatch.setattr(torch.Tensor, 'get_device', lambda _, i=index: i)
        kernel[(1,)]((x,), 1, 1, 0.1, SIZE=4, FLAG=False)
    assert len(asked) == 3
    assert entered == [0, 1, 0, -1]
    kernel[(1,)]((x,), 1, 1, 0.1, SIZE=4, FLAG=False)
    assert entered == [0, 1, 0, -1]
    assert [stream for *_, stream in asked[0][-1]] == [None]
    assert [stream for *_, stream in asked[2][-1]] == [7]


def test_limit(compiled, monkeypatch):
    kernel, asked = compiled
    monkeypatch.setattr(launching, 'MAX_KEPT', 3)
    x = torch.ones(4)
    for count in range(7):
        kernel[(1,)](x, (), count, 0.1, SIZE=4, FLAG=False)
        assert 0 < len(kernel.kept) <= 3
    assert len(asked) == 7


def test_what_a_recorder_is_told(compiled, monkeypatch):
    """A function that launches again, None where there is none."""
    kernel, asked = compiled
    recorder, x = mock.Mock(), torch.ones(4)
    with recorded_by(recorder):
        for _ in range(2):
            kernel[(2,)](x, (), 3, 0.5, SIZE=4, FLAG=True)
        run = 'triton.runtime.jit.JITFunction.run'
        monkeypatch.setattr(run, lambda *_, **__: None)
        kernel[(2,)](x, (), 4, 0.5, SIZE=4, FLAG=True)
    kernel[(2,)](x, (), 3, 0.5, SIZE=4, FLAG=True)
    calls = [call.args for call in recorder.launch.call_args_list]
    assert len(calls) == 3
    for run, args in calls[:2]:
        assert args[0] is x
        assert args[1:] == ((), 3, 0.5, 4, True)
        run(*args, stream=9)
        *_, last = asked[0][-1]
        assert last == ((2, 1, 1), args, 9)
    assert calls[2][0] is None


def test_device_of_a_tape(compiled, entered, monkeypatch):
    """It is made the current one where it is not; the stream is its own."""
    monkeypatch.setattr(launching.triton.knobs.runtime, 'interpret', False)
    for index in (-1, 3):
        with launching.on_device(index) as stream:
            assert stream == 7
    assert entered == [3]
