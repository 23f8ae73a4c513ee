"""Helpers of the tests of kernels.

Without a GPU, Triton's interpreter runs the kernels.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_map_only

from mmoverlock.ops.common import Operator

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NHWC = torch.channels_last
OPCHECKS = 'test_schema', 'test_autograd_registration', 'test_faketensor'


def draw(*shape, dtype=torch.float32):
    """Normal values; maps in channels_last."""
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return x.contiguous(memory_format=NHWC) if len(shape) == 4 else x


def exact(operands):
    """In double precision, of a tensor or any nest of them and others."""
    return tree_map_only(
        torch.Tensor,
        lambda t: t.detach().double().clone().requires_grad_(t.requires_grad),
        operands,
    )


def relative_error(actual, expected):
    """Norm of the difference, as a share of that of the expected value."""
    assert actual.shape == expected.shape
    difference = actual.double() - expected
    return (difference.norm() / expected.norm().clamp(min=1e-9)).item()


@contextmanager
def opchecked():
    """Operators of the project that are called are, for PyTorch, what runs.

    Yields:
        list: Those that were called, and with what.
    """
    calls = []
    call = Operator.__call__

    def record(operator, *args):
        calls.append((operator.run, args))
        return call(operator, *args)

    with patch.object(Operator, '__call__', record):
        yield calls
    for operator, args in calls:
        torch.library.opcheck(operator, args, test_utils=OPCHECKS)


def python(code, **env):
    """Run code with the real compiler, without the interpreter."""
    env = {**os.environ, **env}
    env.pop('TRITON_INTERPRET', None)
    run = subprocess.run(
        [sys.executable, '-c', code],
        env=env,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
