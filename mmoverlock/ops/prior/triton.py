"""Kernels for maps in channels_last: one pass forward, one backward.

Forward, all channels are scaled, the features by 1, which changes no value.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..common import (
    cdiv,
    channels_last,
    custom_op,
    saved_tensors,
)
from ..launching import jit

SIZES = ('count', 'splits')


@triton.jit
def _load_weight(p_weight, o_prior, m_prior):
    """Weights (1, C) of priors, and 1 for features."""
    b_weight = tiles.load(p_weight, o_prior, m_prior)
    return tl.where(m_prior, b_weight, 1)[None]


@jit(do_not_specialize=SIZES)
def _forward_kernel(
    p_z,
    p_initial,
    p_weight,
    p_bias,
    p_initial_weight,
    p_initial_bias,
    p_out,
    count,
    channels,
    total,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = z weight + bias + initial initial_weight + initial_bias``.

    So it is of priors; features are copied. z and out (count, C + P), of
    which ``channels`` C of ``total`` are features; initial (count, P); weights
    and biases (P, ); grid (tiles of ROWS blocks of C + P, ).
    """
    tile, o_channel, m_channel = tiles.place(total, BLOCK)
    o_prior = o_channel - channels
    m_prior = m_channel & (o_prior >= 0)
    o_row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    m_z = (o_row < count) & m_channel[None]
    o_z = o_row.to(tl.int64) * total + o_channel[None]
    b_out = tiles.load(p_z, o_z, m_z) * _load_weight(
        p_weight, o_prior, m_prior
    )
    b_bias = tiles.load(p_initial_bias, o_prior, m_prior)
    if p_bias is not None:
        b_bias += tiles.load(p_bias, o_prior, m_prior)
    b_out += b_bias[None]
    o_initial = o_row.to(tl.int64) * (total - channels) + o_prior[None]
    b_initial = tiles.load(p_initial, o_initial, m_z & m_prior[None])
    b_initial *= tiles.load(p_initial_weight, o_prior, m_prior)[None]
    tiles.store(p_out, o_z, b_out + b_initial, m_z)


@jit(do_not_specialize=SIZES)
def _backward_kernel(
    p_grad,
    p_z,
    p_initial,
    p_weight,
    p_initial_weight,
    p_grad_initial,
    p_parts,
    count,
    channels,
    priors,
    splits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad_initial = grad initial_weight``, ``grad *= weight``, and sums.

    grad and z (count, C + P), of which the last ``priors`` P are read and
    written, initial and grad_initial (count, P); parts (splits, 3, P) of the
    sums over positions of ``grad z``, ``grad initial`` and ``grad``: gradients
    of the two weights, and of either bias; grid (splits blocks of P, ).
    """
    split, o_prior, m_prior = tiles.place(priors, BLOCK)
    b_weight = tiles.load(p_weight, o_prior, m_prior)[None]
    b_initial_weight = tiles.load(p_initial_weight, o_prior, m_prior)[None]
    b_grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    b_grad_initial_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    b_grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(split * ROWS, count, splits * ROWS):
        o_row = first + tl.arange(0, ROWS)[:, None]
        m_row = (o_row < count) & m_prior[None]
        o_initial = o_row.to(tl.int64) * priors + o_prior[None]
        o_z = o_initial + (o_row.to(tl.int64) + 1) * channels
        b_grad = tiles.load(p_grad, o_z, m_row)
        b_z = tiles.load(p_z, o_z, m_row)
        b_grad_weight = tl.fma(b_grad, b_z, b_grad_weight)
        b_initial = tiles.load(p_initial, o_initial, m_row)
        b_grad_initial_weight = tl.fma(
            b_grad, b_initial, b_grad_initial_weight
        )
        b_grad_bias += b_grad
        tiles.store(p_grad, o_z, b_grad * b_weight, m_row)
        b_grad *= b_initial_weight
        tiles.store(p_grad_initial, o_initial, b_grad, m_row)
    o_part = split.to(tl.int64) * 3 * priors + o_prior
    tl.store(p_parts + o_part, tl.sum(b_grad_weight, 0), mask=m_prior)
    o_part += priors
    tl.store(p_parts + o_part, tl.sum(b_grad_initial_weight, 0), mask=m_prior)
    o_part += priors
    tl.store(p_parts + o_part, tl.sum(b_grad_bias, 0), mask=m_prior)


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
        num_warps=tiles.KNOBS['warps'],
    )
    return out


def backward(
    grad: Tensor,
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    initial_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """One launch; arguments as in :func:`forward`.

    The gradient is made that of z in place.

    Returns:
        tuple[Tensor, Tensor]: Gradient of the initial prior, and partial sums
        for :func:`partial_sums.add`, (parts, 3, P): of the two weights, and
        of either bias.
    """
    grad_initial = torch.empty_like(initial)
    total, priors = z.shape[1], initial.shape[1]
    count = z.numel() // total
    rows, block = tiles.form(priors)
    blocks = cdiv(priors, block)
    slots = partial_sums.programs(z.device, tiles.KNOBS['resident'])
    splits = min(cdiv(count, rows), cdiv(slots, blocks))
    partial = z.new_empty(splits, 3, priors, dtype=torch.float32)
    _backward_kernel[(splits * blocks,)](
        grad,
        z,
        initial,
        weight,
        initial_weight,
        grad_initial,
        partial,
        count,
        total - priors,
        priors,
        splits,
        ROWS=rows,
        BLOCK=block,
        num_warps=tiles.KNOBS['warps'],
    )
    return grad_initial, partial


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
def _(
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
) -> Tensor:
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
    grad_z = channels_last(grad).clone()
    grad_initial, partial = backward(
        grad_z, z, initial, weights[0], weights[-2]
    )
    jobs = [(partial, grad_weight, grad_initial_weight, grad_initial_bias)]
    if bias is not None:  # the same, in memory of its own
        jobs.append((partial, None, None, *grad_bias))
    partial_sums.add(*jobs)
    return [grad_z, grad_initial, *results]


def _contiguous(*tensors) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors if tensor is not None]


@_update_prior_backward.register_fake
def _(grad: Tensor, z: Tensor, initial: Tensor, *weights) -> list[Tensor]:
    tensors = channels_last(z), channels_last(initial), *_contiguous(*weights)
    return [torch.empty_like(tensor) for tensor in tensors]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _update_prior_backward(grad, *saved_tensors(ctx))
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
