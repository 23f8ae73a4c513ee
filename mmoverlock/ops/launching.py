"""Launching kernels with little of the host's time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

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
        grid = (*grid, 1, 1)[:3]
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def launch(
        self, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Launch the kernel, compiled by Triton if it has not been."""
        key = [*kwargs, *kwargs.values()]
        bits, device = _describe(args, key)
        key = (device, bits & 15, *key)
        kept = self.kept.get(key)
        if kept is not None:
            compiled, constants = kept
            compiled[grid](*args, *constants)
            return
        compiled = self.run(*args, grid=grid, warmup=False, **kwargs)
        if compiled is not None:
            names = self.arg_names[len(args) :]
            if len(self.kept) == MAX_KEPT:
                self.kept.clear()
            self.kept[key] = compiled, [kwargs[name] for name in names]


def _describe(args: tuple, key: list) -> tuple[int, int | None]:
    """Add arguments to a key; all bits of addresses, and the device."""
    bits, device = 0, None
    for arg in args:
        kind = type(arg)
        if kind is int:
            pass
        elif isinstance(arg, Tensor):
            bits |= arg.data_ptr()
            if device is None:
                device = arg.get_device()
            arg = arg.dtype
        elif kind is tuple:
            more, other = _describe(arg, key)
            bits |= more
            if device is None:
                device = other
            arg = len(arg)
        elif kind is float:
            arg = float
        key.append(arg)
    return bits, device


def jit(function: Callable | None = None, **options) -> Callable:
    """``triton.jit``, for kernels that are launched often."""
    if function is None:
        return partial(jit, **options)
    if triton.knobs.runtime.interpret:
        return triton.jit(function, **options)
    return Kernel(function, **options)
