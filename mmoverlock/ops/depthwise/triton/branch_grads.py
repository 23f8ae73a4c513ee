"""Gradients of what every branch makes of a map, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ...launching import jit
from .common import (
    SIZES,
    channels_of,
    convolve,
    layout_of,
    tile_of,
    widen,
    zeros,
)
from .rows import (
    convolve_rows,
    count_items,
    load_taps,
    member,
    place,
    plan_of,
    turn,
)
from .tap_grads import num_splits

KNOBS = dict(
    programs=396,  # at most
    copied=4,  # columns of the first branch that a thread takes at a time
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    programs=(264, 396, 792), copied=(2, 4, 8)
)


@jit(do_not_specialize=SIZES)
def _branch_grads_kernel(
    p_x,
    p_y,
    p_grad,
    p_taps,
    p_factors,
    p_out,
    channels: tl.constexpr,
    height,
    width,
    images,
    BRANCHES: tl.constexpr,
    FORMS: tl.constexpr,
    MEMBERS: tl.constexpr,
    LARGE: tl.constexpr,
    COPIED: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``p g - q y - o`` for every branch.

    x, y (of the first branch) and grad (B, H, W, C), taps (all taps, C),
    factors (3, branches, C), out (branches, B, H, W, C); grid (programs,
    blocks of channels). For FORMS, MEMBERS and LARGE, without the first
    branch, see :class:`rows.Plan`.
    """
    own = channels_of(tl.program_id(1), channels, CHANNELS)
    channel, m_channel = own
    shape = (images, height, width)
    positions = tl.cast(images, tl.int64) * height * width
    N: tl.constexpr = COLUMNS * COPIED
    p, q, o = _factors(p_factors, 0, len(BRANCHES), own, channels)
    for first in tl.range(
        tl.program_id(0).to(tl.int64) * N, positions, tl.num_programs(0) * N
    ):
        n = first + tl.arange(0, N)[:, None]
        m_value = m_channel & (n < positions)
        o_value = n * channels + channel
        b_grad = widen(tl.load(p_grad + o_value, mask=m_value, other=0))
        b_y = widen(tl.load(p_y + o_value, mask=m_value, other=0))
        b_out = (p * b_grad - q * b_y - o).to(p_out.dtype.element_ty)
        tl.store(p_out + o_value, b_out, mask=m_value)
    dealt = 0
    for i in tl.static_range(len(LARGE)):
        _of_tiles(
            p_x,
            p_grad,
            p_taps + BRANCHES[LARGE[i]][2] * channels,
            p_out + LARGE[i] * positions * channels,
            _factors(p_factors, LARGE[i], len(BRANCHES), own, channels),
            dealt,
            own,
            shape,
            channels,
            BRANCHES[LARGE[i]][0],
            BRANCHES[LARGE[i]][1],
            T,
            COLUMNS,
        )
        dealt += images * tl.cdiv(height, T) * tl.cdiv(width, COLUMNS)
    for form in tl.static_range(len(FORMS)):
        for i in tl.range(0, FORMS[form][4]):
            dilation, tap, b = member(
                i, MEMBERS, FORMS[form][3], FORMS[form][4]
            )
            _of_items(
                p_x,
                p_grad,
                p_taps + tap * channels,
                p_out + b * positions * channels,
                _factors(p_factors, b, len(BRANCHES), own, channels),
                dealt,
                own,
                shape,
                dilation,
                channels,
                FORMS[form][0],
                FORMS[form][1],
                FORMS[form][2],
            )
            items = count_items(shape, dilation, FORMS[form][2])
            dealt += tl.cdiv(items, FORMS[form][1])


@triton.jit
def _factors(
    p_factors, b, BRANCHES: tl.constexpr, own, channels: tl.constexpr
):
    """p, q and o (1, C) of a branch."""
    channel, m_channel = own
    p_first = p_factors + b * channels + channel
    p = tl.load(p_first, mask=m_channel, other=0)
    q = tl.load(p_first + BRANCHES * channels, mask=m_channel, other=0)
    o = tl.load(p_first + 2 * BRANCHES * channels, mask=m_channel, other=0)
    return p, q, o


