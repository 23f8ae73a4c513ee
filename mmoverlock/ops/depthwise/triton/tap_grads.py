"""Gradients of weights of depthwise convolutions that read one map.

The gradient of a tap is the sum of products of the gradient and of the map, as
far apart as the tap is from the center. A program has some rows of a kernel.
Every thread goes along a row of the gradient, ``D`` columns at a time, and
keeps what the taps of these rows see of the map in registers: a step loads one
value of the gradient and one of each row of the map, for as many multiply-adds
as there are taps.

Where only the sum of the gradient times what a convolution made is asked for,
which is its taps times the gradients of these, programs multiply the two.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from ...common import cdiv
from ...launching import jit
from .common import SIZES, channel_block, channels_of, tap_at, widen, zeros

LOADS = tl.constexpr(8)  # at a time, of a thread that adds up a gradient
# A thread has TAPS of a kernel at most, or else a row, and of values as many
# channels as there are BYTES for all. Rows of a map are unrolled by the first
# of STEPS which a kernel is not larger than, but as a whole where maps have up
# to NARROW columns, which kernels are compiled for. The second number of
# registers is for other maps in single precision: there the compiler takes
# 167, but spills 192 bytes if 168 are all. Programs are so many where there is
# enough to do.
KNOBS = dict(
    TAPS=17,
    BYTES=1024,
    STEPS=(4, 7, 14, 28),
    NARROW=16,
    warps=4,
    registers=(168, 255),
    programs=792,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    TAPS=(9, 17, 26, 34),
    BYTES=(512, 1024),
    STEPS=((4, 7, 14, 28), (4, 7, 14, 21), (7, 14, 28)),
    NARROW=(0, 7, 16),
    warps=(2, 4),
    registers=((168, 255), (255, 255), (128, 128)),
    programs=(396, 792, 1584),
)


@jit(do_not_specialize=SIZES)
def _tap_grads_kernel(
    p_x,
    p_grads,
    p_taps,
    p_parts,
    channels: tl.constexpr,
    height,
    width,
    images,
    BRANCHES: tl.constexpr,
    INNER: tl.constexpr,
    FORMS: tl.constexpr,
    SUMS: tl.constexpr,
    SUM: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Parts of the gradients of the taps of all branches.

    ``parts[b, tap] = sum over n of grads[b, n] x[n + tap]``

    x (B, H, W, C), grads (branches, B, H, W, C), parts (splits, SUMS, C); grid
    (programs of all kernels, blocks of channels, splits). FORMS has, for each
    branch, its first program, the rows of a program and the steps of the loop
    over columns. WIDTH is that of the map or, if it may be any, 0. If there is
    a SUM, the last program adds up the first gradient, the last of SUMS.

    With taps (all taps, C) of INNER branches, parts (splits programs, SUMS, C)
    are what a program adds to the sums of theirs times ``parts[0]``, and SUM.
    """
    program = tl.program_id(0)
    split = tl.program_id(2)
    channel, m_channel = channels_of(tl.program_id(1), channels, CHANNELS)
    o_branch = tl.cast(images, tl.int64) * height * width * channels
    part = tl.cast(split, tl.int64)
    if len(INNER):
        part = part * tl.num_programs(0) + program
    p_part = p_parts + part * SUMS * channels + channel
    for b in tl.static_range(len(BRANCHES)):
        first = (program - FORMS[b][0]) * FORMS[b][1]
        if (first >= 0) & (first < BRANCHES[b][0]):
            _rows(
                p_x,
                p_grads + b * o_branch,
                p_taps,
                p_part,
                split,
                channel,
                m_channel,
                first,
                height,
                width,
                images,
                channels,
                BRANCHES[b][0],
                BRANCHES[b][1],
                BRANCHES[b][2],
                FORMS[b][1],
                FORMS[b][2],
                INNER,
                WIDTH,
                N,
            )
    if SUM:
        if program == tl.num_programs(0) - 1:
            _total(
                p_grads,
                p_part,
                split,
                channel,
                m_channel,
                images * height * width,
                channels,
                len(INNER),
                SUMS,
                N,
            )


