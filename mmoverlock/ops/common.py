"""What operators on maps have in common."""

from functools import lru_cache, partial

import torch
from torch import Tensor

from .environment import check_triton, is_exporting

BACKENDS = ('auto', 'reference', 'triton')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = 8, 0


def takes_triton(backend: str, x: Tensor) -> bool:
    """Whether an operator on a map runs its kernels.

    Args:
        backend (str): 'reference', plain PyTorch; 'triton'; or 'auto', which
            is 'triton' where it can run and 'reference' elsewhere.
        x (Tensor): The map.

    Raises:
        ValueError: If there is no such backend, or 'triton' cannot run.
        ImportError: If 'triton' needs what is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f'unknown backend {backend!r}, expected one of {list(BACKENDS)}'
        )
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
    return _runs_triton(device)


@lru_cache
def _runs_triton(device):
    if device.type != 'cuda' or (
        torch.cuda.get_device_capability(device) < MIN_CAPABILITY
    ):
        return False
    try:
        check_triton()
    except ImportError:
        return False
    return True


def cast_as_convolutions(x: Tensor) -> Tensor:
    """What autocast does before a convolution, if it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def channels_last(x: Tensor) -> Tensor:
    """The map with its channels next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def custom_op(name: str, mutates_args=(), differentiable: bool = True):
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
        schema = torch.library.infer_schema(
            function, mutates_args=mutates_args
        )
        torch.library.define(name, schema)
        torch.library.impl(name, 'default', function)
        operator = Operator(name)
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

    def __init__(self, name: str):
        self.name = name
        namespace, name = name.split('::')
        self.run = getattr(getattr(torch.ops, namespace), name).default

    def __call__(self, *args):
        return self.run(*args)

    def register_fake(self, function):
        return torch.library.register_fake(self.name, function)

    def register_autograd(self, backward, setup_context=None):
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context
        )
