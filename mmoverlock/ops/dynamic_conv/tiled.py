"""ContMix as batched matrix products over tiles of positions.

Two rearrangements of :mod:`mmoverlock.ops.dynamic_conv.reference`, exact up to
rounding:

- ``(query key) weight`` is computed as ``query (key weight)``: the second
  factor is formed once per image, and no affinity map is stored.
- The windows of neighboring positions overlap almost entirely. The kernels
  of a tile of positions are laid out as one dense (positions x region)
  matrix, zero outside each window, so that gathering windows becomes a
  matrix product with the region that the tile sees.

Kernels exist for a few groups at a time, and the backward pass makes them
anew: what is stored is as large as the inputs.
"""

from collections.abc import Iterator
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import custom_op
from ..environment import apply, hides_sizes, is_compiling
from .reference import bias_starts, window_starts

# Cost of laying out an element of kernels in a dense matrix. Copying one of a
# region costs 1, and so does one of the matrix in the product.
LAYOUT = 0.5
CHANNELS = 16  # of a group of values, in most of the networks
# Elements of the dense matrices that exist at a time, unless those of a
# single group are more: what CPUs cache, and what GPUs do in a few launches.
CHUNK = 2**20
CHUNK_ON_GPUS = 2**24


class _Bags(NamedTuple):
    """Rows of a matrix to be added up, bag after bag."""

    rows: Tensor
    starts: Tensor  # of the bags in them


class _Plan(NamedTuple):
    """The tiling of a map; T tiles of P positions, regions of R indices."""

    positions: Tensor  # (T * P, ): indices of the map
    real: Tensor | None  # (T * P, 1): 0 for padding; None if there is none
    order: Tensor  # (H * W, ): where in the tiles the map's positions are
    regions: Tensor  # (T, R): indices of the map
    taps: Tensor | None  # (T, P, K^2) in [0, R); None if region == window
    windows: Tensor  # (K^2, K^2): of the bias table, indices of it
    bias: Tensor  # (T * P, ): which of those windows
    # For gradients: what of the regions is a pixel, what uses a window.
    pixels: _Bags | None
    users: _Bags | None


