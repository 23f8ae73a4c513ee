"""Tiles of kernels that pass over a map in channels_last.

A tile is some rows, which are positions, by some channels. It is as large as
its threads have 128-bit loads in flight for.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2

KNOBS = dict(
    warps=4,
    values=16,  # of a thread
    channels=64,  # of a tile, at most
    resident=4,  # looping programs that a multiprocessor has registers for
)


def form(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    block = min(KNOBS['channels'], next_power_of_2(channels))
    return 32 * KNOBS['warps'] * KNOBS['values'] // block, block


@triton.jit
def place(channels, BLOCK: tl.constexpr):
    """The tile of this program, its channels, and which of them exist.

    Grid (tiles blocks of C, ); both vectors are (BLOCK, ).
    """
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    o_channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, o_channel, o_channel < channels


@triton.jit
def part_of(positions, splits, channels, BLOCK: tl.constexpr):
    """The part of an image of this program, of as many as ``splits``.

    Grid (B splits blocks of C, ).

    Returns:
        tuple: Its number among those of all images; channels and their mask
        (BLOCK, ); the offset of its first position in a map (B, positions, C),
        and how many positions it has.
    """
    part, o_channel, m_channel = place(channels, BLOCK)
    length = tl.cdiv(positions, splits)
    first = part % splits * length
    image = (part // splits).to(tl.int64)
    o_first = (image * positions + first) * channels
    rows = tl.minimum(length, positions - first)
    return part.to(tl.int64), o_channel, m_channel, o_first, rows


@triton.jit
def locate(
    positions, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of one of ``count`` an image: image, channels and values.

    Returns:
        tuple: Image; offsets and mask of channels (BLOCK, ) and of values
        (ROWS, BLOCK) in a map (B, positions, C).
    """
    tile, o_channel, m_channel = place(channels, BLOCK)
    image = (tile // count).to(tl.int64)
    o_row = tile % count * ROWS + tl.arange(0, ROWS)[:, None]
    o_x = (image * positions + o_row) * channels + o_channel[None]
    m_x = (o_row < positions) & m_channel[None]
    return image, o_channel, m_channel, o_x, m_x


def launch(kernel: triton.JITFunction, x: Tensor, *args) -> None:
    """Launch a kernel on all tiles of a map, tiles of one image each.

    Args:
        kernel (JITFunction): Its last arguments are those of :func:`locate`.
        x (Tensor): (B, C, H, W), in channels_last.
        args: Its arguments before those.
    """
    batch, channels, height, width = x.shape
    rows, block = form(channels)
    count = cdiv(height * width, rows)
    kernel[(batch * count * cdiv(channels, block),)](
        *args,
        height * width,
        count,
        channels,
        ROWS=rows,
        BLOCK=block,
        num_warps=KNOBS['warps'],
    )


@triton.jit
def load(p_x, o_x, m_x):
    """Values in single precision, 0 where there are none."""
    return tl.load(p_x + o_x, mask=m_x, other=0).to(tl.float32)


@triton.jit
def store(p_x, o_x, b_x, m_x):
    """Store values in the dtype of what they are stored in."""
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def open_gate(b_gate, SILU: tl.constexpr):
    """``f(gate)`` and its slope; f is SiLU or the identity."""
    b_slope = tl.full(b_gate.shape, 1.0, tl.float32)
    if SILU:
        b_open = tl.sigmoid(b_gate)
        b_slope = b_open * (1 + b_gate * (1 - b_open))
        b_gate *= b_open
    return b_gate, b_slope


@triton.jit
def rows(first, count, step, o_channel, m_channel, ROWS: tl.constexpr):
    """Offsets and mask (ROWS, C) of rows from the first, ``step`` apart."""
    o_row = first + tl.arange(0, ROWS)[:, None]
    return o_row * step + o_channel[None], (o_row < count) & m_channel[None]


@triton.jit
def sum_rows(
    p_x,
    p_factor,
    p_gate,
    count,
    step,
    o_channel,
    m_channel,
    ROWS: tl.constexpr,
):
    """Sums (C, ) over rows, ``step`` apart, of ``x factor gate``.

    Without those of the last two that are None.
    """
    acc = tl.zeros((ROWS, o_channel.shape[0]), tl.float32)
    for first in range(0, count, ROWS):
        o_x, m_x = rows(first, count, step, o_channel, m_channel, ROWS)
        b_x = load(p_x, o_x, m_x)
        if p_factor is not None:
            b_x *= load(p_factor, o_x, m_x)
        if p_gate is not None:
            b_x *= load(p_gate, o_x, m_x)
        acc += b_x
    return tl.sum(acc, 0)
