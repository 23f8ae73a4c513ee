"""ContMix as Triton kernels for NVIDIA GPUs, forward and backward.

A kernel size runs by classes of positions where a map has few windows
(classes.py), and by windows elsewhere (windows.py), both sizes in one launch
(mix.py); filters.py has what comes before and after. Scores are logarithms to
the base 2; the factor is in the filters and biases.

Formats: scores, sums and exponentials are fp32. Products of a query of 16
bits take filters of twice as many, in two planes; weights and gradients of
scores are rounded to the formats of value and query for the products that
follow, as in FlashAttention. Products of fp32 are made of three of TF32,
which keeps its precision.

There are no atomic operations, so results are the same in every run. Offsets
have 64 bits; within an image, 32.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ... import partial_sums
from ...common import (
    cdiv,
    channels_last,
    custom_op,
    saved_tensors,
)
from ...launching import odd
from . import classes, filters, mix, windows
from .common import INTERPRET, power, steps


@cache
def _forms(height: int, width: int, *sizes: int) -> tuple[dict, ...]:
    """The constants of each kernel size, see common.py."""
    forms, first = [], 0
    for half, size in enumerate(sizes):
        if classes.count_classes(height, width, size) <= classes.MOST_CLASSES:
            tiling = classes.tile_classes(height, width, size)
        else:
            tiling = windows.tile_windows(width, size)
        forms.append(dict(HALF=half, FIRST=first, **tiling))
        first += size**2
    return tuple(forms)


def _narrow(x: Tensor) -> Tensor:
    """The map; in channels_last if its images have offsets beyond 32 bits."""
    sides = zip(x.shape[1:], x.stride()[1:], strict=True)
    span = sum(length * stride for length, stride in sides)
    return x if span < 2**31 else channels_last(x)


def _lengths(form: dict, groups: int, batch: int, pixels: int) -> list[int]:
    """Elements of lse and of dense biases of a kernel size, aligned."""
    positions, dense = pixels, form['K'] ** 2 * form['TP']
    if 'NC' in form:
        positions = form['NC'] * form['MT'] * form['M']
        dense = positions * (form['TP'] + form['PT'])
    return [4 * cdiv(batch * groups * positions, 4), groups * dense]


class _Problem:
    """Sizes, and the settings of kernels that follow from them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        small: Tensor,
        large: Tensor,
        value: Tensor,
        scale: float,
    ):
        self.batch, _, self.height, self.width = value.shape
        groups = len(small)
        self.units = self.batch * groups
        self.sizes = [(table.shape[1] + 1) // 2 for table in (small, large)]
        # There is no other number of classes than those few.
        self.forms = _forms(self.height, self.width, *self.sizes)
        self.taps = sum(size**2 for size in self.sizes)
        lengths = (
            _lengths(form, groups, self.batch, self.height * self.width)
            for form in self.forms
        )
        self.lse, self.dense = zip(*lengths, strict=True)
        # Images of a program, and groups * chunks of so many images. On maps
        # of many windows, a loop over them would take 90 more registers.
        self.images = [
            min(
                mix.KNOBS['IMAGES'],
                max(1, self.units * self.tiles(form) // mix.KNOBS['PROGRAMS']),
            )
            if 'NC' in self.forms[1]
            else 1
            for form in self.forms
        ]
        self.chunks = [
            groups * cdiv(self.batch, images) for images in self.images
        ]
        channels = query.shape[1] // groups
        values = value.shape[1] // (2 * groups)
        self.mix = dict(
            MIX=(
                groups,
                channels,
                values,
                power(channels),
                power(values),
                self.taps,
                2 if query.element_size() == 2 else 1,
            ),
            FORMS=tuple(tuple(form.values()) for form in self.forms),
        )
        self.sides = self.batch, self.height, self.width
        regions = key.shape[2:].numel()
        self.keys = dict(
            SCALE=scale,
            S=regions,
            SP=power(regions),
            SX=key.shape[3],
            CHANNELS=query.shape[1],
        )
        self.rows = self.batch * query.shape[1]

    def tiles(self, form: dict, columns: str = 'COLS') -> int:
        """Of positions, or of pixels by windows."""
        if 'NC' in form:
            return form['NC'] * form['MT']
        across = cdiv(self.width, form[columns])
        return cdiv(self.height, form['ROWS']) * across


def _launch(
    kernel: triton.JITFunction, tasks: dict[tuple, int], *args, **constants
) -> None:
    """Launch a kernel on the programs of its tasks, see common.py."""
    tasks = {
        (kind.value, half): programs
        for (kind, half), programs in tasks.items()
    }
    kernel[(sum(tasks.values()),)](
        *args,
        odd(tasks.values()),
        TASKS=tuple(tasks),
        **constants,
    )


@custom_op('mmoverlock::contmix')
def _mix(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    small: Tensor,
    large: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix with both kernel sizes.

    Args:
        query (Tensor): (B, G * c, H, W).
        key (Tensor): (B, G * c, S, S).
        weight (Tensor): (k^2 + K^2, S^2), or that of a 1x1 convolution,
            contiguous as the next three.
        bias (Tensor): (k^2 + K^2, ).
        small, large (Tensor): (G, 2k - 1, 2k - 1), (G, 2K - 1, 2K - 1).
        value (Tensor): (B, C, H, W).
        scale (float): Of the query.

    Returns:
        tuple[Tensor]: (B, C, H, W); and, for the backward pass, logarithms to
        the base 2 of the sums of exponentials of both sizes, filters, and
        dense biases of both sizes, see classes.py and windows.py.
    """
    inputs = query, key, weight, bias, small, large, value
    outputs = _empty_outputs(*inputs, scale)
    if value.numel():
        forward(inputs, scale, outputs)
    return outputs


def forward(
    inputs: Sequence[Tensor], scale: float, outputs: Sequence[Tensor]
) -> None:
    """Mix maps that are not empty: two launches.

    Args:
        inputs (Sequence[Tensor]): The first seven arguments of :func:`_mix`.
        scale (float): Of the query.
        outputs (Sequence[Tensor]): Memory of its results.
    """
    query, key, weight, bias, small, large, value = inputs
    out, lse, b_filters, dense = outputs
    problem = _Problem(query, key, small, large, value, scale)
    groups, knobs = len(small), filters.KNOBS
    prepared = {
        (filters.FILTERS, 0): cdiv(problem.rows, knobs['ROWS'])
        * cdiv(problem.taps, knobs['TAPS'])
    }
    mixed = {}
    for half in (1, 0):  # what takes longest goes first
        form = problem.forms[half]
        tiles = problem.tiles(form)
        if 'NC' in form:
            mixed[mix.CLASSES, half] = problem.chunks[half] * tiles
            positions = groups * tiles * form['M']
            for kind, length in (
                (filters.DENSE_TAPS, form['TP']),
                (filters.DENSE_PIXELS, form['PT']),
            ):
                prepared[kind, half] = cdiv(
                    positions * length, knobs['ELEMENTS']
                )
        else:
            mixed[mix.WINDOWS, half] = problem.chunks[half] * tiles
            prepared[filters.DENSE_ROWS, half] = cdiv(
                problem.dense[half], knobs['ELEMENTS']
            )
    denses = dense.split(problem.dense)
    _launch(
        filters.prepare,
        prepared,
        key,
        weight,
        bias,
        (small, large),
        b_filters,
        denses,
        key.stride(),
        problem.rows,
        **problem.keys,
        **problem.mix,
        R=knobs['ROWS'],
        T=knobs['TAPS'],
        E=knobs['ELEMENTS'],
        num_warps=knobs['WARPS'],
    )
    _launch(
        mix.forward,
        mixed,
        query,
        b_filters,
        denses,
        value,
        out,
        lse.split(problem.lse),
        query.stride(),
        value.stride(),
        out.stride(),
        *problem.sides,
        steps(problem.images),
        **problem.mix,
        num_warps=mix.KNOBS['WARPS'],
        maxnreg=mix.KNOBS['REGISTERS'],
    )


@_mix.register_fake
def _empty_outputs(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    small: Tensor,
    large: Tensor,
    value: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = query, key, weight, bias, small, large, value
    return torch.empty_like(value), *empty_facts(inputs)


def empty_facts(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory of all results of :func:`_mix` but the first."""
    query, _, _, bias, small, large, value = inputs
    batch, _, height, width = value.shape
    groups = len(small)
    dtype = torch.promote_types(query.dtype, torch.float32)
    planes = 2 if query.element_size() == 2 else 1
    channels = query.shape[1] // groups
    b_filters = query.new_empty(batch, groups, planes, len(bias), channels)
    sizes = [(table.shape[1] + 1) // 2 for table in (small, large)]
    if classes.count_classes(height, width, max(sizes)) <= (
        classes.MOST_CLASSES
    ):
        forms = _forms(int(height), int(width), *sizes)
    else:  # for all such maps the same
        forms = [windows.tile_windows(0, size) for size in sizes]
    lse, dense = (
        query.new_empty(sum(lengths), dtype=dtype)
        for lengths in zip(
            *(_lengths(form, groups, batch, height * width) for form in forms),
            strict=True,
        )
    )
    return lse, b_filters, dense


@custom_op('mmoverlock::contmix_backward', differentiable=False)
def _mix_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    small: Tensor,
    large: Tensor,
    value: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    b_filters: Tensor,
    dense: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first seven arguments of :func:`_mix`."""
    inputs = query, key, weight, bias, small, large, value
    if not value.numel():
        return tuple(map(torch.zeros_like, inputs))
    dv = torch.empty_like(value)
    outputs = out, lse, b_filters, dense
    return *backward(grad, inputs, scale, outputs, dv), dv


def backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    scale: float,
    outputs: Sequence[Tensor],
    dv: Tensor,
    adds: bool = False,
) -> list[Tensor]:
    """Gradients of maps that are not empty: three launches.

    Args:
        grad (Tensor): Of the first output, (B, C, H, W).
        inputs, scale, outputs: As of :func:`forward`.
        dv (Tensor): Memory of the gradient of the value.
        adds (bool): Whether that is added to what the memory has.

    Returns:
        list[Tensor]: Gradients of the other inputs.
    """
    query, key, weight, bias, small, large, value = inputs
    out, lse, b_filters, dense = outputs
    grads = [torch.empty_like(t) for t in inputs[:-1]]
    dq, dkey, dw, dbias, dsmall, dlarge = grads
    problem = _Problem(query, key, small, large, value, scale)
    grad = _narrow(grad)
    batch, groups, units = problem.batch, len(small), problem.units
    channels = query.shape[1] // groups

    def scratch(*shape) -> Tensor:
        return lse.new_empty(shape)

    knobs = filters.KNOBS
    large_enough = problem.rows >= knobs['KEYS'] * knobs['PROGRAMS']
    rows = knobs['KEYS'] if large_enough else 16
    blocks = cdiv(problem.rows, rows)
    mixed = {}
    width = problem.mix['MIX'][3]
    finished = {
        (filters.CONTRACT, 0): blocks,
        (filters.QUERY, 0): units
        * cdiv(problem.height * problem.width * width, knobs['ELEMENTS']),
    }
    # Of each size: df, db and the gradient of the table in parts, how many
    # parts of the first, and of the last, and images of a chunk.
    dfs, dbs, dtables = [None, None], [None, None], [None, None]
    parts, chunks, images = [0, 0], [0, 0], [0, 0]
    for half in (1, 0):  # what takes longest goes first
        form, size = problem.forms[half], problem.sizes[half]
        tiles = problem.tiles(form)
        row_programs = groups * (2 * size - 1)
        if 'NC' in form:
            m, t, tp = form['M'], form['T'], form['TP']
            each = groups * tiles * (tp // t)
            images[half] = cdiv(batch, cdiv(classes.KNOBS['PROGRAMS'], each))
            chunks[half] = chunk = cdiv(batch, images[half])
            dbs[half] = scratch(chunk * groups * tiles, tp, 1)
            dtables[half] = scratch(chunk, groups, tiles, m, tp)
            mixed[mix.CLASS_FILTERS, half] = each * chunk
            mixed[mix.CLASS_QUERY, half] = problem.chunks[half] * tiles
            pixels = form['PT'] // form['PIXELS']
            mixed[mix.CLASS_VALUE, half] = problem.chunks[half] * pixels
            finished[filters.TABLE_OF_CLASSES, half] = row_programs
        else:
            small = form['R'] == size  # a program adds up its images
            chunks[half] = problem.chunks[half] // groups if small else batch
            dbs[half] = scratch(tiles * chunks[half] * groups, size**2, 1)
            dtables[half] = scratch(
                problem.height,
                cdiv(problem.width, form['COLS']),
                size,
                chunks[half] * groups,
                2 * size - 1,
            )
            mixed[mix.POSITIONS, half] = problem.chunks[half] * tiles
            pixels = problem.tiles(form, 'PIXELS')
            mixed[mix.PIXELS, half] = problem.chunks[half] * pixels
            finished[filters.TABLE_OF_WINDOWS, half] = row_programs
        dfs[half] = scratch(tiles, units * size**2, channels)
        parts[half] = tiles
    dq_parts = scratch(2, *query.shape)  # the channels last
    dw_parts = scratch(blocks, weight.numel(), 1)
    _launch(
        mix.backward,
        mixed,
        query,
        b_filters,
        dense.split(problem.dense),
        value,
        out,
        lse.split(problem.lse),
        grad,
        dq_parts,
        dv,
        tuple(dfs),
        tuple(dbs),
        tuple(dtables),
        query.stride(),
        value.stride(),
        out.stride(),
        grad.stride(),
        dv.stride(),
        *problem.sides,
        steps(problem.images),
        steps(images),
        ADDS=adds,
        **problem.mix,
        num_warps=mix.KNOBS['WARPS'],
        maxnreg=mix.KNOBS['REGISTERS'],
    )
    _launch(
        filters.finish,
        finished,
        tuple(dfs),
        dq_parts,
        tuple(dtables),
        key,
        weight,
        dkey,
        dw_parts,
        dq,
        (dsmall, dlarge),
        key.stride(),
        dkey.stride(),
        dq.stride(),
        problem.rows,
        *problem.sides,
        odd(parts),
        odd(chunks),
        **problem.keys,
        **problem.mix,
        R=rows,
        T=knobs['TAPS'],
        PARTS=knobs['PARTS'],
        E=knobs['ELEMENTS'],
        TERMS=knobs['TERMS'],
        num_warps=knobs['WARPS'],
    )
    counts = [size**2 for size in problem.sizes]
    dbiases = zip(dbs, dbias.split(counts), strict=True)
    partial_sums.add((dw_parts, dw), *dbiases)
    return grads


@_mix_backward.register_fake
def _(
    grad: Tensor, *inputs_and_more
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(map(torch.empty_like, inputs_and_more[:7]))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, *_
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    tensors = saved_tensors(ctx)
    return (
        *_mix_backward(grad, *tensors[:7], ctx.scale, *tensors[7:]),
        None,
    )


_mix.register_autograd(_differentiate, setup_context=_save)


def contmix_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
    scale: float = 1.0,
) -> Tensor:
    """See :func:`mmoverlock.ops.contmix`.

    The operands may have any dtypes: they are converted on the fly.

    Raises:
        ValueError: If the operands are on a CPU and Triton does not
            interpret.
    """
    if value.device.type == 'cpu' and not INTERPRET:
        raise ValueError(
            "ContMix backend 'triton' needs a GPU, but the operands are on a "
            'CPU. (For tests, TRITON_INTERPRET=1, set before triton is '
            'imported, runs it there, slowly.)'
        )
    weights = (t.contiguous() for t in (weight, bias, *rpb))
    return _mix(_narrow(query), key, *weights, _narrow(value), scale)[0]
