"""Choosing the form of an operator that runs, in one way for all.

'auto' is Triton's kernels on a GPU that can run them and plain PyTorch
elsewhere; for tracing and exporting it is plain PyTorch on any device. A form
that is asked for by name runs or is an error.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .environment import check_triton, is_exporting, is_traced

BACKENDS = ('auto', 'reference', 'triton')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = 8, 0
_runs = {}  # by kernels and what decides how they are compiled
_warned = set()  # kernels


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


def takes_triton(
    backend: str, x: Tensor, kernels: Callable | None = None, *operands
) -> bool:
    """Whether an operator on a map runs its kernels.

    Args:
        backend (str): See :func:`check_backend`; others are no kernels.
        x (Tensor): The map.
        kernels (callable, optional): What would run. For 'auto' it is tried,
            see :func:`run_here`. Defaults to None: what it takes is known to
            run, or will be tried where it is called.
        operands: Of the kernels.

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
        and (kernels is None or run_here(kernels, *operands))
    )


def run(
    backend: str, reference: Callable, kernels: Callable, x: Tensor, *operands
) -> Tensor | tuple[Tensor, ...]:
    """Run an operator's kernels where they can run, or else its definition.

    Args:
        backend (str): See :func:`check_backend`.
        reference (callable): Plain PyTorch, of the map and the operands.
        kernels (callable): The same; Triton is imported with the first call.
        x (Tensor): The map.
        operands: The others.

    Raises:
        ValueError: If there is no such backend, or 'triton' cannot take the
            map.
        ImportError: If it needs what is not installed.
    """
    check_backend(backend)
    takes_kernels = takes_triton(backend, x, kernels, x, *operands)
    return (kernels if takes_kernels else reference)(x, *operands)


@torch.compiler.assume_constant_result  # tracing cannot ask a device
def runs_triton(device: torch.device) -> bool:
    """Whether 'auto' is 'triton' on a device."""
    return why_not_triton(device) is None


@lru_cache
def why_not_triton(device: torch.device) -> str | None:
    """The reason why 'auto' is plain PyTorch on a device, if it is."""
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


def _launch(device: torch.device) -> None:
    """Compile and launch a small kernel."""
    from .partial_sums import add

    with _disable_current_modes():  # a compiler may be tracing
        parts = torch.ones(2, 1, 1, device=device)
        total = torch.empty(1, 1, device=device)
        add((parts, total))
        if total.item() != 2:
            raise RuntimeError(f'1 + 1 is {total.item()}')


def run_here(kernels: Callable, *operands) -> bool:
    """Whether kernels compile and fit on the card, both ways.

    They are tried once for all operands of such dtypes and channels, on
    copies: forward and, where there is a gradient, backward. What runs for
    one size of a map is taken to run for all, so that no image of a training
    is computed twice or goes another way; so is what cannot be tried, since
    it is traced or recorded, or empty.

    Args:
        kernels (callable): Of the operands, to a tensor or a tuple.
        operands: A tensor, then tensors, numbers, None, and tuples and lists
            of these.
    """
    if is_traced() or not operands[0].numel():
        return True
    key = (
        kernels,
        operands[0].device,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda'),
        *map(_describe, operands),
    )
    if key not in _runs:
        if torch.cuda.is_initialized() and (
            torch.cuda.is_current_stream_capturing()
        ):
            return True
        error = _try(kernels, operands)
        if error is not None and kernels not in _warned:
            _warned.add(kernels)
            name = kernels.__module__.removeprefix('mmoverlock.ops.')
            warnings.warn(
                f'kernels of {name} do not run here, plain PyTorch does: '
                f'{type(error).__name__}: {error}',
                RuntimeWarning,
                stacklevel=2,
            )
        _runs[key] = error is None
    return _runs[key]


def _describe(operand: object) -> object:
    """An operand without sizes of maps and batches; of several, the first."""
    if isinstance(operand, Tensor):
        shape = operand.shape
        if len(shape) == 4 and shape[1] > 1:
            shape = shape[1]
        elif len(shape) == 1 and not operand.requires_grad:
            shape = None  # it may be of images; channels are known anyway
        return operand.dtype, shape, operand.requires_grad
    if isinstance(operand, list):
        return len(operand), _describe(operand[0])
    if hasattr(operand, 'signature'):
        return operand.signature()
    if isinstance(operand, tuple):
        return tuple(map(_describe, operand))
    return operand


def _try(kernels: Callable, operands: tuple) -> Exception | None:
    """The error of kernels, or None."""

    def copy(operand: Tensor) -> Tensor:
        return operand.detach().clone().requires_grad_(operand.requires_grad)

    operands = tree_map_only(Tensor, copy, operands)
    # Checkpoints count what is saved for the backward pass; this is not.
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        try:
            out, inputs = (
                [
                    t
                    for t in tree_leaves(tree)
                    if isinstance(t, Tensor) and t.requires_grad
                ]
                for tree in (kernels(*operands), operands)
            )
            if out:
                grads = [*map(torch.zeros_like, out)]
                torch.autograd.grad(out, inputs, grads, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton, LLVM or an assembler
            return error
    return None
