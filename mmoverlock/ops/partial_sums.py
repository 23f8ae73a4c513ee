"""Sums over positions on GPUs: partial ones first, then their sum.

Every program of a kernel adds up what it sees and writes it once; a small
kernel adds those, in a fixed order. There are no atomic operations, so equal
operands give equal bits, on GPUs with as many multiprocessors.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .launching import jit, odd

KNOBS = dict(  # of the program that adds partial sums
    values=4096,  # at a time
    parts=(128, 16),  # of a column at a time: of many, of a few
)


@lru_cache
def programs(device: torch.device, resident: int) -> int:
    """The number of programs that a device runs at a time.

    Args:
        device (torch.device): A GPU, or a CPU for the interpreter.
        resident (int): Programs of a multiprocessor.
    """
    if device.type != 'cuda':
        return resident
    properties = torch.cuda.get_device_properties(device)
    return resident * properties.multi_processor_count


@triton.jit
def _add(
    p_parts,
    p_out,
    parts,
    step,
    block,
    count,
    channels,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of one output; the columns of parts are (channel, sum)."""
    o_out = block * COLUMNS + tl.arange(0, COLUMNS)
    m_out = o_out < count
    o_part = tl.arange(0, PARTS)[:, None]
    p_part = p_parts + o_part * tl.cast(step, tl.int64) + o_out[None]
    acc = tl.zeros((PARTS, COLUMNS), p_parts.dtype.element_ty)
    for start in range(0, parts, PARTS):
        m_part = (start + o_part < parts) & m_out[None]
        acc += tl.load(p_part, mask=m_part, other=0)
        p_part += PARTS * tl.cast(step, tl.int64)
    b_out = tl.sum(acc, 0).to(p_out.dtype.element_ty)
    p_out += o_out % channels * (count // channels) + o_out // channels
    tl.store(p_out, b_out, mask=m_out)


@jit
def _add_kernel(
    p_parts,
    p_outs,
    odds,
    firsts,
    steps,
    counts,
    channels,
    PARTS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """``out[c, k] = sum over i of parts[i, k, c]`` for some outputs.

    Of each, a pointer to (parts, step) in a tuple, of which k and c are
    count = K C, after ``firsts`` others; grid (blocks of all counts, ). See
    :func:`mmoverlock.ops.launching.odd`.
    """
    block = tl.program_id(0)
    for i in tl.static_range(len(p_outs)):
        blocks = tl.cdiv(counts[i], VALUES // PARTS[i])
        if (block >= 0) & (block < blocks):
            _add(
                p_parts[i] + firsts[i],
                p_outs[i],
                odds[i] // 2,
                steps[i],
                block,
                counts[i],
                channels[i],
                PARTS[i],
                VALUES // PARTS[i],
            )
        block -= blocks


def check_device(x: Tensor) -> None:
    """Check that kernels can run on a map.

    Raises:
        ValueError: If it is not on a GPU, and Triton does not interpret.
    """
    if not x.is_cuda and isinstance(_add_kernel, triton.JITFunction):
        raise ValueError(
            f"backend 'triton' takes maps on a GPU, got one on {x.device}"
        )


_thread = threading.local()


@contextmanager
def together() -> Iterator[None]:
    """Have all sums within added in one launch, at the end.

    Nothing within may read one, nor may one of these contexts be in another.
    """
    _thread.pending = pending = [], {}
    try:
        yield
    finally:
        _thread.pending = None
    _add_pending(*pending)


def add(
    *jobs: tuple[Tensor | None, ...],
    make: Callable | None = None,
    operands: Sequence = (),
) -> None:
    """As :func:`add_now`; within :func:`together`, when that ends.

    Args:
        jobs (tuple): As there.
        make (callable, optional): Makes more of them, of the operands of all
            that name it.
        operands (Sequence): Its arguments.
    """
    pending = getattr(_thread, 'pending', None)
    found, makers = pending or ([], {})
    found += jobs
    if operands:
        makers.setdefault(make, []).extend(operands)
    if pending is None:
        _add_pending(found, makers)


def _add_pending(jobs: list, makers: dict[Callable, list]) -> None:
    for make, operands in makers.items():
        jobs += make(*operands)
    add_now(*jobs)


def add_now(*jobs: tuple[Tensor | None, ...]) -> None:
    """Write sums of partial sums, all in one launch.

    Args:
        jobs (tuple): Partial sums (parts, sums, C), contiguous and in single
            precision, and what takes them: an output (C, ...) takes as many
            sums as it has values a channel, None leaves one out.
    """
    outs, parts, sizes = [], [], []
    for partial, *targets in jobs:
        count, sums, channels = partial.shape
        first = 0
        for out in targets:
            size = channels if out is None else out.numel()
            if out is not None:
                outs.append(out)
                parts.append(partial)
                sizes.append((count, first, sums * channels, size, channels))
            first += size
    counts, firsts, steps, lengths, channels = zip(*sizes, strict=True)
    many, few = KNOBS['parts']
    forms = tuple(few if count <= few else many for count in counts)
    grid = sum(
        cdiv(length, KNOBS['values'] // form)
        for length, form in zip(lengths, forms, strict=True)
    )
    _add_kernel[(grid,)](
        tuple(parts),
        tuple(outs),
        odd(counts),
        firsts,
        steps,
        lengths,
        channels,
        PARTS=forms,
        VALUES=KNOBS['values'],
    )
