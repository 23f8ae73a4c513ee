"""torch.compile by region: what is compiled is a block, not the network.

Blocks of one kind and size run the same graphs, each with its own weights, and
images of all sizes do. What else makes a graph: training or not, gradients or
not, autocast or not, a block that drops nothing, a single image, a map of one
row or column, and a map on the other side of a size at which a block computes
in another way.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import environment, is_compiling, is_traced
from .layers import exchanges

SETTINGS = dict(
    cache_size_limit=64,  # graphs; beyond that, blocks are not compiled
    optimize_ddp=False,  # which would cut regions into buckets of gradients
    skip_nnmodule_hook_guards=False,  # hooks may come and go
    specialize_float=True,  # or else everything is traced twice
)


class Regions:
    """Runs blocks, compiled if they are to be.

    It is copied and pickled without what it has compiled.

    Args:
        compile (bool | dict): Whether blocks are compiled, or arguments of
            ``torch.compile``.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, compile: bool | dict):
        if not isinstance(compile, bool | dict):
            raise ValueError(
                'compile must be True, False or a dict of arguments of '
                f'torch.compile, got {compile!r}'
            )
        self.compile = compile
        self._compiled = None

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _compiled=None)

    def settings(self) -> AbstractContextManager:
        """PyTorch's, for all blocks that run within: they take 0.1 ms."""
        if self.compile is False or is_compiling() or environment.any_size:
            return nullcontext()
        return _set()

    def __call__(self, block: nn.Module, *args: Any) -> Tensor:
        """``block(*args)``; tracing and counting see it as it is.

        So do processes that share statistics: compiled or not, all have to
        take the same way, and a limit of graphs may be met by one of them.
        """
        if (
            self.compile is False
            or is_traced()
            or torch.jit.is_tracing()
            or exchanges(block)
        ):
            return block(*args)
        if self._compiled is None:
            options = {} if self.compile is True else self.compile
            self._compiled = torch.compile(
                _run, **dict(dynamic=True) | options
            )
        with self.settings():
            return self._compiled(block, *args)


@contextmanager
def _set() -> Iterator[None]:
    from torch._dynamo import config
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as symbols

    environment.any_size = True
    try:
        with (
            config.patch(SETTINGS),
            # Sizes that happen to be equal need not be.
            symbols.patch(use_duck_shape=False),
            # It fails at sizes that are not known, and maps are in
            # channels_last already.
            inductor.patch(layout_optimization=False),
        ):
            yield
    finally:
        environment.any_size = False


def _run(block: nn.Module, *args: Any) -> Tensor:
    return block(*args)
