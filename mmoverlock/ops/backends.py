"""Which form of an operator runs: one way to choose for all of them.

'auto' is Triton's kernels on a GPU that can run them and plain PyTorch
elsewhere; for tracing and exporting it is plain PyTorch on any device. A form
that is asked for by name runs or is an error.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .environment import check_triton, is_exporting

BACKENDS = ('auto', 'reference', 'triton')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = 8, 0


def check_backend(backend: str, backends: tuple = BACKENDS) -> None:
    """Raise an error if there is no such backend, or it is not installed.

    Args:
        backend (str): 'auto'; 'reference', plain PyTorch; or 'triton'.
        backends (tuple): Those of an operator. Defaults to these three.

    Raises:
        ValueError: If there is no such backend.
        ImportError: If it needs what is not installed.
    """
    if backend not in backends:
        raise ValueError(
            f'unknown backend {backend!r}, expected one of {list(backends)}'
        )
    if backend == 'triton':
        check_triton()


def takes_triton(backend: str, x: Tensor) -> bool:
    """Whether an operator on a map runs its kernels.

    Args:
        backend (str): See :func:`check_backend`; others are no kernels.
        x (Tensor): The map.

    Raises:
        ValueError: If 'triton' cannot take the map.
        ImportError: If 'triton' needs what is not installed.
    """
    if backend == 'triton':
        check_triton()
        if x.dtype not in DTYPES:
            raise ValueError(
                "backend 'triton' takes float32, float16 and bfloat16, "
                f'got {x.dtype}'
            )
    if backend != 'auto':
        return backend == 'triton'
    return (
        runs_triton(x.device)
        and x.dtype in DTYPES
        and not is_exporting()
        and not torch.jit.is_tracing()
    )


@torch.compiler.assume_constant_result  # tracing cannot ask a device
def runs_triton(device: torch.device) -> bool:
    """Whether 'auto' is 'triton' on a device."""
    return why_not_triton(device) is None


@lru_cache
def why_not_triton(device: torch.device) -> str | None:
    """Why 'auto' is plain PyTorch on a device, None if it is not."""
    if device.type != 'cuda':
        return f'kernels are for GPUs, not for {device.type}'
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f'kernels need capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]},'
            f' and {torch.cuda.get_device_name(device)} has '
            f'{capability[0]}.{capability[1]}'
        )
    try:
        check_triton()
        _launch(device)
    except Exception as error:  # no compiler, say, or an unknown card
        return f'kernels do not run here: {error}'
    return None


def _launch(device):
    """Compile and launch a small kernel."""
    from .partial_sums import add

    with _disable_current_modes():  # a compiler may be tracing
        parts = torch.ones(2, 1, 1, device=device)
        total = torch.empty(1, 1, device=device)
        add((parts, total))
        if total.item() != 2:
            raise RuntimeError(f'1 + 1 is {total.item()}')
