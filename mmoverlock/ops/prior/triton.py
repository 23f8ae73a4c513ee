"""Kernels for maps in channels_last: one pass forward, one backward.

All channels are scaled, the features by 1, which changes no value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..common import cdiv, channels_last, custom_op

SIZES = ('count', 'splits')


@triton.jit
def _load_scale(weight, prior, mask):
    """Weights of priors, and 1 for features."""
    return tl.where(mask, tiles.load(weight, prior, mask), 1)[None]


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    z,
    initial,
    weight,
    bias,
    initial_weight,
    initial_bias,
    out,
    count,
    channels,
    total,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``channels`` of ``total`` are features."""
    tile, channel, inside = tiles.place(total, BLOCK)
    prior = channel - channels
    guided = inside & (prior >= 0)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < count) & inside[None]
    at = row.to(tl.int64) * total + channel[None]
    value = tiles.load(z, at, mask) * _load_scale(weight, prior, guided)
    shift = tiles.load(initial_bias, prior, guided)
    if bias is not None:
        shift += tiles.load(bias, prior, guided)
    value += shift[None]
    at_prior = row.to(tl.int64) * (total - channels) + prior[None]
    other = tiles.load(initial, at_prior, mask & guided[None])
    other *= tiles.load(initial_weight, prior, guided)[None]
    tiles.store(out, at, value + other, mask)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad,
    z,
    initial,
    weight,
    initial_weight,
    grad_z,
    grad_initial,
    partial,
    count,
    channels,
    total,
    splits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``partial`` is (splits, 3, P): of the two weights, and of a bias."""
    split, channel, inside = tiles.place(total, BLOCK)
    prior = channel - channels
    priors = total - channels
    guided = inside & (prior >= 0)
    scale = _load_scale(weight, prior, guided)
    initial_scale = tiles.load(initial_weight, prior, guided)[None]
    grad_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_initial_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(split * ROWS, count, splits * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < count) & inside[None]
        mask_prior = mask & guided[None]
        at = row.to(tl.int64) * total + channel[None]
        at_prior = row.to(tl.int64) * priors + prior[None]
        g = tiles.load(grad, at, mask)
        value = tiles.load(z, at, mask_prior)
        grad_scale = tl.fma(g, value, grad_scale)
        value = tiles.load(initial, at_prior, mask_prior)
        grad_initial_scale = tl.fma(g, value, grad_initial_scale)
        grad_shift += g
        tiles.store(grad_z, at, g * scale, mask)
        tiles.store(grad_initial, at_prior, g * initial_scale, mask_prior)
    at = split.to(tl.int64) * 3 * priors + prior
    tl.store(partial + at, tl.sum(grad_scale, 0), mask=guided)
    at += priors
    tl.store(partial + at, tl.sum(grad_initial_scale, 0), mask=guided)
    at += priors
    tl.store(partial + at, tl.sum(grad_shift, 0), mask=guided)


def forward(
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
) -> Tensor:
    """One launch.

    Args:
        z (Tensor): (B, C + P, H, W), in channels_last, not empty.
        initial (Tensor): (B, P, H, W), in channels_last.
        weight, bias, initial_weight, initial_bias: P values each, contiguous,
            of any dtype; the first bias may be None.
    """
    out = torch.empty_like(z)
    total = z.shape[1]
    count = z.numel() // total
    rows, block = tiles.form(total)
    grid = cdiv(count, rows) * cdiv(total, block)
    with torch.cuda.device_of(z):
        _forward_kernel[(grid,)](
            z,
            initial,
            weight,
            bias,
            initial_weight,
            initial_bias,
            out,
            count,
            total - initial.shape[1],
            total,
            ROWS=rows,
            BLOCK=block,
            num_warps=tiles.WARPS,
        )
    return out


def backward(
    grad: Tensor,
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    initial_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; arguments as in :func:`forward`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Gradients of the maps, and partial sums
        for :func:`partial_sums.add`, (parts, 3, P): of the two weights, and
        of either bias.
    """
    grad_z, grad_initial = torch.empty_like(z), torch.empty_like(initial)
    total, priors = z.shape[1], initial.shape[1]
    count = z.numel() // total
    rows, block = tiles.form(total)
    blocks = cdiv(total, block)
    slots = partial_sums.programs(z.device, tiles.RESIDENT)
    splits = min(cdiv(count, rows), cdiv(slots, blocks))
    partial = z.new_empty(splits, 3, priors, dtype=torch.float32)
    with torch.cuda.device_of(z):
        _backward_kernel[(splits * blocks,)](
            grad,
            z,
            initial,
            weight,
            initial_weight,
            grad_z,
            grad_initial,
            partial,
            count,
            total - priors,
            total,
            splits,
            ROWS=rows,
            BLOCK=block,
            num_warps=tiles.WARPS,
        )
    return grad_z, grad_initial, partial


@custom_op('mmoverlock::update_prior')
def _update_prior(
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
) -> Tensor:
    partial_sums.check_device(z)
    z = channels_last(z)
    if not z.numel():
        return torch.empty_like(z)
    return forward(
        z,
        channels_last(initial),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        initial_weight.contiguous(),
        initial_bias.contiguous(),
    )


@_update_prior.register_fake
def _(z, initial, weight, bias, initial_weight, initial_bias):
    return torch.empty_like(channels_last(z))


@custom_op('mmoverlock::update_prior_backward', differentiable=False)
def _update_prior_backward(
    grad: Tensor,
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
) -> list[Tensor]:
    """Gradients of all but grad, and of no bias if there is none."""
    z, initial = channels_last(z), channels_last(initial)
    weights = _contiguous(weight, bias, initial_weight, initial_bias)
    results = [torch.empty_like(t) for t in weights]
    if not z.numel():
        maps = torch.empty_like(z), torch.empty_like(initial)
        return [*maps, *(t.zero_() for t in results)]
    grad_weight, *grad_bias, grad_initial_weight, grad_initial_bias = results
    grad_z, grad_initial, partial = backward(
        channels_last(grad), z, initial, weights[0], weights[-2]
    )
    jobs = [(partial, grad_weight, grad_initial_weight, grad_initial_bias)]
    if bias is not None:  # the same, in memory of its own
        jobs.append((partial, None, None, *grad_bias))
    partial_sums.add(*jobs)
    return [grad_z, grad_initial, *results]


def _contiguous(*tensors):
    return [tensor.contiguous() for tensor in tensors if tensor is not None]


@_update_prior_backward.register_fake
def _(grad, z, initial, *weights):
    tensors = channels_last(z), channels_last(initial), *_contiguous(*weights)
    return [torch.empty_like(tensor) for tensor in tensors]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    grads = _update_prior_backward(grad, *ctx.saved_tensors)
    if len(grads) == 5:
        grads.insert(3, None)
    return tuple(grads)


_update_prior.register_autograd(_differentiate, setup_context=_save)


def update_prior(
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
) -> Tensor:
    """See :func:`mmoverlock.ops.update_prior`."""
    return _update_prior(
        channels_last(z),
        channels_last(initial),
        weight,
        bias,
        initial_weight,
        initial_bias,
    )