@triton.jit
def _rows(
    p_x,
    p_grad,
    p_taps,
    p_part,
    split,
    channel,
    m_channel,
    first,
    height,
    width,
    images,
    channels: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TAP: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
):
    """Rows ``first`` to ``first + R - 1`` of the kernel of a branch."""
    HALF: tl.constexpr = K // 2
    lanes: tl.constexpr = (N, channel.shape[1])
    step = width * channels
    # The gradient's rows which one of the kernel's sees something from
    last = tl.minimum(first + R, K) - 1
    top = tl.maximum((HALF - last) * D, 0)
    rows = tl.minimum(height + (HALF - first) * D, height) - top
    rows = tl.maximum(rows, 0)
    items = images * rows * D
    acc = zeros(R * K, lanes)
    for start in tl.range(split * N, items, tl.num_programs(2) * N):
        item = start + tl.arange(0, N)[:, None]
        col = item % D
        row = top + item // D % rows
        image = (item // D // rows).to(tl.int64)
        o_first = ((image * height + row) * width + col) * channels + channel
        m_grad = m_channel & (item < items)
        p_rows = ()
        m_rows = ()
        window = ()  # of each row, what all taps but the last see
        for r in tl.static_range(R):
            away = (first + r - HALF) * D
            m_row = m_grad & (row + away >= 0) & (row + away < height)
            m_rows = m_rows + (m_row,)
            p_rows = p_rows + (p_x + o_first + away * step,)
            window = window + zeros(HALF, lanes)
            for k in tl.static_range(HALF):
                b_x = _load(
                    p_rows[r], k, width - col, m_row, channels, D, WIDTH
                )
                window = window + (b_x,)
        # One pass, where the width is known
        for x in tl.range(0, WIDTH if WIDTH else width, STEPS * D):
            acc, window = _along(
                acc,
                window,
                p_grad + o_first,
                p_rows,
                m_grad,
                m_rows,
                width - col,
                x,
                channels,
                K,
                D,
                R,
                STEPS,
                WIDTH,
            )
    sums = ()
    for i in tl.static_range(R * K):
        sums = sums + (tl.sum(acc[i], 0)[None],)
    if len(INNER):
        for b in tl.static_range(len(INNER)):
            product = tl.zeros_like(sums[0])
            for i in tl.static_range(R * K):
                tap, met = tap_at(
                    first + i // K,
                    i % K,
                    INNER[b][0],
                    INNER[b][1],
                    INNER[b][2],
                    K,
                )
                p_tap = p_taps + tap * channels + channel
                b_tap = tl.load(p_tap, mask=m_channel & met, other=0)
                product += b_tap.to(tl.float32) * sums[i]
            tl.store(p_part + b * channels, product, mask=m_channel)
        p_total = p_part + len(INNER) * channels
        tl.store(p_total, tl.zeros_like(sums[0]), mask=m_channel)
    else:
        for i in tl.static_range(R * K):
            p_tap = p_part + (TAP + first * K + i) * channels
            tl.store(p_tap, sums[i], mask=m_channel & (first + i // K < K))


@triton.jit
def _along(
    acc,
    window,
    p_grad,
    p_rows,
    m_grad,
    m_rows,
    rest,
    x,
    channels: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Steps along a row of the gradient, ``x`` columns from its first value.

    Args:
        acc: R K sums (N, C).
        window: R (K - 1) values (N, C), of what all taps but the last see.
        p_grad: Pointers (N, C) to first values.
        p_rows: R times the same for x.
        rest: (N, 1), columns from first values to the end of the map.

    Returns:
        acc, and the window of the step that comes next.
    """
    HALF: tl.constexpr = K // 2
    p_grad += x * channels
    rest -= x
    for i in tl.static_range(STEPS):
        b_grad = _load(p_grad, i, rest, m_grad, channels, D, WIDTH)
        for r in tl.static_range(R):
            p_row = p_rows[r] + x * channels
            b_x = _load(p_row, i + HALF, rest, m_rows[r], channels, D, WIDTH)
            row = window[: K - 1] + (b_x,)
            for k in tl.static_range(K):
                part = acc[0]
                if is_inside(i + k - HALF, D, WIDTH):
                    part = tl.fma(row[k], b_grad, part)
                acc = acc[1:] + (part,)  # every sum is the first one in turn
            window = window[K - 1 :] + row[1:]
    return acc, window


@triton.jit
def _load(
    p_first,
    i,
    rest,
    m_first,
    channels: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The values (N, C) that are i steps from first ones, or zeros."""
    if not is_inside(i, D, WIDTH):
        return tl.zeros(p_first.shape, tl.float32)
    m_value = m_first
    if not is_inside(i + 1, D, WIDTH) or WIDTH % D or not WIDTH:
        m_value = m_value & (i * D < rest)
    b_value = tl.load(p_first + i * D * channels, mask=m_value, other=0)
    return widen(b_value)


@constexpr_function
def is_inside(i: int, dilation: int, width: int) -> bool:
    """Whether a map of this width, if it is known, has a value at step i."""
    return width == 0 or 0 <= i * dilation < width


@triton.jit
def _total(
    p_grad,
    p_part,
    split,
    channel,
    m_channel,
    positions,
    channels: tl.constexpr,
    ZEROS: tl.constexpr,
    SUMS: tl.constexpr,
    N: tl.constexpr,
):
    """The sum of a gradient, below so many zeros."""
    total = tl.zeros((N, channel.shape[1]), tl.float32)
    step = tl.num_programs(2) * N * LOADS
    for start in tl.range(split * N * LOADS, positions, step):
        for i in tl.static_range(LOADS):
            n = start + i * N + tl.arange(0, N)[:, None]
            p_value = p_grad + n.to(tl.int64) * channels + channel
            m_value = m_channel & (n < positions)
            total += widen(tl.load(p_value, mask=m_value, other=0))
    b_sum = tl.sum(total, 0)[None]
    for b in tl.static_range(ZEROS):
        tl.store(p_part + b * channels, tl.zeros_like(b_sum), mask=m_channel)
    tl.store(p_part + (SUMS - 1) * channels, b_sum, mask=m_channel)


@lru_cache
def _forms(branches: tuple, width: int) -> tuple[tuple, int]:
    """Share kernels among programs.

    Args:
        branches (tuple): Size, dilation and first tap of each.
        width (int): Of the map, or 0 if it may be any.

    Returns:
        tuple: For each its first program, the rows of a program and the steps
        of a loop; and the number of all programs.
    """
    forms, programs = [], 0
    for size, dilation, _ in branches:
        rows = cdiv(size, cdiv(size, max(1, KNOBS['TAPS'] // size)))
        steps = [n for n in KNOBS['STEPS'] if n >= size] or [size]
        forms.append((programs, rows, cdiv(width, dilation) or steps[0]))
        programs += cdiv(size, rows)
    return tuple(forms), programs


def tap_grads(
    x: Tensor, grads: Tensor, branches: tuple, with_sum: bool = False
) -> Tensor:
    """Parts of the gradients of the taps of all branches.

    Args:
        x (Tensor): (B, C, H, W) in channels_last.
        grads (Tensor): (branches, B, C, H, W), each in channels_last.
        branches (tuple): Size, dilation and first tap of each.
        with_sum (bool): Whether there is a last row, the sum of the first of
            the gradients. Defaults to False.

    Returns:
        Tensor: (parts, all taps, C), float32.
    """
    return _launch(x, grads, branches, with_sum)


def inner_products(
    x: Tensor, grad: Tensor, taps: Tensor, branches: tuple, size: int
) -> Tensor:
    """Parts of the sums of a gradient times what branches made of a map.

    Args:
        x, grad (Tensor): (B, C, H, W) in channels_last.
        taps (Tensor): (all taps, C), in the dtype of x.
        branches (tuple): Size, dilation and first tap of each.
        size (int): Of a kernel that has all taps.

    Returns:
        Tensor: (parts, branches + 1, C), float32; last, those of the gradient.
    """
    return _launch(x, grad[None], ((size, 1, 0),), True, taps, branches)


def _launch(
    x: Tensor,
    grads: Tensor,
    branches: tuple,
    with_sum: bool,
    taps: Tensor | None = None,
    inner: tuple = (),
) -> Tensor:
    batch, channels, height, width = x.shape
    known = width if width <= KNOBS['NARROW'] else 0
    forms, programs = _forms(branches, known)
    programs += with_sum
    sums = len(inner) or sum(size**2 for size, *_ in branches)
    sums += with_sum
    block, blocks = channel_block(channels)
    lanes = KNOBS['BYTES'] // x.element_size() // block
    splits = num_splits(
        cdiv(batch * height, lanes), blocks * programs, KNOBS['programs']
    )
    shares = programs if inner else 1
    parts = x.new_empty(splits * shares, sums, channels, dtype=torch.float32)
    _tap_grads_kernel[programs, blocks, splits](
        x,
        grads,
        taps,
        parts,
        channels,
        height,
        width,
        batch,
        BRANCHES=branches,
        INNER=inner,
        FORMS=forms,
        SUMS=sums,
        SUM=with_sum,
        WIDTH=known,
        N=lanes,
        CHANNELS=block,
        num_warps=KNOBS['warps'],
        maxnreg=KNOBS['registers'][x.element_size() > 2 and not known],
    )
    return parts


def num_splits(items: int, others: int, programs: int) -> int:
    """Number of programs to share some items, beside so many others."""
    return max(1, min(items, cdiv(programs, others)))
