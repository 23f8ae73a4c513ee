"""Helpers that operators on maps share."""

import typing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .environment import is_traced


def cdiv(number: int, divisor: int) -> int:
    """Quotient, rounded up; Triton's own is slow outside of kernels."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest that is no smaller."""
    return 1 << (number - 1).bit_length()


def convolution_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast casts a map to before a convolution."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def cast_as_convolutions(x: Tensor) -> Tensor:
    """Cast a map as autocast, if it is on, does before a convolution."""
    return x.to(convolution_dtype(x))


def channels_last(x: Tensor) -> Tensor:
    """The map with its channels next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def contiguous(*tensors) -> list[Tensor | None]:
    """Tensors as kernels read them; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]


def saved_tensors(ctx: Any, count: int | None = None) -> list[Tensor | None]:
    """Tensors that a node has saved, with maps in channels_last.

    Hooks, such as those of ``save_on_cpu``, may bring them back in another
    layout. Parameters of four dimensions are equal in both.

    Args:
        ctx: Of the node.
        count (int, optional): How many of the first. Defaults to all.
    """
    return [
        channels_last(t) if t is not None and t.dim() == 4 else t
        for t in ctx.saved_tensors[:count]
    ]


def once_differentiable(backward: Callable) -> Callable:
    """A gradient that has none itself, for functions of autograd.

    PyTorch's decorator of this name raises an error where the gradient of the
    output requires one, this one also where an operand does.
    """

    def run(ctx: Any, *grads) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        operands = [
            t
            for t in (*grads, *ctx.saved_tensors)
            if t is not None and t.requires_grad
        ]
        found = [t for t in results if t is not None]
        refused = iter(_Refused.apply(len(found), *found, *operands))
        return tuple(None if t is None else next(refused) for t in results)

    return run


class _Refused(torch.autograd.Function):
    """The same tensors, whose gradients are errors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads) -> NoReturn:
        _refuse('a block or a batch norm of kernels')


def custom_op(
    name: str, mutates_args: Iterable[str] = (), differentiable: bool = True
) -> 'Callable[[Callable], Operator]':
    """Make an operator of a function, as torch.library.custom_op does.

    What is traced, or watched by a mode of dispatch, has the operator of
    PyTorch in it. Otherwise the function runs as it is, or in a node of
    autograd: PyTorch's way to it, by way of its dispatcher, takes longer than
    launching a kernel does.

    Args:
        name (str): With its namespace.
        mutates_args (Iterable[str]): Arguments that are written to. Defaults
            to none.
        differentiable (bool): Whether a gradient will be registered. Defaults
            to True; a gradient through the others is an error.
    """

    def register(function: Callable) -> 'Operator':
        # As torch.library.custom_op does, so that modules can be reloaded.
        from torch._library.custom_ops import get_library_allowing_overwrite

        if function.__annotations__['return'] == list[Tensor]:
            # Before 2.7, torch knows it by this name alone.
            function.__annotations__['return'] = typing.List[Tensor]  # noqa: UP006
        schema = torch.library.infer_schema(
            function, mutates_args=mutates_args
        )
        library = get_library_allowing_overwrite(*name.split('::'))
        torch.library.define(name, schema, lib=library)
        torch.library.impl(name, 'default', function, lib=library)
        operator = Operator(name, library, function)
        if not differentiable:
            operator.register_autograd(partial(_refuse, name))
        return operator

    return register


def _refuse(name: str, *_) -> NoReturn:
    raise NotImplementedError(
        f"{name} has no gradient: take the backend 'reference' (of ContMix: "
        "'tiled') where gradients of gradients are needed"
    )


class Operator:
    """An operator, and what else is registered for it."""

    def __init__(
        self, name: str, library: torch.library.Library, function: Callable
    ):
        self.name, self.library, self.function = name, library, function
        self.node = None
        namespace, name = name.split('::')
        self.run = getattr(getattr(torch.ops, namespace), name).default
        arguments = self.run._schema.arguments
        self.has_lists = any(str(a.type) == 'List[Tensor]' for a in arguments)

    def __call__(self, *args) -> Any:
        if is_traced():
            return self.run(*args)
        if self.node is None or not torch.is_grad_enabled():
            return self.function(*args)
        if not self.has_lists:
            return self.node.apply(None, *args)
        return self.node.apply(lengths(args), *flatten(args))

    def register_fake(self, function: Callable) -> Callable:
        return torch.library.register_fake(
            self.name, function, lib=self.library
        )

    def register_autograd(
        self, backward: Callable, setup_context: Callable | None = None
    ) -> None:
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=self.library
        )
        self.node = _node(self.name, self.function, backward, setup_context)


def _node(
    name: str,
    function: Callable,
    backward: Callable,
    setup_context: Callable | None,
) -> type[torch.autograd.Function]:
    """The same as a function of autograd, of flat arguments."""

    def forward(
        ctx: Any, lengths: tuple[int | None, ...] | None, *args
    ) -> Any:
        ctx.lengths = lengths
        if lengths is not None:
            args = nest(args, lengths)
        out = function(*args)
        if setup_context is not None:
            setup_context(ctx, args, out)
        return tuple(out) if isinstance(out, list) else out

    def differentiate(ctx: Any, *grads) -> tuple:
        grads = backward(ctx, *grads)
        if ctx.lengths is None:
            return None, *grads
        grads = (
            (None,) * length if grad is None and length is not None else grad
            for grad, length in zip(grads, ctx.lengths, strict=True)
        )
        return None, *flatten(grads)

    return type(
        name.split('::')[1],
        (torch.autograd.Function,),
        dict(
            forward=staticmethod(forward), backward=staticmethod(differentiate)
        ),
    )


def lengths(args: Sequence) -> tuple[int | None, ...]:
    """Of the lists among arguments."""
    return tuple(
        len(arg) if isinstance(arg, list | tuple) else None for arg in args
    )


def flatten(args: Sequence) -> list:
    """Arguments, and those in lists among them."""
    flat = []
    for arg in args:
        if isinstance(arg, list | tuple):
            flat.extend(arg)
        else:
            flat.append(arg)
    return flat


def nest(args: Iterable, lengths: Sequence[int | None]) -> tuple:
    """The opposite of :func:`flatten`, of as many as there are lengths."""
    args = iter(args)
    return tuple(
        next(args) if length is None else [next(args) for _ in range(length)]
        for length in lengths
    )
