"""How kernels that pass over a map in channels_last divide it.

A tile is some rows, which are positions, by some channels. It is as large as
its threads have 128-bit loads in flight for.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv

WARPS = 4
VALUES = 16  # of a thread
MAX_CHANNELS = 64  # of a tile
RESIDENT = 4  # looping programs that a multiprocessor has registers for


def form(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    block = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    return 32 * WARPS * VALUES // block, block


@triton.jit
def place(channels, BLOCK: tl.constexpr):
    """The tile of this program, its channels, and which of them exist."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, channel, channel < channels


@triton.jit
def locate(
    positions, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of one of ``count`` an image: image, channels and values."""
    tile, channel, inside = place(channels, BLOCK)
    image = (tile // count).to(tl.int64)
    row = tile % count * ROWS + tl.arange(0, ROWS)[:, None]
    at = (image * positions + row) * channels + channel[None]
    return image, channel, inside, at, (row < positions) & inside[None]


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
        num_warps=WARPS,
    )


@triton.jit
def load(pointer, at, mask):
    """Values in single precision, 0 where there are none."""
    return tl.load(pointer + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def store(pointer, at, value, mask):
    """Store values in the dtype of what they are stored in."""
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)
