"""What operators on maps have in common."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor


def cdiv(number: int, divisor: int) -> int:
    """Quotient, rounded up; Triton's own is slow outside of kernels."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest that is no smaller."""
    return 1 << (number - 1).bit_length()


def cast_as_convolutions(x: Tensor) -> Tensor:
    """What autocast does before a convolution, if it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def channels_last(x: Tensor) -> Tensor:
    """The map with its channels next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def custom_op(
    name: str, mutates_args: Iterable[str] = (), differentiable: bool = True
) -> 'Callable[[Callable], Operator]':
    """Make an operator of PyTorch of a function, as torch.library.custom_op.

    That checks at every call whether results share memory with arguments,
    which takes longer than launching a kernel does; this does not check.

    Args:
        name (str): With its namespace.
        mutates_args (Iterable[str]): Arguments that are written to. Defaults
            to none.
        differentiable (bool): Whether a gradient will be registered. Defaults
            to True; a gradient through the others is an error.
    """

    def register(function):
        # As torch.library.custom_op does, so that modules can be reloaded.
        from torch._library.custom_ops import get_library_allowing_overwrite

        schema = torch.library.infer_schema(
            function, mutates_args=mutates_args
        )
        library = get_library_allowing_overwrite(*name.split('::'))
        torch.library.define(name, schema, lib=library)
        torch.library.impl(name, 'default', function, lib=library)
        operator = Operator(name, library)
        if not differentiable:
            operator.register_autograd(partial(_refuse, name))
        return operator

    return register


def _refuse(name, *_):
    raise NotImplementedError(
        f"{name} has no gradient: take the backend 'reference' (of ContMix: "
        "'tiled') where gradients of gradients are needed"
    )


class Operator:
    """An operator, and what else is registered for it."""

    def __init__(self, name: str, library: torch.library.Library):
        self.name, self.library = name, library
        namespace, name = name.split('::')
        self.run = getattr(getattr(torch.ops, namespace), name).default

    def __call__(self, *args):
        return self.run(*args)

    def register_fake(self, function):
        return torch.library.register_fake(
            self.name, function, lib=self.library
        )

    def register_autograd(self, backward, setup_context=None):
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=self.library
        )
