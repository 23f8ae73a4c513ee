"""Launches are kept and repeated, with kernels that do nothing."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mmoverlock.ops.environment import recorded_by

launching = pytest.importorskip('mmoverlock.ops.launching')
X = torch.ones(4)
ODD = torch.ones(5)[1:]  # not aligned


class Compiled(list):
    """A compiled kernel, and what it is launched with."""

    def __getitem__(self, grid):
        return lambda *args, stream=None: self.append((grid, args, stream))


def kernel(p_x, p_parts, count, eps, SIZE, FLAG):
    pass


@pytest.fixture
def asked(monkeypatch):
    """Requests to Triton, and their results.

    The current device is that of the CPU, with stream 7.
    """
    asked = []
    driver = SimpleNamespace(
        get_current_device=lambda: -1, get_current_stream=lambda device: 7
    )
    monkeypatch.setattr(launching, 'driver', SimpleNamespace(active=driver))

    def run(self, *args, grid, warmup, **kwargs):
        asked.append((grid, args, kwargs, Compiled()))
        return asked[-1][-1]

    monkeypatch.setattr('triton.runtime.jit.JITFunction.run', run)
    return asked


@pytest.fixture
def launch(asked):
    """Launches the kernel, with some arguments other than usual."""
    made = launching.Kernel(kernel)

    def launch(grid=(2,), **changed):
        usual = dict(p_x=X, p_parts=(X, X), count=3, eps=0.5)
        constants = dict(FLAG=True, SIZE=4, num_warps=8)
        kwargs = usual | constants | changed
        args = [kwargs.pop(name) for name in usual]
        made[grid](*args, **kwargs)
        return made

    return launch


def test_second_launch_does_without_triton(launch, asked):
    y = torch.zeros(4)
    launch()
    launch((5, 6), p_x=y, p_parts=(y, X), eps=0.1)
    ((grid, args, kwargs, later),) = asked
    assert (grid, kwargs) == ((2, 1, 1), dict(FLAG=True, SIZE=4, num_warps=8))
    assert args[2:] == (3, 0.5)
    ((grid, args, stream),) = later
    assert (grid, stream) == ((5, 6, 1), 7)
    assert args[0] is args[1][0] is y and args[1][1] is X
    assert args[2:] == (3, 0.1, 4, True)  # as the kernel lists them


@pytest.mark.parametrize(
    'changed',
    [
        dict(p_x=X.half()),
        dict(p_x=ODD),
        dict(p_parts=(X, X.half())),
        dict(p_parts=(X, ODD)),
        dict(p_parts=(X,)),
        dict(p_parts=(X, None)),
        dict(count=16),
        dict(SIZE=8),
        dict(num_warps=4),
    ],
)
def test_what_is_compiled_again(launch, asked, changed):
    """Where two are not aligned, it depends on which."""
    for arguments in ({}, dict(p_parts=(ODD, X)), changed) * 2:
        launch(**arguments)
    assert len(asked) == 3


def test_devices(launch, asked, monkeypatch):
    """Everything runs on the device of the tensors, whichever is current."""
    entered = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, 'device', entered)
    for index in (0, 1, 0, -1, -1):
        monkeypatch.setattr(torch.Tensor, 'get_device', lambda _, i=index: i)
        launch(p_x=(X,))
    # Compiling enters it anyway.
    assert entered.call_args_list == [*map(mock.call, (0, 1, 0, -1))]
    streams = [[stream for *_, stream in later] for *_, later in asked]
    assert streams == [[None], [], [7]]


def test_device_of_a_tape(asked, monkeypatch):
    """It is made the current one where it is not; the stream is its own."""
    entered = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, 'device', entered)
    monkeypatch.setattr(launching.triton.knobs.runtime, 'interpret', False)
    for index in (-1, 3):
        with launching.on_device(index) as stream:
            assert stream == 7
    entered.assert_called_once_with(3)


def test_limit(launch, asked, monkeypatch):
    monkeypatch.setattr(launching, 'MAX_KEPT', 3)
    for count in range(7):
        assert 0 < len(launch(count=count).kept) <= 3
    assert len(asked) == 7


def test_what_a_recorder_is_told(launch, asked, monkeypatch):
    """A function that launches again, None where there is none."""
    recorder = mock.Mock()
    with recorded_by(recorder):
        launch()
        launch()
        run = 'triton.runtime.jit.JITFunction.run'
        monkeypatch.setattr(run, lambda *_, **__: None)
        launch(count=4)
    launch()
    *calls, (none, _) = [each.args for each in recorder.launch.mock_calls]
    assert len(calls) == 2 and none is None
    for run, args in calls:
        assert args == (X, (X, X), 3, 0.5, 4, True)
        run(*args, stream=9)
        *_, last = asked[0][-1]
        assert last == ((2, 1, 1), args, 9)
