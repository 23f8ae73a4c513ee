"""A block as one node of autograd, of launches that it makes itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ... import partial_sums
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
    if not all(leaf.is_contiguous() for leaf in leaves):
        parameters = tree_map_only(Tensor, Tensor.contiguous, parameters)
        leaves = _leaves(parameters)
    operands = parameters, *settings
    return _Node.apply(forward, backward, len(maps), operands, *maps, *leaves)


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
        result, saved = forward(*tensors[:count], *operands)
        ctx.backward_of_block, ctx.operands = backward, operands
        ctx.kind, ctx.lengths = type(saved), lengths(saved)
        # The parameters, so that a change of them is noticed
        ctx.save_for_backward(*flatten(saved), *tensors[count:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.kind(*nest(saved_tensors(ctx), ctx.lengths))
        with partial_sums.together():
            grad_maps, grads = ctx.backward_of_block(
                channels_last(grad), saved, *ctx.operands
            )
        leaves = []
        for name in ctx.operands[0]._fields:
            value = grads[name]
            if name == 'branches':
                leaves += [t for branch in value for t in branch]
            else:
                leaves += value
        return *(None,) * 4, *grad_maps, *leaves
