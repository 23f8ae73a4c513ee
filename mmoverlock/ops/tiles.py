"""How kernels that pass over a map in channels_last divide it.

A tile is some rows, which are positions, by some channels. It is as large as
its threads have 128-bit loads in flight for.
"""

import triton
import triton.language as tl

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
def load(pointer, at, mask):
    """Values in single precision, 0 where there are none."""
    return tl.load(pointer + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def store(pointer, at, value, mask):
    """Store values in the dtype of what they are stored in."""
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)