@triton.jit
def _of_items(
    p_x,
    p_grad,
    p_taps,
    p_out,
    factors,
    dealt,
    own,
    shape,
    dilation,
    channels: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """The same of a small kernel: ``p g`` and, by taps ``-q w``, the rest."""
    p, q, o = factors
    plain = load_taps(p_taps, own, channels, K, N)
    taps = ()
    for i in tl.static_range(K * K):
        taps = taps + (-q * plain[i],)
    for start in tl.range(
        turn(dealt) * N,
        count_items(shape, dilation, T),
        tl.num_programs(0) * N,
        disable_licm=True,
    ):
        convolve_rows(
            _add_grad,
            (),
            (p_grad, p_out, p),
            p_x,
            taps,
            tl.broadcast_to(-o, taps[0].shape),
            place(start, own, shape, dilation, channels, T, N),
            shape,
            dilation,
            channels,
            K,
            T,
        )


@triton.jit
def _add_grad(state, operands, value, o_value, m_value):
    """Write values and the gradient's share."""
    p_grad, p_out, p = operands
    b_grad = widen(tl.load(p_grad + o_value, mask=m_value, other=0))
    b_out = tl.fma(p, b_grad, value).to(p_out.dtype.element_ty)
    tl.store(p_out + o_value, b_out, mask=m_value)
    return state


@triton.jit
def _of_tiles(
    p_x,
    p_grad,
    p_taps,
    p_out,
    factors,
    dealt,
    own,
    shape,
    channels: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same of a large kernel."""
    images, height, width = shape
    channel, m_channel = own
    p, q, o = factors
    tiles = images * tl.cdiv(height, T) * tl.cdiv(width, COLUMNS)
    for item in tl.range(
        turn(dealt), tiles, tl.num_programs(0), disable_licm=True
    ):
        row, col, o_row = tile_of(item, height, width, channels, T, COLUMNS)
        acc = convolve(
            zeros(T, (COLUMNS, channel.shape[1])),
            p_x + o_row,
            p_taps,
            height,
            width,
            channel,
            m_channel,
            row,
            col,
            channels,
            K,
            D,
            False,
            T,
        )
        o_tile = o_row + col * channels + channel
        for t in tl.static_range(T):
            m_value = m_channel & (col < width) & (row + t < height)
            o_value = o_tile + t * width * channels
            b_grad = widen(tl.load(p_grad + o_value, mask=m_value, other=0))
            b_out = (p * b_grad - q * acc[t] - o).to(p_out.dtype.element_ty)
            tl.store(p_out + o_value, b_out, mask=m_value)


def branch_grads(
    x: Tensor,
    first: Tensor,
    grad: Tensor,
    taps: Tensor,
    factors: Tensor,
    out: Tensor,
    branches: tuple,
) -> None:
    """Write ``p g - q y - o`` for every branch.

    Args:
        x, first, grad (Tensor): (B, C, H, W) in channels_last: the map, what
            the first branch makes of it, and the gradient of their sum.
        taps (Tensor): (all taps, C), in the dtype of x.
        factors (Tensor): p, q and o, (3, branches, C), float32.
        out (Tensor): (branches, B, C, H, W), each in channels_last.
        branches (tuple): Size, dilation and first tap of each.
    """
    if x.numel():
        layout = layout_of(x.shape)
        splits = num_splits(layout.tiles, layout.blocks, KNOBS['programs'])
        _branch_grads_kernel[splits, layout.blocks](
            x,
            first,
            grad,
            taps,
            factors,
            out,
            *x.shape[1:],
            len(x),
            BRANCHES=branches,
            COPIED=KNOBS['copied'],
            **plan_of(branches, x.shape[1], 1)._asdict(),
            **layout.constants,
        )
