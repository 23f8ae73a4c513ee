"""Products, exponentials and windows, for all kernels of ContMix."""

import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret
INTERPRETED = tl.constexpr(INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def window_start(position, length, K: tl.constexpr):
    """Start of the window of a position."""
    return tl.minimum(tl.maximum(position - K // 2, 0), length - K)


@triton.jit
def offsets(y, x, channel, strides):
    """Offsets (Y, X, C) of rows, columns and channels in an image."""
    y = y.to(tl.int64) * strides[2]
    x = x.to(tl.int64) * strides[3]
    channel = channel.to(tl.int64) * strides[1]
    return y[:, None, None] + x[None, :, None] + channel[None, None, :]


@triton.jit
def pixel_offsets(y, x, channel, strides):
    """Offsets (P, C) of pixels and channels in a small image, of 32 bits."""
    pixel = y * strides[2] + x * strides[3]
    return pixel[:, None] + (channel * strides[1])[None, :]
