"""Recomputing blocks in the backward pass, for memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    """Contexts of the first and of every repeated forward."""
    return nullcontext(), _FixedStatistics(block)


class _FixedStatistics:
    """Has batch norms in training mode count a batch where nobody reads.

    Their settings stay, on which compiled blocks depend. Every backward pass
    of a graph that is retained enters it anew.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __enter__(self) -> None:
        self.norms = [
            (module._buffers, module._buffers.copy())
            for module in self.block.modules()
            if isinstance(module, _BatchNorm) and module.training
        ]
        for buffers, kept in self.norms:
            for name, buffer in kept.items():
                if buffer is not None:
                    # Zeros: one over a number of batches may be taken.
                    buffers[name] = torch.zeros_like(buffer)

    def __exit__(self, *_) -> None:
        for buffers, kept in self.norms:
            buffers.update(kept)
