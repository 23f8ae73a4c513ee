"""Kernels for maps in channels_last.

With P positions of an image, t the sum over them of ``grad f(gate) x``, f SiLU
or the identity, and g of h the slope of GELU::

    m = mean(x),  h = W1 m + b1,  s = sigmoid(W2 gelu(h) + b2)
    out = x f(gate) s
    da = t s (1 - s),  dh = (W2' da) g(h),  dm = W1' dh / P
    grad of x = grad f(gate) s + dm,  grad of gate = grad x s f'(gate)

Forward, a map is read for its mean and read again with the gate for the
product; backward, grad, gate and x are read for t and read again for both
gradients. What is (B, C) or (B, D) is done by one program an image, which
also makes the sums over positions where there are few of those, and saves
a launch.

Batch norms in training mode come before where x and the gate are what they
return: of n = (z - mean(z)) r with r = 1 / sqrt(var(z) + eps), x is a n + b or
the sum of two such. Maps z are read for their statistics, image by image, in
place of the mean. With N values a channel in a batch and d the gradient of
a n + b::

    grad of z = a r (d - mean(d) - n mean(d n))

Of x, d is ``u s + dm`` with u = grad f(gate), so that sums over images of u
and u n have all that is needed for t and for both means, whatever dm will be:
sum(d) = s sum(u) + P dm, sum(d n) = s sum(u n) + dm sum(n).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..activations import gelu, gelu_slope
from ..batch_norm.triton import (
    load_norm,
    load_normal,
    split,
    store_norm_grad,
    sum_products,
    total,
)
from ..common import (
    cdiv,
    channels_last,
    custom_op,
    next_power_of_2,
    saved_tensors,
)
from ..launching import jit
from ..pointwise.triton import PRECISION

SIZES = ('positions', 'parts', 'splits', 'count', 'batch')
KNOBS = dict(  # of one program an image, but for the last
    few=256,  # positions, at most, that are not added up by others before
    parts=(4, 16, 64, 128),  # positions or partial sums, added at a time
    weight=4096,  # values of a weight, at a time
    channels=64,  # of a weight, at most
    warps=8,
    registers=128,  # at most: left to itself, ptxas spills to have fewer
    weights=dict(BATCH=16, CHANNELS=32, HIDDEN=16),  # a tile of gradients
)


@jit(do_not_specialize=SIZES)
def _pool_kernel(
    p_x,
    p_factor,
    p_gate,
    p_parts,
    positions,
    splits,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parts of sums over an image of a map or of a product of maps.

    Maps (B, P, C), parts (B, splits, C); grid (B splits blocks of C, ).
    """
    part, o_channel, m_channel, o_x, rows = tiles.part_of(
        positions, splits, channels, BLOCK
    )
    p_x += o_x
    if p_factor is not None:
        p_factor += o_x
    if p_gate is not None:
        p_gate += o_x
    b_sum = tiles.sum_rows(
        p_x,
        p_factor,
        p_gate,
        rows,
        channels,
        o_channel,
        m_channel,
        ROWS,
    )
    o_part = part * channels + o_channel
    tl.store(p_parts + o_part, b_sum, mask=m_channel)


