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
        key = [*kwargs.items()]
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


def _describe(args: tuple, key: list) -> tuple[int, int]:
    """Add arguments to a key; all bits of addresses, and the device."""
    bits, device = 0, -1
    for arg in args:
        if isinstance(arg, Tensor):
            bits |= arg.data_ptr()
            device = arg.get_device()
            arg = arg.dtype
        elif isinstance(arg, tuple):
            more, other = _describe(arg, key)
            bits |= more
            device = max(device, other)
            arg = len(arg)
        elif isinstance(arg, float):
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
