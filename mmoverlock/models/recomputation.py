"""Recomputing blocks in the backward pass, for memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(block: nn.Module, run: Callable, *args) -> Tensor:
    """Run a block without keeping its activations; the backward repeats it.

    ``run(*args)`` is what runs the block.
    """
    return checkpoint(
        run,
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
    """Have batch norms in training mode count a batch where nobody reads.

    Their settings stay, on which compiled blocks depend.
    """
    norms = [
        (module._buffers, module._buffers.copy())
        for module in block.modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    for buffers, kept in norms:
        for name, buffer in kept.items():
            if buffer is not None:
                # Zeros: one over a number of batches may be taken.
                buffers[name] = torch.zeros_like(buffer)
    try:
        yield
    finally:
        for buffers, kept in norms:
            buffers.update(kept)
