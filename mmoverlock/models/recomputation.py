"""Recomputing blocks in the backward pass, for memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(block: nn.Module, *args: Tensor) -> Tensor:
    """Run a block without keeping its activations; the backward repeats it."""
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        context_fn=partial(_contexts, block),
    )


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the first and of the repeated forward."""
    return nullcontext(), _fixed_statistics(block)


@contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    """Keep batch norms in training mode from counting a batch twice."""
    norms = [
        (module, module.momentum, module.num_batches_tracked.clone())
        for module in block.modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    for norm, _, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, num_batches in norms:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches)
