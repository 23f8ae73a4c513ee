"""Kernels for maps in channels_last.

With P positions, t the sum over them of ``grad * f(gate) * x``, f SiLU or the
identity, and g of h the slope of GELU::

    m = mean(x),  h = W1 m + b1,  s = sigmoid(W2 gelu(h) + b2)
    out = x f(gate) s
    da = t s (1 - s),  dh = (W2' da) g(h),  dm = W1' dh / P
    grad of x = grad f(gate) s + dm,  grad of gate = grad x s f'(gate)

Forward, a map is read for its mean and read again with the gate for the
product; backward, grad, gate and x are read for t and read again for both
gradients. What is (B, C) or (B, D) is done by one program an image, which
also makes the sums over positions where there are few of those, and saves
a launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..common import cdiv, channels_last, custom_op, next_power_of_2
from ..conv3x3.triton import _gelu, _gelu_slope
from ..pointwise.triton import PRECISION

SIZES = ('positions', 'parts', 'splits', 'count', 'batch')
FEW = 256  # positions that one program an image adds up by itself
WEIGHT = 4096  # values of a weight that it has at a time
CHANNELS = 64  # most channels that it has at a time
PARTS = 128  # positions or partial sums that it adds at a time
WARPS = 8
WEIGHTS = dict(BATCH=32, CHANNELS=32, HIDDEN=16)  # a tile of their gradients


@triton.jit(do_not_specialize=SIZES)
def _pool_kernel(
    x,
    factor,
    gate,
    partial,
    positions,
    splits,
    channels,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums (B, splits, C) of a map or of a product of maps."""
    part, channel, inside = tiles.place(channels, BLOCK)
    length = tl.cdiv(positions, splits)
    first = part % splits * length
    rows = tl.minimum(length, positions - first)
    start = ((part // splits).to(tl.int64) * positions + first) * channels
    x += start
    if factor is not None:
        factor += start
    if gate is not None:
        gate += start
    total = tiles.sum_rows(
        x, factor, gate, rows, channels, channel, inside, ROWS, SILU
    )
    at = part.to(tl.int64) * channels + channel
    tl.store(partial + at, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _scale_kernel(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    state,
    parts,
    positions,
    channels,
    hidden,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """``state`` (B, 2 C + D) is m, s and h; x (B, parts, C) is added up."""
    image = tl.program_id(0).to(tl.int64)
    x += image * parts * channels
    state += image * (2 * channels + hidden)
    unit = tl.arange(0, HIDDEN)
    real = unit < hidden
    total = tl.zeros((HIDDEN, CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < channels
        mean = tiles.sum_rows(
            x, None, None, parts, channels, channel, inside, PARTS
        )
        mean = mean / positions
        tl.store(state + channel, mean, mask=inside)
        at = unit[:, None] * channels + channel[None]
        weight = tiles.load(weight1, at, real[:, None] & inside[None])
        total = tl.fma(weight, tl.broadcast_to(mean[None], at.shape), total)
    h = tl.sum(total, 1) + tiles.load(bias1, unit, real)
    tl.store(state + 2 * channels + unit, h, mask=real)
    h = _gelu(h)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < channels
        at = channel[:, None] * hidden + unit[None]
        weight = tiles.load(weight2, at, inside[:, None] & real[None])
        a = tl.sum(weight * h[None], 1) + tiles.load(bias2, channel, inside)
        tl.store(state + channels + channel, tl.sigmoid(a), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _scale_grad_kernel(
    grad,
    x,
    gate,
    weight1,
    weight2,
    state,
    grads,
    parts,
    positions,
    channels,
    hidden,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """``grads`` (B, 2 C + D) is dm, da and dh.

    The product of grad (B, parts, C), x and gate, if there are those two, is
    added up to t.
    """
    image = tl.program_id(0).to(tl.int64)
    start = image * parts * channels
    grad += start
    if x is not None:
        x += start
    if gate is not None:
        gate += start
    state += image * (2 * channels + hidden)
    grads += image * (2 * channels + hidden)
    unit = tl.arange(0, HIDDEN)
    real = unit < hidden
    total = tl.zeros((CHANNELS, HIDDEN), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < channels
        da = tiles.sum_rows(
            grad, x, gate, parts, channels, channel, inside, PARTS, SILU
        )
        s = tiles.load(state + channels, channel, inside)
        da *= s * (1 - s)
        tl.store(grads + channels + channel, da, mask=inside)
        at = channel[:, None] * hidden + unit[None]
        weight = tiles.load(weight2, at, inside[:, None] & real[None])
        total = tl.fma(weight, tl.broadcast_to(da[:, None], at.shape), total)
    dh = tl.sum(total, 0)
    dh *= _gelu_slope(tiles.load(state + 2 * channels, unit, real))
    tl.store(grads + 2 * channels + unit, dh, mask=real)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < channels
        at = unit[:, None] * channels + channel[None]
        weight = tiles.load(weight1, at, real[:, None] & inside[None])
        dm = tl.sum(weight * dh[:, None], 0) / positions
        tl.store(grads + channel, dm, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _weights_grad_kernel(
    state,
    grads,
    grad_weight1,
    grad_bias1,
    grad_weight2,
    grad_bias2,
    batch,
    channels,
    hidden,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Sums over images; grid (blocks of channels, blocks of h)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    unit = tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    inside = channel < channels
    real = unit < hidden
    sum_weight1 = tl.zeros((HIDDEN, CHANNELS), tl.float32)
    sum_weight2 = tl.zeros((CHANNELS, HIDDEN), tl.float32)
    sum_bias1 = tl.zeros((HIDDEN,), tl.float32)
    sum_bias2 = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, batch, BATCH):
        image = first + tl.arange(0, BATCH)[:, None]
        row = image.to(tl.int64) * (2 * channels + hidden)
        mask = (image < batch) & inside[None]
        at = row + channel[None]
        m = tiles.load(state, at, mask)
        da = tiles.load(grads + channels, at, mask)
        mask = (image < batch) & real[None]
        at = row + 2 * channels + unit[None]
        h = _gelu(tiles.load(state, at, mask))
        dh = tiles.load(grads, at, mask)
        sum_weight1 = tl.dot(
            tl.trans(dh), m, acc=sum_weight1, input_precision=PRECISION
        )
        sum_weight2 = tl.dot(
            tl.trans(da), h, acc=sum_weight2, input_precision=PRECISION
        )
        sum_bias1 += tl.sum(dh, 0)
        sum_bias2 += tl.sum(da, 0)
    at = unit[:, None] * channels + channel[None]
    mask = real[:, None] & inside[None]
    tiles.store(grad_weight1, at, sum_weight1, mask)
    at = channel[:, None] * hidden + unit[None]
    mask = inside[:, None] & real[None]
    tiles.store(grad_weight2, at, sum_weight2, mask)
    if tl.program_id(0) == 0:
        tiles.store(grad_bias1, unit, sum_bias1, real)
    if tl.program_id(1) == 0:
        tiles.store(grad_bias2, channel, sum_bias2, inside)


@triton.jit(do_not_specialize=SIZES)
def _apply_kernel(
    x,
    gate,
    state,
    y,
    hidden,
    SILU: tl.constexpr,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, inside, at, mask = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    state += image * (2 * channels + hidden)
    value = tiles.load(x, at, mask)
    if gate is not None:
        value *= tiles.open_gate(tiles.load(gate, at, mask), SILU)[0]
    value *= tiles.load(state + channels, channel, inside)[None]
    tiles.store(y, at, value, mask)


@triton.jit(do_not_specialize=SIZES)
def _apply_grad_kernel(
    grad,
    x,
    gate,
    state,
    grads,
    grad_x,
    grad_gate,
    hidden,
    SILU: tl.constexpr,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, channel, inside, at, mask = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    row = image * (2 * channels + hidden)
    value = tiles.load(grad, at, mask)
    value *= tiles.load(state + row + channels, channel, inside)[None]
    if gate is not None:
        other, slope = tiles.open_gate(tiles.load(gate, at, mask), SILU)
        slope *= value * tiles.load(x, at, mask)
        tiles.store(grad_gate, at, slope, mask)
        value *= other
    value += tiles.load(grads + row, channel, inside)[None]
    tiles.store(grad_x, at, value, mask)


def sum_positions(
    x: Tensor, factor: Tensor | None, gate: Tensor | None, silu: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """One launch where there are many positions, and none elsewhere.

    Returns:
        tuple[Tensor, Tensor | None, Tensor | None, int]: What a program an
        image adds up to the sum over positions of the product of the maps:
        those, or partial sums and twice None; and how many of them.
    """
    batch, channels, height, width = x.shape
    positions = height * width
    if positions <= FEW:
        return x, factor, gate, positions
    rows, block = tiles.form(channels)
    blocks = cdiv(channels, block)
    slots = partial_sums.programs(x.device, tiles.KNOBS['resident'])
    splits = min(cdiv(positions, rows), cdiv(slots, batch * blocks))
    partial = x.new_empty(batch, splits, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _pool_kernel[(batch * splits * blocks,)](
            x,
            factor,
            gate,
            partial,
            positions,
            splits,
            channels,
            SILU=silu,
            ROWS=rows,
            BLOCK=block,
            num_warps=tiles.KNOBS['warps'],
        )
    return partial, None, None, splits


def _knobs(hidden: int) -> dict[str, int]:
    hidden = next_power_of_2(hidden)
    return dict(
        PARTS=PARTS,
        CHANNELS=max(1, min(CHANNELS, WEIGHT // hidden)),
        HIDDEN=hidden,
        num_warps=WARPS,
    )


def forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two launches, and one more where there are many positions.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight1, bias1, weight2, bias2 (Tensor): Contiguous, of any dtype.
        gate (Tensor, optional): (B, C, H, W), in channels_last.
        silu (bool): Whether f is SiLU. Defaults to False.

    Returns:
        tuple[Tensor, Tensor]: The result, and for the gradient m, s and h,
        (B, 2 C + D), in single precision.
    """
    batch, channels, height, width = x.shape
    hidden = len(weight1)
    summed, _, _, parts = sum_positions(x, None, None)
    state = x.new_empty(batch, 2 * channels + hidden, dtype=torch.float32)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _scale_kernel[(batch,)](
            summed,
            weight1,
            bias1,
            weight2,
            bias2,
            state,
            parts,
            height * width,
            channels,
            hidden,
            **_knobs(hidden),
        )
        tiles.launch(_apply_kernel, x, x, gate, state, y, hidden, silu)
    return y, state


def backward(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None,
    state: Tensor,
    silu: bool = False,
) -> list[Tensor]:
    """Three launches, and one more where there are many positions.

    Returns:
        list[Tensor]: The gradients of x, the weights and biases in their
        order, and of the gate if there is one.
    """
    batch, channels, height, width = x.shape
    hidden = len(weight1)
    *summed, parts = sum_positions(grad, x, gate, silu)
    grads = torch.empty_like(state)
    results = [
        torch.empty_like(tensor)
        for tensor in (x, weight1, bias1, weight2, bias2, gate)
        if tensor is not None
    ]
    grad_x, *weights, grad_gate = [*results, None][:6]
    with torch.cuda.device_of(x):
        _scale_grad_kernel[(batch,)](
            *summed,
            weight1,
            weight2,
            state,
            grads,
            parts,
            height * width,
            channels,
            hidden,
            SILU=silu,
            **_knobs(hidden),
        )
        grid = (
            cdiv(channels, WEIGHTS['CHANNELS']),
            cdiv(hidden, WEIGHTS['HIDDEN']),
        )
        _weights_grad_kernel[grid](
            state, grads, *weights, batch, channels, hidden, **WEIGHTS
        )
        tiles.launch(
            _apply_grad_kernel,
            x,
            grad,
            x,
            gate,
            state,
            grads,
            grad_x,
            grad_gate,
            hidden,
            silu,
        )
    return results


def _empty_outputs(x: Tensor, weight1: Tensor) -> tuple[Tensor, Tensor]:
    # Not len(x), which would make a graph for every batch size.
    batch, channels = x.shape[:2]
    size = 2 * channels + weight1.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(batch, size, dtype=torch.float32),
    )


@custom_op('mmoverlock::squeeze_excite')
def _squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`forward`."""
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return _empty_outputs(x, weight1)
    if gate is not None:
        gate = channels_last(gate)
    weights = (t.contiguous() for t in (weight1, bias1, weight2, bias2))
    return forward(x, *weights, gate, silu)


@_squeeze_excite.register_fake
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(channels_last(x), weight1)


@custom_op('mmoverlock::squeeze_excite_backward', differentiable=False)
def _squeeze_excite_backward(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None,
    state: Tensor,
    silu: bool,
) -> list[Tensor]:
    """See :func:`backward`."""
    weights = [t.contiguous() for t in (weight1, bias1, weight2, bias2)]
    x = channels_last(x)
    if gate is not None:
        gate = channels_last(gate)
    if not x.numel():
        tensors = x, *weights, gate
        return [torch.zeros_like(t) for t in tensors if t is not None]
    return backward(channels_last(grad), x, *weights, gate, state, silu)


@_squeeze_excite_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None,
    state: Tensor,
    silu: bool,
) -> list[Tensor]:
    results = [torch.empty_like(channels_last(x))]
    for weight in (weight1, bias1, weight2, bias2):
        results.append(torch.empty_like(weight.contiguous()))
    if gate is not None:
        results.append(torch.empty_like(channels_last(gate)))
    return results


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, _: Tensor
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grads = _squeeze_excite_backward(grad, *ctx.saved_tensors, ctx.silu)
    return *[*grads, None][:6], None


_squeeze_excite.register_autograd(_differentiate, setup_context=_save)


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """See :func:`mmoverlock.ops.squeeze_excite`."""
    x = channels_last(x)
    if gate is not None:
        gate = channels_last(gate)
    return _squeeze_excite(x, weight1, bias1, weight2, bias2, gate, silu)[0]
