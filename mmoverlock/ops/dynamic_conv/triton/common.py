"""Constants, products, exponentials and offsets, for all kernels of ContMix.

A launch is of *tasks*, each some programs of a kernel (kind, kernel size), in
a constant tuple. Constants come in two more: ``MIX`` of the problem, ``FORMS``
of the kernel sizes.

====== ======================================================================
MIX    G, CQ, CV, QC, VC, TAPS, PLANES: groups, channels of a group in query
       and value, these as powers of 2, taps of both sizes, planes of filters
FORMS  HALF, FIRST, K, TP, NT, SPAN, then what classes.py or windows.py say:
       which half of the channels, first of the taps, kernel size, taps of a
       position in dense biases, NT for each row of the kernel; SPAN >= 2K - 1
====== ======================================================================
"""

from collections.abc import Iterable

import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret
INTERPRETED = tl.constexpr(INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = 'batch', 'height', 'width'  # which kernels are not compiled for


def steps(images: Iterable[int]) -> tuple[int, ...]:
    """Numbers n of images as 2 n - 1: a single one is a constant, no loop.

    See :func:`mmoverlock.ops.launching.odd` for the others.
    """
    return tuple(2 * n - 1 for n in images)


def power(size: int) -> int:
    """Sizes of blocks are powers of 2, at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def dot(a, b, acc):
    """``acc + a b``; factors of fp32 keep their precision."""
    if INTERPRETED:  # which computes nonsense from products of bf16
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision='tf32x3', out_dtype=acc.dtype)


@triton.jit
def exp2(x):
    """A single instruction for fp32: results below 2^-126 are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;',
            '=f,f',
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def log2(x):
    """A single instruction for fp32, right to 2^-22 of a logarithm of 1."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            'lg2.approx.ftz.f32 $0, $1;',
            '=f,f',
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def window_start(position, length, K: tl.constexpr):
    """Start of the window of a position."""
    return tl.minimum(tl.maximum(position - K // 2, 0), length - K)


@triton.jit
def map_offset(image, channel, strides):
    """Offset of an image from its first channel on, of 64 bits."""
    return tl.cast(image, tl.int64) * strides[0] + (
        tl.cast(channel, tl.int64) * strides[1]
    )


@triton.jit
def offsets(y, x, channel, strides):
    """Offsets (Y, X, C) of rows, columns and channels in an image."""
    pixel = (y * strides[2])[:, None] + (x * strides[3])[None, :]
    return pixel[:, :, None] + (channel * strides[1])[None, None, :]


@triton.jit
def pixel_offsets(y, x, channel, strides):
    """Offsets (P, C) of pixels and channels in an image."""
    pixel = y * strides[2] + x * strides[3]
    return pixel[:, None] + (channel * strides[1])[None, :]
