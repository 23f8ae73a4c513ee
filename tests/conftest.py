"""What every test gets."""

import os

import pytest
import torch
from mmengine.utils import ManagerMixin

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


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote is NaN."""
    for name in ('empty_like', 'empty'):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            return make(*args, **kwargs).fill_(float('nan'))

        monkeypatch.setattr(torch, name, poisoned)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        'new_empty',
        lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(float('nan')),
    )


@pytest.fixture
def auto_is_triton(monkeypatch):
    """'auto' takes the kernels here, as it does on a GPU."""
    monkeypatch.setattr(
        'mmoverlock.ops.backends.why_not_triton', lambda device: None
    )
