"""What every test gets."""

import os

import pytest
import torch
from mmengine.utils import ManagerMixin

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