@jit(do_not_specialize=SIZES)
def _scale_kernel(
    p_x,
    p_norms,
    p_weight1,
    p_bias1,
    p_weight2,
    p_bias2,
    p_state,
    parts,
    positions,
    channels,
    hidden,
    NORMS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Mean, scale and hidden values of an image; grid (B, ).

    x (B, parts, C) is added up; with NORMS that are added up, it is (B,
    parts, 3 N, C): statistics for norms (N, 5, C), of which there is one more
    if NORMS is not 1. state (B, (2 + NORMS) C + D): m, s, the mean of n of
    each norm, h.
    """
    image = tl.program_id(0).to(tl.int64)
    step = channels if NORMS == 0 else (9 if NORMS > 1 else 3) * channels
    p_x += image * parts * step
    p_state += image * ((2 + NORMS) * channels + hidden)
    o_hidden = tl.arange(0, HIDDEN)
    m_hidden = o_hidden < hidden
    p_hidden = p_state + (2 + NORMS) * channels + o_hidden
    acc = tl.zeros((HIDDEN, CHANNELS), tl.float32)
    for first in range(0, channels, CHANNELS):
        o_channel = first + tl.arange(0, CHANNELS)
        m_channel = o_channel < channels
        mean = tl.zeros((CHANNELS,), tl.float32)
        for n in tl.static_range(1 if NORMS == 0 else NORMS):
            p_sum, p_count = p_x, None
            if NORMS > 0:  # a mean times a number
                p_count = p_x + n * 3 * channels
                p_sum = p_count + channels
            b_mean = tiles.sum_rows(
                p_sum,
                p_count,
                None,
                parts,
                step,
                o_channel,
                m_channel,
                PARTS,
            )
            b_mean /= positions
            if NORMS > 0:
                b_scale, b_shift, b_center, b_rstd = load_norm(
                    p_norms, n, o_channel, m_channel, channels
                )
                b_mean = (b_mean - b_center) * b_rstd
                p_mean = p_state + (2 + n) * channels + o_channel
                tl.store(p_mean, b_mean, mask=m_channel)
                b_mean = tl.fma(b_mean, b_scale, b_shift)
            mean += b_mean
        tl.store(p_state + o_channel, mean, mask=m_channel)
        o_weight = o_hidden[:, None] * channels + o_channel[None]
        m_weight = m_hidden[:, None] & m_channel[None]
        b_weight = tiles.load(p_weight1, o_weight, m_weight)
        acc = tl.fma(b_weight, tl.broadcast_to(mean[None], acc.shape), acc)
    h = tl.sum(acc, 1) + tiles.load(p_bias1, o_hidden, m_hidden)
    tl.store(p_hidden, h, mask=m_hidden)
    h = gelu(h)
    for first in range(0, channels, CHANNELS):
        o_channel = first + tl.arange(0, CHANNELS)
        m_channel = o_channel < channels
        o_weight = o_channel[:, None] * hidden + o_hidden[None]
        m_weight = m_channel[:, None] & m_hidden[None]
        b_weight = tiles.load(p_weight2, o_weight, m_weight)
        a = tl.sum(b_weight * h[None], 1)
        a += tiles.load(p_bias2, o_channel, m_channel)
        p_scale = p_state + channels + o_channel
        tl.store(p_scale, tl.sigmoid(a), mask=m_channel)


@triton.jit
def _load_maps(
    p_x, p_other, p_gate, p_norms, o_x, m_x, o_channel, m_channel, channels
):
    """x and the gate, and the n of every map; see :func:`_apply_kernel`.

    Without a gate or norms, what there is not is x: Triton 3.6 has no None
    among results.
    """
    if p_norms is None:
        b_x = tiles.load(p_x, o_x, m_x)
        b_gate, n_x, n_other, n_gate = b_x, b_x, b_x, b_x
        if p_gate is not None:
            b_gate = tiles.load(p_gate, o_x, m_x)
    else:
        n_x, b_x = load_normal(
            p_x, o_x, m_x, p_norms, 0, o_channel, m_channel, channels
        )
        b_gate, n_other, n_gate = b_x, b_x, b_x
        if p_gate is not None:
            n_other, b_other = load_normal(
                p_other, o_x, m_x, p_norms, 1, o_channel, m_channel, channels
            )
            n_gate, b_gate = load_normal(
                p_gate, o_x, m_x, p_norms, 2, o_channel, m_channel, channels
            )
            b_x += b_other
    return b_x, b_gate, n_x, n_other, n_gate


@jit(do_not_specialize=SIZES)
def _apply_kernel(
    p_x,
    p_other,
    p_gate,
    p_norms,
    p_state,
    p_out,
    state,
    SILU: tl.constexpr,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = x f(gate) s[image]``.

    Maps (B, P, C), state (B, state); grid (B count blocks of C, ). With norms
    (N, 5, C), x is a norm of x or, where there is a gate, the sum of one of x
    and one of other, and the gate is a norm of gate.
    """
    image, o_channel, m_channel, o_x, m_x = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    b_x, b_gate, _, _, _ = _load_maps(
        p_x, p_other, p_gate, p_norms, o_x, m_x, o_channel, m_channel, channels
    )
    if p_gate is not None:
        b_x *= tiles.open_gate(b_gate, SILU)[0]
    p_scale = p_state + image * state + channels
    b_x *= tiles.load(p_scale, o_channel, m_channel)[None]
    tiles.store(p_out, o_x, b_x, m_x)


@jit(do_not_specialize=SIZES)
def _products_kernel(
    p_grad,
    p_x,
    p_other,
    p_gate,
    p_norms,
    p_parts,
    positions,
    splits,
    channels,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parts of sums over an image of u n, u, u n of the other map, v n of the
    gate and v.

    u = grad f(gate), v = grad x f'(gate); maps (B, P, C), norms (3, 5, C),
    see above; parts (B, splits, 5, C); grid (B splits blocks of C, ). Without
    a gate, it is that of a norm by itself.
    """
    part, o_channel, m_channel, o_first, rows = tiles.part_of(
        positions, splits, channels, BLOCK
    )
    sum_n = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_u = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_other = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_gate = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_v = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        m_x = (row < rows) & m_channel[None]
        o_x = o_first + row * channels + o_channel[None]
        b_x, b_gate, n_x, n_other, n_gate = _load_maps(
            p_x,
            p_other,
            p_gate,
            p_norms,
            o_x,
            m_x,
            o_channel,
            m_channel,
            channels,
        )
        u = tiles.load(p_grad, o_x, m_x)
        b_open, b_slope = tiles.open_gate(b_gate, SILU)
        v = u * b_x * b_slope
        u *= b_open
        sum_v += v
        sum_gate = tl.fma(v, n_gate, sum_gate)
        sum_other = tl.fma(u, n_other, sum_other)
        sum_u += u
        sum_n = tl.fma(u, n_x, sum_n)
    p_part = p_parts + part * 5 * channels + o_channel
    tl.store(p_part, tl.sum(sum_n, 0), mask=m_channel)
    tl.store(p_part + channels, tl.sum(sum_u, 0), mask=m_channel)
    p_part += 2 * channels
    tl.store(p_part, tl.sum(sum_other, 0), mask=m_channel)
    tl.store(p_part + channels, tl.sum(sum_gate, 0), mask=m_channel)
    tl.store(p_part + 2 * channels, tl.sum(sum_v, 0), mask=m_channel)


@triton.jit
def _sum_parts(
    p_parts,
    n: tl.constexpr,
    parts,
    step,
    o_channel,
    m_channel,
    channels,
    PARTS: tl.constexpr,
):
    """Sum n of an image, from :func:`_products_kernel`."""
    p_part = p_parts + n * channels
    return tiles.sum_rows(
        p_part, None, None, parts, step, o_channel, m_channel, PARTS
    )


@jit(do_not_specialize=SIZES)
def _scale_grad_kernel(
    p_grad,
    p_x,
    p_gate,
    p_norms,
    p_weight1,
    p_weight2,
    p_state,
    p_grads,
    p_sums,
    parts,
    positions,
    channels,
    hidden,
    NORMS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Gradients dm, da and dh of an image; grid (B, ).

    The product of grad (B, parts, C), x and gate, if there are those two, is
    added up to t. With NORMS, grad is the parts (B, parts, 2 or 5, C) of
    :func:`_products_kernel`, and sums (B, 2 N, C) are those over the image of
    d n and d for each of the N norms (N, 5, C). state as in
    :func:`_scale_kernel`, grads (B, 2 C + D).
    """
    image = tl.program_id(0).to(tl.int64)
    SUMS: tl.constexpr = 2 if NORMS == 1 else 5
    step = channels if NORMS == 0 else SUMS * channels
    p_grad += image * parts * step
    if p_x is not None:
        p_x += image * parts * step
    if p_gate is not None:
        p_gate += image * parts * step
    p_state += image * ((2 + NORMS) * channels + hidden)
    p_grads += image * (2 * channels + hidden)
    o_hidden = tl.arange(0, HIDDEN)
    m_hidden = o_hidden < hidden
    acc = tl.zeros((CHANNELS, HIDDEN), tl.float32)
    for first in range(0, channels, CHANNELS):
        o_channel = first + tl.arange(0, CHANNELS)
        m_channel = o_channel < channels
        if NORMS == 0:
            t = tiles.sum_rows(
                p_grad,
                p_x,
                p_gate,
                parts,
                step,
                o_channel,
                m_channel,
                PARTS,
            )
        else:
            t = tl.zeros((CHANNELS,), tl.float32)
            sum_u = _sum_parts(
                p_grad, 1, parts, step, o_channel, m_channel, channels, PARTS
            )
            for n in tl.static_range(NORMS):
                sum_n = _sum_parts(
                    p_grad,
                    2 * n,
                    parts,
                    step,
                    o_channel,
                    m_channel,
                    channels,
                    PARTS,
                )
                b_scale, b_shift, _, _ = load_norm(
                    p_norms, n, o_channel, m_channel, channels
                )
                t += b_scale * sum_n + b_shift * sum_u
        s = tiles.load(p_state + channels, o_channel, m_channel)
        da = t * s * (1 - s)
        tl.store(p_grads + channels + o_channel, da, mask=m_channel)
        o_weight = o_channel[:, None] * hidden + o_hidden[None]
        m_weight = m_channel[:, None] & m_hidden[None]
        b_weight = tiles.load(p_weight2, o_weight, m_weight)
        acc = tl.fma(b_weight, tl.broadcast_to(da[:, None], acc.shape), acc)
    dh = tl.sum(acc, 0)
    p_hidden = p_state + (2 + NORMS) * channels
    dh *= gelu_slope(tiles.load(p_hidden, o_hidden, m_hidden))
    tl.store(p_grads + 2 * channels + o_hidden, dh, mask=m_hidden)
    for first in range(0, channels, CHANNELS):
        o_channel = first + tl.arange(0, CHANNELS)
        m_channel = o_channel < channels
        o_weight = o_hidden[:, None] * channels + o_channel[None]
        m_weight = m_hidden[:, None] & m_channel[None]
        b_weight = tiles.load(p_weight1, o_weight, m_weight)
        dm = tl.sum(b_weight * dh[:, None], 0) / positions
        tl.store(p_grads + o_channel, dm, mask=m_channel)
        if NORMS > 0:
            s = tiles.load(p_state + channels, o_channel, m_channel)
            p_sum = p_sums + image * (2 * NORMS + 2 * (NORMS > 1)) * channels
            p_sum += o_channel
            sum_d = s * _sum_parts(
                p_grad, 1, parts, step, o_channel, m_channel, channels, PARTS
            )
            dm *= positions
            sum_d += dm
            for n in tl.static_range(NORMS):
                sum_n = s * _sum_parts(
                    p_grad,
                    2 * n,
                    parts,
                    step,
                    o_channel,
                    m_channel,
                    channels,
                    PARTS,
                )
                p_mean = p_state + (2 + n) * channels
                mean = tiles.load(p_mean, o_channel, m_channel)
                sum_n = tl.fma(dm, mean, sum_n)
                tl.store(p_sum, sum_n, mask=m_channel)
                tl.store(p_sum + channels, sum_d, mask=m_channel)
                p_sum += 2 * channels
            if NORMS == 2:
                for n in tl.static_range(2):
                    sum_v = s * _sum_parts(
                        p_grad,
                        3 + n,
                        parts,
                        step,
                        o_channel,
                        m_channel,
                        channels,
                        PARTS,
                    )
                    tl.store(p_sum + n * channels, sum_v, mask=m_channel)


@jit(do_not_specialize=SIZES)
def _weights_grad_kernel(
    p_state,
    p_grads,
    p_sums,
    p_grad_weight1,
    p_grad_bias1,
    p_grad_weight2,
    p_grad_bias2,
    p_grad_norms,
    batch,
    state,
    channels,
    hidden,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Sums over images; grid (blocks of C, blocks of D).

    Those of sums (B, ROWS, C) are the gradients of the norms, (ROWS, C).
    """
    o_channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    o_hidden = tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    m_channel = o_channel < channels
    m_hidden = o_hidden < hidden
    p_hidden = p_state + state - hidden
    sum_weight1 = tl.zeros((HIDDEN, CHANNELS), tl.float32)
    sum_weight2 = tl.zeros((CHANNELS, HIDDEN), tl.float32)
    sum_bias1 = tl.zeros((HIDDEN,), tl.float32)
    sum_bias2 = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, batch, BATCH):
        image = (first + tl.arange(0, BATCH)[:, None]).to(tl.int64)
        o_grad = image * (2 * channels + hidden)
        m_x = (image < batch) & m_channel[None]
        m = tiles.load(p_state, image * state + o_channel[None], m_x)
        p_da = p_grads + channels
        da = tiles.load(p_da, o_grad + o_channel[None], m_x)
        m_h = (image < batch) & m_hidden[None]
        h = tiles.load(p_hidden, image * state + o_hidden[None], m_h)
        h = gelu(h)
        p_dh = p_grads + 2 * channels
        dh = tiles.load(p_dh, o_grad + o_hidden[None], m_h)
        sum_weight1 = tl.dot(
            tl.trans(dh), m, acc=sum_weight1, input_precision=PRECISION
        )
        sum_weight2 = tl.dot(
            tl.trans(da), h, acc=sum_weight2, input_precision=PRECISION
        )
        sum_bias1 += tl.sum(dh, 0)
        sum_bias2 += tl.sum(da, 0)
    o_weight = o_hidden[:, None] * channels + o_channel[None]
    m_weight = m_hidden[:, None] & m_channel[None]
    tiles.store(p_grad_weight1, o_weight, sum_weight1, m_weight)
    o_weight = o_channel[:, None] * hidden + o_hidden[None]
    m_weight = m_channel[:, None] & m_hidden[None]
    tiles.store(p_grad_weight2, o_weight, sum_weight2, m_weight)
    if tl.program_id(0) == 0:
        tiles.store(p_grad_bias1, o_hidden, sum_bias1, m_hidden)
    if tl.program_id(1) == 0:
        tiles.store(p_grad_bias2, o_channel, sum_bias2, m_channel)
    if p_sums is not None:
        for n in range(tl.program_id(1), ROWS, tl.num_programs(1)):
            o_sum = n * channels + o_channel
            b_sum = tiles.sum_rows(
                p_sums + n * channels,
                None,
                None,
                batch,
                ROWS * channels,
                o_channel,
                m_channel,
                BATCH,
            )
            tiles.store(p_grad_norms, o_sum, b_sum, m_channel)


@jit(do_not_specialize=SIZES)
def _apply_grad_kernel(
    p_grad,
    p_x,
    p_other,
    p_gate,
    p_norms,
    p_sums,
    p_state,
    p_grads,
    p_grad_x,
    p_grad_other,
    p_grad_gate,
    state,
    hidden,
    SILU: tl.constexpr,
    positions,
    count,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the maps; arguments as in :func:`_apply_kernel`.

    sums (2 N, C), over all images and processes, of d n and d for each of N
    norms; grads (B, 2 C + D).
    """
    image, o_channel, m_channel, o_x, m_x = tiles.locate(
        positions, count, channels, ROWS, BLOCK
    )
    b_x, b_gate, n_x, n_other, n_gate = _load_maps(
        p_x, p_other, p_gate, p_norms, o_x, m_x, o_channel, m_channel, channels
    )
    d = tiles.load(p_grad, o_x, m_x)
    p_scale = p_state + image * state + channels
    d *= tiles.load(p_scale, o_channel, m_channel)[None]
    d_gate = None
    if p_gate is not None:
        b_open, b_slope = tiles.open_gate(b_gate, SILU)
        d_gate = d * b_x * b_slope
        d *= b_open
    p_dm = p_grads + image * (2 * channels + hidden)
    d += tiles.load(p_dm, o_channel, m_channel)[None]
    if p_norms is None:
        tiles.store(p_grad_x, o_x, d, m_x)
        if p_gate is not None:
            tiles.store(p_grad_gate, o_x, d_gate, m_x)
    else:
        store_norm_grad(
            p_grad_x,
            d,
            n_x,
            o_x,
            m_x,
            p_norms,
            p_sums,
            0,
            o_channel,
            m_channel,
            channels,
        )
        if p_gate is not None:
            store_norm_grad(
                p_grad_other,
                d,
                n_other,
                o_x,
                m_x,
                p_norms,
                p_sums,
                1,
                o_channel,
                m_channel,
                channels,
            )
            store_norm_grad(
                p_grad_gate,
                d_gate,
                n_gate,
                o_x,
                m_x,
                p_norms,
                p_sums,
                2,
                o_channel,
                m_channel,
                channels,
            )


def sum_positions(
    x: Tensor, factor: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """One launch where there are many positions, and none elsewhere.

    Returns:
        tuple[Tensor, Tensor | None, Tensor | None, int]: What a program an
        image adds up to the sum over positions of the product of the maps:
        those, or partial sums and twice None; and how many of them.
    """
    positions = x.shape[2:].numel()
    if positions <= KNOBS['few']:
        return x, factor, gate, positions
    splits, programs, settings = split(x)
    parts = x.new_empty(len(x), splits, x.shape[1], dtype=torch.float32)
    _pool_kernel[(programs,)](
        x,
        factor,
        gate,
        parts,
        positions,
        splits,
        x.shape[1],
        **settings,
    )
    return parts, None, None, splits


def _settings(hidden: int, parts: int) -> dict[str, int]:
    """Constants of a kernel with one program an image."""
    hidden = next_power_of_2(hidden)
    counts = KNOBS['parts']
    return dict(
        # Few values, as each is compiled for; with fewer than 4 parts, ptxas
        # spills on capability 8.0.
        PARTS=next(n for n in counts if n >= min(parts, counts[-1])),
        CHANNELS=max(1, min(KNOBS['channels'], KNOBS['weight'] // hidden)),
        HIDDEN=hidden,
        num_warps=KNOBS['warps'],
        maxnreg=KNOBS['registers'],
    )


def forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
    silu: bool = False,
    other: Tensor | None = None,
    measured: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Two launches, and one more where there are many positions.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight1, bias1, weight2, bias2 (Tensor): Contiguous, of any dtype.
        gate (Tensor, optional): (B, C, H, W), in channels_last.
        silu (bool): Whether f is SiLU. Defaults to False.
        other (Tensor, optional): (B, C, H, W), in channels_last.
        measured (tuple, optional): The result of
            :func:`mmoverlock.ops.batch_norm.triton.measure` for x or, if there
            is a gate, for x, other and gate, which are normalized then.
            Defaults to None: x and gate are taken as they are.

    Returns:
        tuple[Tensor, Tensor]: The result, and for the gradient m, s, the
        means of what is normalized, and h, (B, 2 C + ... + D), in single
        precision.
    """
    batch, channels, height, width = x.shape
    hidden = len(weight1)
    if measured is None:
        norms, count = None, 0
        summed, _, _, parts = sum_positions(x, None, None)
    else:
        summed, norms = measured
        parts, _, _ = split(x)
        count = _summands(norms)
    state = x.new_empty(
        batch, (2 + count) * channels + hidden, dtype=torch.float32
    )
    y = torch.empty_like(x)
    _scale_kernel[(batch,)](
        summed,
        norms,
        weight1,
        bias1,
        weight2,
        bias2,
        state,
        parts,
        height * width,
        channels,
        hidden,
        NORMS=count,
        **_settings(hidden, parts),
    )
    tiles.launch(
        _apply_kernel,
        x,
        x,
        other,
        gate,
        norms,
        state,
        y,
        state.shape[1],
        silu,
    )
    return y, state


def _summands(norms: Tensor) -> int:
    """The number of norms that are added up: all but that of the gate."""
    return 1 if len(norms) == 1 else 2


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
    other: Tensor | None = None,
    norms: Tensor | None = None,
    group: Any = None,
    grad_x: Tensor | None = None,
    grad_gate: Tensor | None = None,
) -> list[Tensor]:
    """Three launches, and one more where there are many positions or norms.

    Norms of a group of processes have their sums exchanged. Gradients of x
    and the gate may be given memory.

    Returns:
        list[Tensor]: The gradients of x, the weights and biases in their
        order, and, if there are those, of the gate and of other; with norms,
        those of scale and shift of each in the end, (2 N, C), in single
        precision.
    """
    batch, channels, height, width = x.shape
    hidden = len(weight1)
    grads = x.new_empty(batch, 2 * channels + hidden, dtype=torch.float32)
    if grad_x is None:
        grad_x = torch.empty_like(x)
    if grad_gate is None and gate is not None:
        grad_gate = torch.empty_like(gate)
    weights = weight1, bias1, weight2, bias2
    results = [grad_x, *map(torch.empty_like, weights)]
    grad_other = None if other is None else torch.empty_like(other)
    sums = grad_norms = None
    count = rows = 0
    if norms is None:
        *summed, parts = sum_positions(grad, x, gate)
    else:
        count, rows = _summands(norms), 2 * len(norms)
        parts, programs, settings = split(x)
        sums = grads.new_empty(batch, rows, channels)
        grad_norms = grads.new_empty(rows, channels)
        if gate is None:
            products = sum_products(grad, x, norms)
        else:
            products = grads.new_empty(batch, parts * 5, channels)
            _products_kernel[(programs,)](
                grad,
                x,
                other,
                gate,
                norms,
                products,
                height * width,
                parts,
                channels,
                SILU=silu,
                **settings,
            )
        summed = products, None, None
    _scale_grad_kernel[(batch,)](
        *summed,
        norms,
        weight1,
        weight2,
        state,
        grads,
        sums,
        parts,
        height * width,
        channels,
        hidden,
        NORMS=count,
        **_settings(hidden, parts),
    )
    tile = KNOBS['weights']
    grid = cdiv(channels, tile['CHANNELS']), cdiv(hidden, tile['HIDDEN'])
    _weights_grad_kernel[grid](
        state,
        grads,
        sums,
        *results[1:],
        grad_norms,
        batch,
        state.shape[1],
        channels,
        hidden,
        ROWS=rows,
        **tile,
    )
    tiles.launch(
        _apply_grad_kernel,
        x,
        grad,
        x,
        other,
        gate,
        norms,
        None if norms is None else total(grad_norms, group),
        state,
        grads,
        grad_x,
        grad_other,
        grad_gate,
        state.shape[1],
        hidden,
        silu,
    )
    others = grad_gate, grad_other, grad_norms
    return [*results, *(t for t in others if t is not None)]


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
) -> tuple[Tensor, Tensor]:
    """See :func:`forward`."""
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return _empty_outputs(x, weight1)
    if gate is not None:
        gate = channels_last(gate)
    weights = (t.contiguous() for t in (weight1, bias1, weight2, bias2))
    return forward(x, *weights, gate)


@_squeeze_excite.register_fake
def _(x: Tensor, weight1: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
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
) -> list[Tensor]:
    """See :func:`backward`."""
    weights = [t.contiguous() for t in (weight1, bias1, weight2, bias2)]
    x = channels_last(x)
    if gate is not None:
        gate = channels_last(gate)
    if not x.numel():
        tensors = x, *weights, gate
        return [torch.zeros_like(t) for t in tensors if t is not None]
    return backward(channels_last(grad), x, *weights, gate, state)


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
) -> list[Tensor]:
    results = [torch.empty_like(channels_last(x))]
    for weight in (weight1, bias1, weight2, bias2):
        results.append(torch.empty_like(weight.contiguous()))
    if gate is not None:
        results.append(torch.empty_like(channels_last(gate)))
    return results


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grads = _squeeze_excite_backward(grad, *saved_tensors(ctx))
    return tuple([*grads, None][:6])


_squeeze_excite.register_autograd(_differentiate, setup_context=_save)


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.squeeze_excite`."""
    x = channels_last(x)
    if gate is not None:
        gate = channels_last(gate)
    return _squeeze_excite(x, weight1, bias1, weight2, bias2, gate)[0]
