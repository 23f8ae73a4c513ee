"""A block as one node of autograd, of launches that it makes itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ... import partial_sums, tape
from ...batch_norm import Norm
from ...batch_norm.triton import check_map
from ...common import (
    channels_last,
    contiguous,
    flatten,
    lengths,
    nest,
    once_differentiable,
    saved_tensors,
)


def contiguous_fields(parameters: tuple) -> tuple:
    """Parameters of a fused block, every tensor contiguous."""
    fields = (value and contiguous(*value) for value in parameters)
    return type(parameters)(*fields)


def run_node(
    forward: Callable,
    backward: Callable,
    maps: Sequence[Tensor | None],
    parameters: tuple,
    *settings,
) -> Tensor:
    """Run a block in one node of autograd.

    Args:
        forward (callable): Of the maps, the parameters and the settings, to
            the result and a named tuple of what the gradient needs. Kernels
            read the parameters as contiguous.
        backward (callable): Of the gradient, the named tuple, the parameters
            and the settings, to the gradients of the maps and a dict of those
            of the parameters, as they are there. All its sums of parts are
            added in the end, in one launch.
        maps (Sequence[Tensor | None]): In channels_last.
        parameters (tuple): Named; tuples of tensors, norms, and lists of
            branches.
        settings: Whatever else they take.
    """
    check_map(maps[0])
    leaves = _leaves(parameters)
    if not all(map(Tensor.is_contiguous, leaves)):
        parameters = tree_map_only(Tensor, Tensor.contiguous, parameters)
        leaves = _leaves(parameters)
    operands = parameters, *settings
    return _Node.apply(forward, backward, len(maps), operands, *maps, *leaves)


def run_fused(
    function: Callable, maps: Sequence[Tensor | None], *operands
) -> Tensor:
    """Run a fused block, whose operands come behind its maps."""
    found, tensors, key = _describe(maps, operands)

    def run() -> tuple[list[Tensor], None]:
        return [function(*maps, *operands)], None

    (result,), _ = tape.play(run, [*found, *tensors], (function, *key))
    return result


def _describe(
    maps: Sequence[Tensor | None], operands: tuple
) -> tuple[list[Tensor], list[Tensor], tuple]:
    """The maps that there are, tensors of the operands, a key of a tape."""
    found, key = tape.describe(maps)
    tensors, others = tape.describe(operands)
    strides = (x.stride() for x in found)
    return found, tensors, (*key, *strides, tape.number(others))


def _leaves(parameters: tuple) -> list[Tensor]:
    """The tensors among the parameters that have gradients, in order."""
    leaves = []
    for value in parameters:
        if isinstance(value, Norm):
            leaves += value[:2]
        elif isinstance(value, list):
            leaves += [t for branch in value for t in branch[:3]]
        else:
            leaves += value
    return leaves


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable,
        backward: Callable,
        count: int,
        operands: tuple,
        *tensors,
    ) -> Tensor:
        maps = tensors[:count]

        def run() -> tuple[list[Tensor | None], tuple]:
            result, saved = forward(*maps, *operands)
            facts = type(saved), lengths(saved)
            return [result, *flatten(saved)], facts

        found, ctx.tensors, key = _describe(maps, operands)
        ctx.key = forward, *key
        (result, *saved), (ctx.kind, ctx.lengths) = tape.play(
            run, [*found, *ctx.tensors], ctx.key
        )
        ctx.backward_of_block, ctx.operands = backward, operands
        ctx.count = len(saved)
        # The parameters, so that a change of them is noticed
        ctx.save_for_backward(*saved, *tensors[count:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, saved = channels_last(grad), saved_tensors(ctx, ctx.count)

        def run() -> tuple[list[Tensor | None], None]:
            with partial_sums.together():
                grad_maps, grads = ctx.backward_of_block(
                    grad, ctx.kind(*nest(saved, ctx.lengths)), *ctx.operands
                )
            leaves = []
            for name in ctx.operands[0]._fields:
                value = grads[name]
                if name == 'branches':
                    leaves += [t for branch in value for t in branch]
                else:
                    leaves += value
            return [*grad_maps, *leaves], None

        operands = grad, *saved
        found = [t for t in operands if t is not None]
        dtypes = tuple([t.dtype for t in found])  # hooks may change them
        key = ctx.backward_of_block, tape.alignment(found), dtypes, ctx.key
        grads, _ = tape.play(run, [*operands, *ctx.tensors], key)
        return *(None,) * 4, *grads
