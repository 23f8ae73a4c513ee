"""Sums over positions on GPUs: partial ones first, then their sum.

Every program of a kernel adds up what it sees and writes it once; a small
kernel adds those, in a fixed order. There are no atomic operations, so equal
operands give equal bits, on GPUs with as many multiprocessors.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv

CHANNELS = 32  # of a program that adds partial sums
PARTS = 128  # that it loads at a time


@lru_cache
def programs(device: torch.device, resident: int) -> int:
    """How many programs a device runs at a time.

    Args:
        device (torch.device): A GPU, or a CPU for the interpreter.
        resident (int): Programs of a multiprocessor.
    """
    if device.type != 'cuda':
        return resident
    properties = torch.cuda.get_device_properties(device)
    return resident * properties.multi_processor_count


@triton.jit(do_not_specialize=('parts',))
def _add_kernel(
    partial,
    first,
    second,
    third,
    parts,
    channels,
    SUMS: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1)
    inside = channel < channels
    part = tl.arange(0, PARTS)[:, None]
    stride = tl.cast(channels, tl.int64) * SUMS
    partial += k * channels + part * stride + channel[None]
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, parts, PARTS):
        mask = (start + part < parts) & inside[None]
        total += tl.load(partial + start * stride, mask=mask, other=0)
    total = tl.sum(total, 0)
    if k < FIRST:
        out = first + channel * FIRST + k
        tl.store(out, total.to(first.dtype.element_ty), mask=inside)
    elif k == FIRST:
        if second is not None:
            out = second + channel
            tl.store(out, total.to(second.dtype.element_ty), mask=inside)
    elif third is not None:
        out = third + channel
        tl.store(out, total.to(third.dtype.element_ty), mask=inside)


def check_device(x: Tensor) -> None:
    """Check that kernels can run on a map.

    Raises:
        ValueError: If it is not on a GPU, and Triton does not interpret.
    """
    if not x.is_cuda and isinstance(_add_kernel, triton.JITFunction):
        raise ValueError(
            f"backend 'triton' takes maps on a GPU, got one on {x.device}"
        )


def add(
    partial: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    third: Tensor | None = None,
) -> None:
    """Write sums of partial sums.

    Args:
        partial (Tensor): (parts, sums, C), in single precision.
        first (Tensor): (C, ...): all sums but those of the other two.
        second, third (Tensor, optional): (C, ): the sums behind.
    """
    parts, sums, channels = partial.shape
    grid = cdiv(channels, CHANNELS), sums
    with torch.cuda.device_of(partial):
        _add_kernel[grid](
            partial,
            first,
            second,
            third,
            parts,
            channels,
            SUMS=sums,
            FIRST=first.numel() // channels,
            PARTS=PARTS,
            CHANNELS=CHANNELS,
        )
