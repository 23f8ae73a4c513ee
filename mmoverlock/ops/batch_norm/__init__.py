"""Batch norms in training mode, as other operators take them."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A batch norm in training mode; of C channels."""

    scale: Tensor  # (C, ), as the next three
    shift: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor  # (): their number
    momentum: float
    eps: float


__all__ = ['Norm']