@cache
def _choose_tiles(length: int, kernel_size: int) -> tuple[int, int, int]:
    """The number of tiles of an axis, their size and that of their regions.

    Larger tiles multiply more zeros, smaller ones copy more of what their
    regions share.
    """

    def start(
        position: int,
    ) -> int:  # of the window; in Python, to be traceable
        first = min(position, length - 1) - kernel_size // 2
        return min(max(first, 0), length - kernel_size)

    def cut(tiles: int) -> tuple[int, int, int]:
        size = -(-length // tiles)
        moves = max(
            start(i + size - 1) - start(i) for i in range(0, length, size)
        )
        return tiles, size, kernel_size + moves

    def cost(tiling: tuple[int, int, int]) -> int:  # of a square map
        tiles, size, region = tiling
        share = 1 + LAYOUT if region > kernel_size else 1
        return (tiles * region) ** 2 * (share * size**2 + CHANNELS)

    return min(map(cut, range(1, length + 1)), key=cost)


def _cut(length: int, kernel_size: int) -> tuple[Tensor, ...]:
    """Cut an axis into tiles of equal size, the last one padded.

    Returns:
        tuple[Tensor]: Positions (tiles, size), regions (tiles, region), the
        windows' starts within the regions (tiles, size) and the rows of the
        bias table (tiles, size).
    """
    tiles, size, region = _choose_tiles(length, kernel_size)
    # Padding repeats the last position.
    positions = torch.arange(tiles * size).clamp(max=length - 1)
    positions = positions.view(tiles, size)
    windows = window_starts(length, kernel_size)[positions]
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


def _windows(kernel_size: int, device: torch.device) -> Tensor:
    """The windows of a bias table (K^2, K^2), flat indices of it."""
    taps = torch.arange(kernel_size, device=device)
    starts = taps[:, None] + taps
    return _grid(starts, starts, 2 * kernel_size - 1)


def _bags(index: Tensor, length: int, device: torch.device) -> _Bags:
    """Bags of the places where each of ``length`` numbers is in an index."""
    rows = index.argsort(stable=True)
    counts = index.bincount(minlength=length)
    return _Bags(rows.to(device), (counts.cumsum(0) - counts).to(device))


def _make_plan(
    height: int,
    width: int,
    kernel_size: int,
    device: torch.device,
    training: bool,
) -> _Plan:
    rows = _cut(height, kernel_size)
    cols = _cut(width, kernel_size)
    positions = _grid(rows[0], cols[0], width).flatten()
    order = positions.new_zeros(height * width)
    # Of repeated positions, any will do.
    order[positions] = torch.arange(len(positions))
    real = None
    if len(positions) > len(order):
        real = torch.zeros(len(positions), 1)
        real[order] = 1
        real = real.to(device)
    taps = None
    region = rows[1].shape[1], cols[1].shape[1]
    if max(region) > kernel_size:
        tap = torch.arange(kernel_size)
        tap = (tap[:, None] * region[1] + tap).flatten()
        taps = _grid(rows[2], cols[2], region[1])[..., None] + tap
        taps = taps.to(device)
    regions = _grid(rows[1], cols[1], width)
    bias = _grid(rows[3], cols[3], kernel_size).flatten()
    pixels = users = None
    if training:
        pixels = _bags(regions.flatten(), len(order), device)
        users = _bags(bias, kernel_size**2, device)
    return _Plan(
        positions.to(device),
        real,
        order.to(device),
        regions.to(device),
        taps,
        _windows(kernel_size, device),
        bias.to(device),
        pixels,
        users,
    )


@lru_cache(maxsize=64)  # of up to 7 MB at 50 x 84
def _cached_plan(*args) -> _Plan:
    # Autograd cannot save inference tensors of a plan that is kept.
    with torch.inference_mode(False):
        return _make_plan(*args)


@torch.compiler.assume_constant_result
def _plan(*args) -> _Plan:
    # Tensors of a trace cannot be kept.
    if is_compiling() or torch.jit.is_tracing():
        return _make_plan(*args)
    return _cached_plan(*args)


def _chunks(maps: Tensor, plan: _Plan) -> Iterator[tuple[slice, slice]]:
    """Images and groups to work on at a time."""
    batch, groups = maps.shape[:2]
    size = len(plan.positions) * plan.regions.shape[1]
    most = CHUNK if maps.device.type == 'cpu' else CHUNK_ON_GPUS
    images = max(1, most // (groups * size))
    some = max(1, min(groups, most // size))
    for i in range(0, batch, images):
        for g in range(0, groups, some):
            yield slice(i, i + images), slice(g, g + some)


def _take(maps: Tensor, index: Tensor) -> Tensor:
    """``maps.index_select(-2, index)``, several times faster on CPUs.

    It is in the first dimension that PyTorch copies whole rows at a time.
    """
    if maps.device.type != 'cpu':
        return maps.index_select(-2, index)
    count, length = maps.shape[:-2].numel(), maps.shape[-2]
    rows = maps.flatten(0, -2)
    rows = rows.index_select(0, _repeat(index, count, length))
    return rows.view(*maps.shape[:-2], -1, maps.shape[-1])


def _add_up(maps: Tensor, bags: _Bags) -> Tensor:
    """Sums (..., bags, C) of rows of (..., rows, C).

    On CPUs ``index_add_`` is ten times slower, on GPUs not deterministic.
    """
    count, length = maps.shape[:-2].numel(), maps.shape[-2]
    sums = torch.embedding_bag(
        maps.flatten(0, -2),
        *(_repeat(index, count, length) for index in bags),
        mode=0,  # sums
    )[0]
    return sums.view(*maps.shape[:-2], -1, maps.shape[-1])


def _repeat(index: Tensor, count: int, length: int) -> Tensor:
    """An index for each of so many maps of a length, one after the other."""
    starts = torch.arange(0, count * length, length, device=index.device)
    return (starts[:, None] + index).flatten()


def _bits(x: Tensor) -> Tensor:
    """``x``, or integers of its bits: 16-bit floats move by copies.

    Integers have no gradient.
    """
    if x.element_size() != 2 or x.requires_grad or torch.jit.is_tracing():
        return x
    return x.view(torch.int16)


def _kernels(
    query: Tensor, filters: Tensor, windows: Tensor, plan: _Plan
) -> Tensor:
    """Kernels (B, G, T * P, K^2) of queries (B, G, T * P, c)."""
    bias = _take(windows, plan.bias).expand(len(query), -1, -1, -1)
    query, filters = query.flatten(0, 1), filters.flatten(0, 1)
    # To add to in place: what was taken, of one image, or copies, which
    # flattening does not make where there is one group
    logits = bias.flatten(0, 1).contiguous()
    logits.baddbmm_(query, filters)
    return logits.softmax(-1).view(bias.shape)


class _Tiles:
    """Sums over windows as matrix products, for a few groups at a time.

    Kernels are (B, G, T * P, K^2), values and sums (B, G, H * W, C).
    """

    def __init__(self, plan: _Plan):
        self.plan = plan
        self.dense = None

    def lay_out(self, kernels: Tensor) -> Tensor:
        """(B, G, T * P, K^2) to (B, G, T, P, R); the last one is reused."""
        kernels = kernels.unflatten(2, (len(self.plan.regions), -1))
        if self.plan.taps is None:
            return kernels
        shape = *kernels.shape[:-1], self.plan.regions.shape[1]
        taps = self.plan.taps.expand_as(kernels)
        if kernels.requires_grad:  # gradients of gradients read it later
            return kernels.new_zeros(shape).scatter(-1, taps, kernels)
        if self.dense is None or self.dense.shape != shape:
            self.dense = kernels.new_zeros(shape)
        # The same elements every time: the others stay zero.
        _bits(self.dense).scatter_(-1, taps, _bits(kernels))
        return self.dense

    def collect(self, dense: Tensor) -> Tensor:
        """(B, G, T, P, R) to (B, G, T * P, K^2)."""
        if self.plan.taps is not None:
            taps = self.plan.taps
            taps = taps.expand(*dense.shape[:-1], taps.shape[-1])
            taken, dtype = _bits(dense).gather(-1, taps), dense.dtype
            # A view in another dtype, or in its own, has no gradient.
            dense = taken if taken.dtype == dtype else taken.view(dtype)
        return dense.flatten(2, 3)

    def regions(self, value: Tensor) -> Tensor:
        """(B, G, H * W, C) to (B, G, T, R, C)."""
        regions = _take(value, self.plan.regions.flatten())
        return regions.unflatten(2, self.plan.regions.shape)

    def sums(self, kernels: Tensor, value: Tensor) -> Tensor:
        """Sums over windows, weighted by kernels of the dtype of ``value``."""
        sums = self.lay_out(kernels) @ self.regions(value)
        return _take(sums.flatten(2, 3), self.plan.order)

    def grads(
        self, grad: Tensor, kernels: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the kernels and the value."""
        plan = self.plan
        grad = _take(grad, plan.positions)
        if plan.real is not None:
            grad = grad * plan.real.to(grad.dtype)
        grad = grad.unflatten(2, (len(plan.regions), -1))
        grad_regions = (self.lay_out(kernels).mT @ grad).flatten(2, 3)
        grad_kernels = self.collect(grad @ self.regions(value).mT)
        return grad_kernels, _add_up(grad_regions, plan.pixels)


def _mix(
    query: Tensor, filters: Tensor, windows: Tensor, value: Tensor, plan: _Plan
) -> Tensor:
    """Mix with one kernel size.

    Args:
        query (Tensor): (B, G, H * W, c).
        filters (Tensor): (B, G, c, K^2), the key times the weight.
        windows (Tensor): (G, K^2, K^2), the windows of the bias table.
        value (Tensor): (B, G, H * W, C).
        plan (_Plan): Of the map.

    Returns:
        Tensor: (B, G, H * W, C).
    """
    out = torch.empty_like(value)
    tiles = _Tiles(plan)
    for chunk in _chunks(value, plan):
        tile_query = _take(query[chunk], plan.positions)
        kernels = _kernels(tile_query, filters[chunk], windows[chunk[1]], plan)
        out[chunk] = tiles.sums(kernels.to(value.dtype), value[chunk])
    return out


def _mix_grads(
    grad: Tensor,
    query: Tensor,
    filters: Tensor,
    windows: Tensor,
    value: Tensor,
    plan: _Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query = torch.empty_like(query)
    grad_filters = torch.empty_like(filters)
    grad_windows = torch.zeros_like(windows)
    grad_value = torch.empty_like(value)
    tiles = _Tiles(plan)
    for chunk in _chunks(value, plan):
        some_filters = filters[chunk]
        tile_query = _take(query[chunk], plan.positions)
        kernels = _kernels(tile_query, some_filters, windows[chunk[1]], plan)
        grad_kernels, grad_value[chunk] = tiles.grads(
            grad[chunk], kernels.to(value.dtype), value[chunk]
        )
        grad_logits = torch.ops.aten._softmax_backward_data(
            grad_kernels.to(kernels.dtype), kernels, -1, kernels.dtype
        )
        grad_query[chunk] = _take(grad_logits @ some_filters.mT, plan.order)
        grad_filters[chunk] = tile_query.mT @ grad_logits
        grad_windows[chunk[1]] += _add_up(grad_logits.sum(0), plan.users)
    return grad_query, grad_filters, grad_windows, grad_value


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        filters: Tensor,
        windows: Tensor,
        value: Tensor,
        plan: _Plan,
    ) -> Tensor:
        ctx.save_for_backward(query, filters, windows, value)
        ctx.plan = plan
        return _mix(query, filters, windows, value, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_mix_grads(grad, *ctx.saved_tensors, ctx.plan), None


@custom_op('mmoverlock::mix_tiles')
def _mix_any_size(
    query: Tensor,
    filters: Tensor,
    windows: Tensor,
    value: Tensor,
    height: int,
    width: int,
    kernel_size: int,
) -> Tensor:
    """See :func:`_mix`; for graphs, which need not be of one plan."""
    plan = _cached_plan(height, width, kernel_size, value.device, False)
    return _mix(query, filters, windows, value, plan)


@_mix_any_size.register_fake
def _(
    query: Tensor, filters: Tensor, windows: Tensor, value: Tensor, *sizes
) -> Tensor:
    return torch.empty_like(value)


@custom_op('mmoverlock::mix_tiles_backward', differentiable=False)
def _mix_any_size_backward(
    grad: Tensor,
    query: Tensor,
    filters: Tensor,
    windows: Tensor,
    value: Tensor,
    height: int,
    width: int,
    kernel_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = _cached_plan(height, width, kernel_size, value.device, True)
    return _mix_grads(grad, query, filters, windows, value, plan)


@_mix_any_size_backward.register_fake
def _(grad: Tensor, *operands) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, operands[:4]))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _mix_any_size_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None, None


_mix_any_size.register_autograd(_differentiate, setup_context=_save)


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
    height, width = value.shape[2:]

    def by_group(maps: Tensor) -> Tensor:  # (B, G, H * W, C)
        return maps.flatten(2).unflatten(1, (groups, -1)).mT.contiguous()

    filters = by_group(key).mT @ weight.T
    query = by_group(query)
    sizes = [(table.shape[-1] + 1) // 2 for table in rpb]
    areas = [k**2 for k in sizes]
    whole = hides_sizes()
    training = torch.is_grad_enabled()
    mix = partial(apply, _Mix) if training else _mix
    training = training and not torch.jit.is_tracing()
    mixed = []
    for k, table, filter, shift, half in zip(
        sizes,
        rpb,
        filters.split(areas, dim=-1),
        bias.split(areas),
        value.chunk(2, dim=1),
        strict=True,
    ):
        if whole:
            windows = _windows(k, value.device)
        else:
            plan = _plan(height, width, k, value.device, training)
            windows = plan.windows
        windows = table.flatten(1).index_select(1, windows.flatten())
        windows = windows.view(groups, k**2, k**2) + shift
        operands = query, filter, windows, by_group(half)
        if whole:
            mixed.append(_mix_any_size(*operands, height, width, k))
        else:
            mixed.append(mix(*operands, plan))
    return torch.cat(mixed, dim=1).mT.reshape(value.shape)
