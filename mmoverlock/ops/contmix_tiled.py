"""ContMix as batched matrix products over tiles of positions.

Two rearrangements of :mod:`mmoverlock.ops.contmix_reference`, exact up to
rounding:

- ``(query key) weight`` is computed as ``query (key weight)``: the second
  factor is formed once per image, and no affinity map is stored.
- The windows of neighbouring positions overlap almost entirely. The kernels
  of a tile of positions are laid out as one dense (positions x region)
  matrix, zero outside each window, so that gathering windows becomes a
  matrix product with the region that the tile sees.

Kernels exist for some groups at a time, and the backward pass makes them
anew: what is stored is as large as the inputs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .contmix_reference import bias_starts, window_starts

# Side of a tile, at most. Larger tiles multiply more zeros, smaller ones copy
# more of what their regions share.
TILE = 7
# Elements of the dense matrices that exist at a time, unless those of a
# single group are more.
CHUNK = 2**21


class _Plan(NamedTuple):
    """The tiling of a map; T tiles of P positions, regions of R indices."""

    positions: Tensor  # (T, P): indices of the map
    order: Tensor  # (H * W, ): where in the tiles the map's positions are
    regions: Tensor  # (T, R): indices of the map
    taps: Tensor | None  # (T, P, K^2) in [0, R); None if region == window
    bias: Tensor  # (T * P, ): which of the K^2 windows of the bias table


def _cut(length: int, kernel_size: int) -> tuple[Tensor, ...]:
    """Cut an axis into tiles of equal size, the last one padded.

    Returns:
        tuple[Tensor]: Positions (tiles, size), regions (tiles, region), the
        windows' starts within the regions (tiles, size) and the rows of the
        bias table (tiles, size).
    """
    tiles = -(-length // TILE)
    size = -(-length // tiles)
    # Padding repeats the last position.
    positions = torch.arange(tiles * size).clamp(max=length - 1)
    positions = positions.view(tiles, size)
    windows = window_starts(length, kernel_size)[positions]
    region = int((windows[:, -1] - windows[:, 0]).max()) + kernel_size
    starts = windows[:, :1].clamp(max=length - region)
    return (
        positions,
        starts + torch.arange(region),
        windows - starts,
        bias_starts(length, kernel_size)[positions],
    )


def _grid(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """Flat indices (tiles, positions) of a map whose rows are ``width``."""
    grid = rows[:, None, :, None] * width + cols[None, :, None, :]
    return grid.flatten(2).flatten(0, 1)


@lru_cache(maxsize=256)
def _plan(
    height: int, width: int, kernel_size: int, device: torch.device
) -> _Plan:
    # The tensors are kept: they must not be inference tensors, which autograd
    # cannot save.
    with torch.inference_mode(False):
        rows = _cut(height, kernel_size)
        cols = _cut(width, kernel_size)
        positions = _grid(rows[0], cols[0], width)
        order = torch.empty(height * width, dtype=torch.int64)
        order[positions.flatten()] = torch.arange(positions.numel())
        region = cols[1].shape[1]
        taps = None
        if max(region, rows[1].shape[1]) > kernel_size:
            tap = torch.arange(kernel_size)
            tap = (tap[:, None] * region + tap).flatten()
            taps = _grid(rows[2], cols[2], region)[..., None] + tap
            taps = taps.to(device)
        return _Plan(
            positions.to(device),
            order.to(device),
            _grid(rows[1], cols[1], width).to(device),
            taps,
            _grid(rows[3], cols[3], kernel_size).flatten().to(device),
        )


def _mix(
    query: Tensor, filters: Tensor, windows: Tensor, value: Tensor, plan: _Plan
) -> Tensor:
    """Mix some groups of some images with one kernel size.

    Args:
        query (Tensor): (B, G, H * W, c).
        filters (Tensor): (B, G, c, K^2), the key times the weight.
        windows (Tensor): (G, K^2, K^2), the windows of the bias table.
        value (Tensor): (B, G, H * W, C).
        plan (_Plan): Of the map.

    Returns:
        Tensor: (B, G, H * W, C).
    """
    shape = value.shape
    query = query.index_select(2, plan.positions.flatten())
    logits = query @ filters
    logits += windows.index_select(1, plan.bias)
    kernel = logits.softmax(-1).to(value.dtype).flatten(0, 1)
    kernel = kernel.unflatten(1, plan.positions.shape)
    region = value.index_select(2, plan.regions.flatten())
    region = region.flatten(0, 1).unflatten(1, plan.regions.shape)
    if plan.taps is not None:
        dense = kernel.new_zeros(*kernel.shape[:-1], region.shape[2])
        kernel = dense.scatter_(-1, plan.taps.expand_as(kernel), kernel)
    mixed = kernel @ region
    return mixed.flatten(1, 2).index_select(1, plan.order).view(shape)


def contmix_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
) -> Tensor:
    """See :func:`mmoverlock.ops.contmix`."""
    groups = len(rpb[0])
    batch, _, height, width = value.shape

    def by_group(maps):  # (B, G, H * W, C)
        return maps.flatten(2).unflatten(1, (groups, -1)).mT.contiguous()

    filters = by_group(key).mT @ weight.T
    query = by_group(query)
    sizes = [((table.shape[-1] + 1) // 2) for table in rpb]
    areas = [k**2 for k in sizes]
    halves = []
    for k, table, part, shift, half in zip(
        sizes,
        rpb,
        filters.split(areas, dim=-1),
        bias.split(areas),
        value.chunk(2, dim=1),
        strict=True,
    ):
        plan = _plan(height, width, k, value.device)
        windows = table.unfold(1, k, 1).unfold(2, k, 1)
        windows = windows.reshape(groups, k**2, k**2) + shift
        size = plan.positions.numel() * plan.regions.shape[1]
        images = max(1, CHUNK // (groups * size))
        some = max(1, min(groups, CHUNK // size))
        mixed = [
            torch.cat(
                [
                    _run(*chunk, plan)
                    for chunk in zip(
                        q.split(some, 1),
                        f.split(some, 1),
                        windows.split(some),
                        v.split(some, 1),
                        strict=True,
                    )
                ],
                dim=1,
            )
            for q, f, v in zip(
                query.split(images),
                part.split(images),
                by_group(half).split(images),
                strict=True,
            )
        ]
        halves.append(torch.cat(mixed))
    mixed = torch.cat(halves, dim=1)
    return mixed.mT.reshape(value.shape)


def _run(*args):
    if torch.is_grad_enabled():
        return checkpoint(
            _mix, *args, use_reentrant=False, preserve_rng_state=False
        )
    return _mix(*args)
