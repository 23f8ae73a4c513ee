"""The form of an operator that runs where nothing else is asked for."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmoverlock.ops import backends, check_backend, takes_triton

pytest.importorskip('triton', '3.6')
GPU = torch.device('cuda', 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU that is not there, of capability 8.0."""
    cuda = SimpleNamespace(capability=(8, 0))
    monkeypatch.setattr(
        torch.cuda, 'get_device_capability', lambda device: cuda.capability
    )
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'GTX')
    monkeypatch.setattr(backends, '_launch', lambda device: None)
    backends.why_not_triton.cache_clear()
    yield cuda
    backends.why_not_triton.cache_clear()


def a_map(device=GPU, dtype=torch.bfloat16):
    return SimpleNamespace(device=device, dtype=dtype)


def test_gpu():
    assert backends.why_not_triton(GPU) is None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert takes_triton('auto', a_map(dtype=dtype))
        assert not takes_triton('reference', a_map(dtype=dtype))


def test_plain_elsewhere(gpu, monkeypatch):
    assert not takes_triton('auto', a_map(torch.device('cpu')))
    assert not takes_triton('auto', a_map(dtype=torch.float64))
    for name in (f'{backends.__name__}.is_exporting', 'torch.jit.is_tracing'):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda: True)
            assert not takes_triton('auto', a_map())
    gpu.capability = (7, 5)
    backends.why_not_triton.cache_clear()
    assert backends.why_not_triton(GPU) == (
        'kernels need capability 8.0, and GTX has 7.5'
    )
    assert not takes_triton('auto', a_map())


@pytest.mark.parametrize('broken', ['check_triton', '_launch'])
def test_kernels_that_do_not_run(broken, monkeypatch):
    """Whatever the reason is, it is told, and looked for once."""
    calls = []

    def fail(*args):
        calls.append(args)
        raise RuntimeError('Failed to find C compiler')

    monkeypatch.setattr(backends, broken, fail)
    for _ in range(2):
        assert not takes_triton('auto', a_map())
    assert backends.why_not_triton(GPU) == (
        'kernels do not run here: Failed to find C compiler'
    )
    assert len(calls) == 1


def test_launch(monkeypatch):
    """It runs, interpreted here; a kernel that computes nonsense is found."""
    monkeypatch.undo()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    backends._launch(torch.device(device))
    with FakeTensorMode():
        backends._launch(torch.device(device))
    monkeypatch.setattr(
        'mmoverlock.ops.partial_sums.add', lambda job: job[1].fill_(3)
    )
    with pytest.raises(RuntimeError, match='1 . 1 is 3'):
        backends._launch(torch.device(device))


def test_by_name(monkeypatch):
    with pytest.raises(ValueError, match="'triton' takes float32.*float64"):
        takes_triton('triton', a_map(dtype=torch.float64))
    with pytest.raises(ValueError, match="'cudnn'.*'auto', 'reference'"):
        check_backend('cudnn')
    monkeypatch.setattr('triton.__version__', '3.5.1')
    with pytest.raises(ImportError, match='this is triton 3.5.1 with torch'):
        check_backend('triton')
