"""Batch norms in training mode, as other operators take them."""

from typing import NamedTuple

from torch import Tensor, distributed


class Norm(NamedTuple):
    """A batch norm in training mode; of C channels."""

    scale: Tensor  # (C, ), as the next three
    shift: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor  # (): their number
    momentum: float
    eps: float


def sync_batch_norm(
    x: Tensor, norm: Norm, group: 'distributed.ProcessGroup | None' = None
) -> Tensor:
    """A batch norm in training mode, over the maps of several processes.

    Computes what :class:`torch.nn.SyncBatchNorm` does, by kernels alone and
    without waiting for the GPU. (That one waits to find empty maps, which are
    refused here.) Running statistics and the number of batches are updated in
    place.

    Args:
        x (Tensor): (B, C, H, W), not empty; its size may differ from process
            to process.
        norm (Norm): Of C channels.
        group (ProcessGroup, optional): The processes. Defaults to None: this
            one alone.

    Returns:
        Tensor: (B, C, H, W).

    Raises:
        ValueError: If the map is empty, not on a GPU or in double precision.
    """
    from .triton import sync_batch_norm as run

    return run(x, norm, group)


__all__ = ['Norm', 'sync_batch_norm']
