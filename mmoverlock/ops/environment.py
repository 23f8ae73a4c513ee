"""Facts that depend on the caller, and on installed packages."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

MIN_TRITON = 3, 6
_thread = threading.local()
any_size = False  # whether graphs that are traced now take maps of any size


def is_compiling() -> bool:
    """Whether torch.compile or torch.export trace the call."""
    return torch.compiler.is_compiling()


def is_traced() -> bool:
    """Whether torch.compile or a mode of dispatch sees every operator.

    A recorder of this project's is a mode that does not count.
    """
    if is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > (recorder() is not None)


def is_proxied() -> bool:
    """Whether make_fx makes a graph of the operators that it sees."""
    mode = torch._C._TorchDispatchModeKey.PROXY
    return torch._C._get_dispatch_mode(mode) is not None


def is_exporting() -> bool:
    """Whether torch.export traces the call.

    Versions of torch before 2.7 cannot tell; there, it is whether anything
    does.
    """
    return getattr(torch.compiler, 'is_exporting', is_compiling)()


def hides_sizes() -> bool:
    """Whether a graph is traced that must not depend on the size of a map."""
    return any_size and is_compiling() and not is_exporting()


def apply(function: type[torch.autograd.Function], *args) -> Any:
    """Apply a function; within torch.jit.trace, its forward pass alone.

    A trace can neither have such functions in a model nor be saved with them.
    """
    if not torch.jit.is_tracing():
        return function.apply(*args)
    with torch.no_grad():
        context = SimpleNamespace(save_for_backward=lambda *tensors: None)
        return function.forward(context, *args)


def check_triton() -> None:
    """Check that Triton is there.

    Raises:
        ImportError: If it is not, or too old.
    """
    needs = (
        "the backend 'triton' needs triton "
        f'{".".join(map(str, MIN_TRITON))} or later, as torch 2.11 and later '
        'for CUDA bring along'
    )
    try:
        import triton
    except ImportError as error:
        raise ImportError(f'{needs}; it cannot be imported') from error
    version = tuple(map(int, triton.__version__.split('.')[:2]))
    if version < MIN_TRITON:
        raise ImportError(
            f'{needs}; this is triton {triton.__version__} '
            f'with torch {torch.__version__}'
        )


def recorder() -> Any:
    """The recorder of this thread's launches, None if there is none.

    It has a method ``launch`` for a function, which takes a stream by name,
    and the other arguments; see :mod:`mmoverlock.ops.tape`.
    """
    return getattr(_thread, 'recorder', None)


@contextmanager
def recorded_by(recorder: Any) -> Iterator[None]:
    """Have a recorder told about all launches of this thread."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None
