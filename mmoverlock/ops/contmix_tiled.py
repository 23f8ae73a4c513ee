"""ContMix as batched matrix products over tiles of positions.

Two rearrangements of :mod:`mmoverlock.ops.contmix_reference`, exact up to
rounding:

- ``(query key) weight`` is computed as ``query (key weight)``: the second
  factor is formed once per image, and no affinity map is stored.
- The windows of neighbouring positions overlap almost entirely. The kernels
  of a tile of positions are laid out as one dense (positions x region)
  matrix, zero outside each window, so that gathering windows becomes a
  matrix product with the region that the tile sees.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contmix_reference import bias_starts, window_starts

# Side of a tile, at most. Larger tiles multiply more zeros, smaller ones copy
# more of what their regions share.
TILE = 8


class _Axis(NamedTuple):
    """How one axis of the map is cut into tiles, the last one padded."""

    tiles: int
    size: int  # positions per tile
    region: int  # indices per region
    index: Tensor  # (tiles * region, ): the indices that the regions see
    window: Tensor  # (tiles, size): window starts within the region
    bias: Tensor  # (tiles * size, ): bias table rows

    @classmethod
    def cut(cls, length: int, kernel_size: int) -> '_Axis':
        tiles = -(-length // TILE)
        size = -(-length // tiles)
        # Padding repeats the last position.
        position = torch.arange(tiles * size).clamp(max=length - 1)
        window = window_starts(length, kernel_size)[position]
        window = window.view(tiles, size)
        region = int((window[:, -1] - window[:, 0]).max()) + kernel_size
        start = window[:, :1].clamp(max=length - region)
        return cls(
            tiles,
            size,
            region,
            (start + torch.arange(region)).flatten(),
            window - start,
            bias_starts(length, kernel_size)[position],
        )


class _Plan(NamedTuple):
    """The tiling of a map; T tiles of P positions, regions of R indices."""

    rows: _Axis
    cols: _Axis
    bias: Tensor  # (T * P, ): which of the K^2 windows of the bias table
    taps: Tensor | None  # (T, P, K^2) in [0, R); None if region == window


@lru_cache(maxsize=256)
def _plan(
    height: int, width: int, kernel_size: int, device: torch.device
) -> _Plan:
    # The tensors are kept: they must not be inference tensors, which autograd
    # cannot save.
    with torch.inference_mode(False):
        rows = _Axis.cut(height, kernel_size)
        cols = _Axis.cut(width, kernel_size)

        def by_tile(row, col):  # (T, P, ...)
            grid = row[:, None, :, None] + col[None, :, None, :]
            return grid.flatten(2, 3).flatten(0, 1)

        bias = by_tile(
            rows.bias.view(rows.tiles, -1) * kernel_size,
            cols.bias.view(cols.tiles, -1),
        )
        taps = None
        if rows.region > kernel_size or cols.region > kernel_size:
            start = by_tile(rows.window * cols.region, cols.window)
            tap = torch.arange(kernel_size)
            tap = (tap[:, None] * cols.region + tap).flatten()
            taps = (start[..., None] + tap).to(device)
        rows = rows._replace(index=rows.index.to(device))
        cols = cols._replace(index=cols.index.to(device))
        return _Plan(rows, cols, bias.flatten().to(device), taps)


def _mix(
    query: Tensor, filters: Tensor, bias: Tensor, table: Tensor, value: Tensor
) -> Tensor:
    """One kernel size.

    Args:
        query (Tensor): (B, G * c, H, W).
        filters (Tensor): (B, G, c, K^2), the key times the weight.
        bias (Tensor): (K^2, ).
        table (Tensor): (G, 2K - 1, 2K - 1).
        value (Tensor): (B, G * C, H, W).

    Returns:
        Tensor: (B, G * C, H, W).
    """
    groups = filters.shape[1]
    height, width = query.shape[-2:]
    k = (table.shape[-1] + 1) // 2
    rows, cols, bias_index, taps = _plan(height, width, k, query.device)
    tiles = rows.tiles * cols.tiles

    def to_tiles(maps, row_size, col_size):
        # (B, G * C, H', W') to (B, G, T * P, C)
        maps = maps.unflatten(3, (cols.tiles, col_size))
        maps = maps.unflatten(2, (rows.tiles, row_size))
        maps = maps.unflatten(1, (groups, -1))
        return maps.permute(0, 1, 3, 5, 4, 6, 2).flatten(2, 5)

    pad = cols.tiles * cols.size - width, rows.tiles * rows.size - height
    query = F.pad(query, (0, pad[0], 0, pad[1]))
    logits = to_tiles(query, rows.size, cols.size) @ filters
    windows = table.unfold(1, k, 1).unfold(2, k, 1).reshape(groups, k**2, -1)
    logits = logits + (windows + bias).index_select(1, bias_index)
    kernel = logits.softmax(-1).unflatten(2, (tiles, -1))
    if taps is not None:
        dense = kernel.new_zeros(*kernel.shape[:-1], rows.region * cols.region)
        kernel = dense.scatter(-1, taps.expand_as(kernel), kernel)

    region = value.index_select(2, rows.index).index_select(3, cols.index)
    region = to_tiles(region, rows.region, cols.region)
    mixed = kernel @ region.unflatten(2, (tiles, -1))
    mixed = mixed.unflatten(3, (rows.size, cols.size))
    mixed = mixed.unflatten(2, (rows.tiles, cols.tiles))
    mixed = mixed.permute(0, 1, 6, 2, 4, 3, 5)
    mixed = mixed.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return mixed[..., :height, :width]


def contmix_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
) -> Tensor:
    """See :func:`mmoverlock.ops.contmix`."""
    key = key.flatten(2).unflatten(1, (len(rpb[0]), -1))
    filters = key @ weight.T
    sizes = [((table.shape[-1] + 1) // 2) ** 2 for table in rpb]
    mixed = [
        _mix(query, *part)
        for part in zip(
            filters.split(sizes, dim=-1),
            bias.split(sizes),
            rpb,
            value.chunk(2, dim=1),
            strict=True,
        )
    ]
    return torch.cat(mixed, dim=1)
