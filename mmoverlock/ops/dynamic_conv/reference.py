"""ContMix as it is defined: the oracle every other backend is tested against.

Written to be read. It gathers every window, so it stores ``kernel_size ** 2``
copies of the values; use :func:`mmoverlock.ops.contmix`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(length: int, kernel_size: int) -> Tensor:
    """First index of the window of every position along one axis.

    Windows are clamped, not padded: near a border they stop moving, so that
    every window lies inside the map.

    Args:
        length (int): Size of the axis, at least ``kernel_size``.
        kernel_size (int): Size of the window.

    Returns:
        Tensor: int64 of shape (length, ).
    """
    starts = torch.arange(length) - kernel_size // 2
    return starts.clamp(0, length - kernel_size)


def bias_starts(length: int, kernel_size: int) -> Tensor:
    """First row of every position in the relative position bias table.

    A tap's row is its offset from the position, plus ``kernel_size - 1``.

    Args:
        length (int): Size of the axis, at least ``kernel_size``.
        kernel_size (int): Size of the window.

    Returns:
        Tensor: int64 of shape (length, ), values in [0, kernel_size).
    """
    offsets = window_starts(length, kernel_size) - torch.arange(length)
    return offsets + kernel_size - 1


def contmix_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
) -> Tensor:
    """See :func:`mmoverlock.ops.contmix`."""
    height, width = query.shape[-2:]
    groups = len(rpb[0])
    sizes = [(table.shape[-1] + 1) // 2 for table in rpb]

    # Affinity of every position to the region centers, then one linear map
    # from the affinities to the logits of both kernels.
    affinity = torch.einsum(
        'bgchw,bgcs->bghws',
        query.unflatten(1, (groups, -1)),
        key.flatten(2).unflatten(1, (groups, -1)),
    )
    logits = (affinity @ weight.T + bias).split([k**2 for k in sizes], dim=-1)

    outputs = []
    for k, logit, table, half in zip(
        sizes, logits, rpb, value.chunk(2, dim=1), strict=True
    ):

        def taps(
            starts: Callable, length: int, k: int = k
        ) -> Tensor:  # (L, K): the taps of each position
            return starts(length, k)[:, None] + torch.arange(k)

        def neighborhood(
            maps: Tensor, starts: Callable, taps: Callable = taps
        ) -> Tensor:  # to (..., H, W, K, K)
            rows = taps(starts, height)[:, None, :, None]
            cols = taps(starts, width)[None, :, None, :]
            return maps[..., rows, cols]

        logit = logit.unflatten(-1, (k, k))
        logit = logit + neighborhood(table, bias_starts)
        kernel = logit.flatten(-2).softmax(-1).unflatten(-1, (k, k))
        kernel = kernel.to(half.dtype)
        windows = neighborhood(half.unflatten(1, (groups, -1)), window_starts)
        mixed = torch.einsum('bghwij,bgchwij->bgchw', kernel, windows)
        outputs.append(mixed.flatten(1, 2))
    return torch.cat(outputs, dim=1)
