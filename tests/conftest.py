"""What every test gets."""

import itertools
import os

import pytest
import torch
from mmengine.utils import ManagerMixin
from torch import Tensor

# Without a GPU, Triton's kernels run in its interpreter; it looks at this
# when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(autouse=True)
def fresh_instances():
    """Runners that start in the same second would share a logger.

    MMEngine keeps loggers and their kind by the name of the run, which ends
    in the second of its start.
    """
    yield
    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


def fill_new_memory(monkeypatch, fill):
    def filled(make):
        return lambda *args, **kwargs: fill(make(*args, **kwargs))

    makers = [(torch, 'empty'), (torch, 'empty_like')]
    for owner, name in [*makers, (torch.Tensor, 'new_empty')]:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote is NaN."""
    fill_new_memory(monkeypatch, lambda tensor: tensor.fill_(float('nan')))


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
