"""Launching kernels with little of the host's time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .environment import recorder

MAX_KEPT = 2**12  # of a kernel


class Kernel(JITFunction):
    """A kernel that keeps what it was compiled to, by its arguments.

    Triton asks every argument what it would compile for: dtype, alignment,
    divisors of numbers. Dtypes, alignment and the numbers themselves take a
    fifth of the time, and say no less.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return partial(self.launch, (*grid, 1, 1)[:3])

    def launch(self, grid: tuple[int, ...], *args, **kwargs) -> None:
        """Launch the kernel on the device of its first argument.

        Triton compiles it if it has not been.
        """
        key = [*kwargs, *kwargs.values()]
        alignment = _describe(args, key) & 15
        if alignment:  # which is rare, so it may take time
            alignment = tuple(alignments(args))
        device = _first(args).get_device()
        key = (device, alignment, *key)
        kept = self.kept.get(key)
        if kept is None:
            with torch.cuda.device(device):
                kept = self._compile(key, grid, args, kwargs)
        else:
            compiled, constants = kept
            active = driver.active
            if device == active.get_current_device():
                stream = active.get_current_stream(device)
                compiled[grid](*args, *constants, stream=stream)
            else:
                with torch.cuda.device(device):
                    compiled[grid](*args, *constants)
        if recorder() is not None:
            compiled, constants = kept
            run = None if compiled is None else compiled[grid]
            recorder().launch(run, (*args, *constants))

    def _compile(
        self,
        key: tuple,
        grid: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[Any, list]:
        """Launch the kernel by Triton, and keep what it was compiled to."""
        compiled = self.run(*args, grid=grid, warmup=False, **kwargs)
        names = self.arg_names[len(args) :]
        kept = compiled, [kwargs[name] for name in names]
        if compiled is not None:
            if len(self.kept) == MAX_KEPT:
                self.kept.clear()
            self.kept[key] = kept
        return kept


if triton.knobs.runtime.interpret:
    from triton.runtime.interpreter import InterpretedFunction  # needs NumPy

    class Interpreted(InterpretedFunction):
        """A kernel that Triton interprets."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            return partial(self.launch, grid)

        def launch(self, grid: tuple[int, ...], *args, **kwargs) -> None:
            def run(*args, stream: None = None) -> None:
                with _disable_current_modes():  # it calls PyTorch itself
                    self.run(*args, grid=grid, warmup=False, **kwargs)

            run(*args)
            if recorder() is not None:
                recorder().launch(run, args)


def _first(args: tuple) -> Tensor:
    """The first tensor among arguments, which comes first in each."""
    while isinstance(args, tuple):
        args = args[0]
    return args


def _describe(args: tuple, key: list) -> int:
    """Add arguments to a key; the bits of all addresses."""
    bits = 0
    for arg in args:
        kind = type(arg)
        if kind is int:
            pass
        elif isinstance(arg, Tensor):
            bits |= arg.data_ptr()
            arg = arg.dtype
        elif kind is tuple:
            bits |= _describe(arg, key)
            arg = len(arg)
        elif kind is float:
            arg = float
        key.append(arg)
    return bits


def alignments(args: Sequence) -> Iterator[int]:
    """Of the address of every tensor among arguments."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg.data_ptr() & 15
        elif type(arg) is tuple:
            yield from alignments(arg)


def odd(numbers: Iterable[int]) -> tuple[int, ...]:
    """Numbers n as 2 n + 1, for a tuple that a kernel takes.

    Triton compiles a kernel anew for a 1 in a tuple, and for what 16 divides.
    """
    return tuple(2 * n + 1 for n in numbers)


def jit(function: Callable | None = None, **options) -> Callable:
    """``triton.jit``, for kernels that are launched often."""
    if function is None:
        return partial(jit, **options)
    if triton.knobs.runtime.interpret:
        return Interpreted(function, **options)
    return Kernel(function, **options)


@contextmanager
def on_device(index: int) -> Iterator[int | None]:
    """Make a device the current one, for launches on its stream.

    Yields:
        int | None: The stream; None where Triton interprets.
    """
    if triton.knobs.runtime.interpret:
        yield None
        return
    active = driver.active
    with ExitStack() as stack:
        if index != active.get_current_device():
            stack.enter_context(torch.cuda.device(index))
        yield active.get_current_stream(index)
