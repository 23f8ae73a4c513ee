"""torch.compile by region: what compiles is a block, not the network.

Blocks of one kind and size run the same graphs, with their own weights.
"""

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType

import torch
from torch import Tensor, nn


def run(block: nn.Module, *args) -> Tensor:
    """``block.compute(*args)``, compiled if the block is to be."""
    region = block.__dict__.get('region')
    if region is None:
        return block.compute(*args)
    return _compile(type(block).compute, *region)(block, *args)


def set_region(block: nn.Module, name: str, options: dict) -> None:
    """Have a block run compiled.

    Args:
        block (nn.Module): With a method ``compute``.
        name (str): The same for blocks that run the same graphs.
        options (dict): Of torch.compile.
    """
    block.region = name, tuple(sorted(options.items()))


@lru_cache
def _compile(function: Callable, name: str, options: tuple) -> Callable:
    """Compile a copy of a function.

    torch keeps few graphs for a function, fewer than blocks of all sizes in
    all modes need together.
    """
    function = FunctionType(
        function.__code__.replace(co_name=f'{function.__name__}_{name}'),
        function.__globals__,
        closure=function.__closure__,
    )
    return torch.compile(function, **(dict(dynamic=True) | dict(options)))
