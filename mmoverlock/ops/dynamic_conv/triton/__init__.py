"""ContMix as Triton kernels for NVIDIA GPUs, forward and backward.

A kernel size runs by classes of positions where a map has few windows
(classes.py), and by windows elsewhere (windows.py); filters.py has what comes
before and after. Scores are logarithms to the base 2; the factor is in the
filters and biases.

Formats: scores, sums and exponentials are fp32. Products of a query of 16
bits take filters of twice as many, in two planes; weights and gradients of
scores are rounded to the formats of value and query for the products that
follow, as in FlashAttention. Products of fp32 are made of three of TF32,
which keeps its precision.

There are no atomic operations, so results are the same in every run. Offsets
have 64 bits; within an image of a map that runs by classes, 32.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import channels_last, custom_op
from . import classes, filters, windows
from .common import INTERPRET


def _power(size: int) -> int:
    """Sizes of blocks are powers of 2, at least 16."""
    return max(16, triton.next_power_of_2(size))


@cache
def _forms(height: int, width: int, *sizes: int) -> tuple[dict | None, ...]:
    """For each kernel size its tiling by classes, or None."""
    return tuple(
        classes.tile_classes(height, width, size)
        if classes.count_classes(height, width, size) <= classes.MOST_CLASSES
        else None
        for size in sizes
    )


def _narrow(x: Tensor) -> Tensor:
    """The map; in channels_last if its images have offsets beyond 32 bits."""
    sides = zip(x.shape[1:], x.stride()[1:], strict=True)
    span = sum(length * stride for length, stride in sides)
    return x if span < 2**31 else channels_last(x)


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
        self.groups = len(small)
        self.units = self.batch * self.groups
        self.sizes = [(len(table[0]) + 1) // 2 for table in (small, large)]
        self.taps = sum(size**2 for size in self.sizes)
        # There is no other number of classes than those few.
        self.forms = _forms(self.height, self.width, *self.sizes)
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.planes = 2 if query.element_size() == 2 else 1
        channels = query.shape[1] // self.groups
        values = value.shape[1] // (2 * self.groups)
        self.mixing = dict(
            G=self.groups,
            CQ=channels,
            CV=values,
            QC=_power(channels),
            VC=_power(values),
            TAPS=self.taps,
            PLANES=self.planes,
        )
        regions = key.shape[2:].numel()
        self.keys = dict(
            SCALE=scale,
            S=regions,
            SP=_power(regions),
            SX=key.shape[3],
            CHANNELS=query.shape[1],
            CQ=channels,
        )
        self.rows = self.batch * query.shape[1]

    def constants(self) -> tuple[tuple[int, ...], ...]:
        """For each kernel size (G, H, W, K, NC, M, MT, TP, PT)."""
        return tuple(
            (
                self.groups,
                *(form[name] for name in 'H W K NC M MT TP PT'.split()),
            )
            if form
            else (self.groups, self.height, self.width, size, 0, 0, 0, 0, 0)
            for form, size in zip(self.forms, self.sizes, strict=True)
        )

    def by_classes(self) -> Iterator[tuple[int, dict, dict]]:
        """(index, tiling, settings) of the sizes that run by classes."""
        first = 0
        for half, form in enumerate(self.forms):
            if form:
                settings = {
                    name: form[name] for name in 'H W K NC M MT'.split()
                }
                settings |= dict(
                    self.mixing,
                    batch=self.batch,
                    HALF=half,
                    FIRST=first,
                    num_stages=classes.KNOBS['STAGES'],
                )
                yield half, form, settings
            first += self.sizes[half] ** 2

    def by_windows(self) -> dict | None:
        """Settings of those that do not, or None if all do."""
        if all(self.forms):
            return None
        knobs = windows.KNOBS
        settings = dict(
            self.mixing,
            height=self.height,
            width=self.width,
            units=self.units,
            ROWS=knobs['ROWS'],
            COLS=knobs['COLS'],
            num_warps=knobs['ROWS'],
            num_stages=knobs['STAGES'],
        )
        for half, size in enumerate(self.sizes):
            settings |= {
                f'K{half}': size,
                f'RUN{half}': self.forms[half] is None,
                f'N{half}': _power(size + 1),
            }
        return settings

    def regions(self) -> dict[str, int]:
        """What kernels by positions take in addition."""
        return {
            f'REGION{half}': _power(
                min(size + windows.KNOBS['COLS'] - 1, self.width)
            )
            for half, size in enumerate(self.sizes)
        }

    @property
    def pixels(self) -> int:
        """Columns of a tile of pixels."""
        return min(windows.KNOBS['PIXELS'], _power(self.width))

    def across(self, columns: int) -> int:
        return triton.cdiv(self.width, columns)

    def tiles(self, columns: int) -> int:
        rows = triton.cdiv(self.height, windows.KNOBS['ROWS'])
        return rows * self.across(columns)


def _positions(forms: Sequence[dict | None], groups: int) -> list[int]:
    """Positions of an image in whole tiles, for each size by classes."""
    return [
        groups * form['NC'] * form['MT'] * form['M'] if form else 0
        for form in forms
    ]


def _dense_sizes(
    forms: Sequence[dict | None], groups: int
) -> list[tuple[int, int]]:
    """Elements of the dense biases of each size, by taps and by pixels."""
    return [
        (count * form['TP'], count * form['PT']) if form else (0, 0)
        for count, form in zip(_positions(forms, groups), forms, strict=True)
    ]


def _ctype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mix with both kernel sizes.

    Args:
        query (Tensor): (B, G * c, H, W).
        key (Tensor): (B, G * c, S, S).
        weight (Tensor): (k^2 + K^2, S^2), contiguous as the next three.
        bias (Tensor): (k^2 + K^2, ).
        small, large (Tensor): (G, 2k - 1, 2k - 1), (G, 2K - 1, 2K - 1).
        value (Tensor): (B, C, H, W).
        scale (float): Of the query.

    Returns:
        tuple[Tensor]: (B, C, H, W); logarithms to the base 2 of the sums of
        exponentials, (N, B, G, H, W) for the N kernel sizes that run by
        windows and in the order of classes.py for the others; and, for the
        backward pass, filters and dense biases, see filters.py.
    """
    outputs = _empty_outputs(
        query, key, weight, bias, small, large, value, scale
    )
    if not value.numel():
        return outputs
    out, lse, norms, b_filters, dense = outputs
    problem = _Problem(query, key, small, large, value, scale)
    sizes = _dense_sizes(problem.forms, problem.groups)
    denses = dense.split([*map(sum, sizes)])
    knobs = filters.KNOBS
    programs = (
        triton.cdiv(problem.rows, knobs['ROWS'])
        * triton.cdiv(problem.taps, knobs['TAPS']),
        *(
            sum(triton.cdiv(n, knobs['ELEMENTS']) for n in pair)
            for pair in sizes
        ),
    )
    positions = _positions(problem.forms, problem.groups)
    norms = norms.split([n * problem.batch for n in positions])
    tables = dict(p_table0=small, p_table1=large)
    maps = dict(
        p_q=query,
        p_f=b_filters,
        p_v=value,
        p_out=out,
        q_strides=query.stride(),
        v_strides=value.stride(),
        out_strides=out.stride(),
    )
    with torch.cuda.device_of(value):
        filters.prepare[(sum(programs),)](
            p_key=key,
            p_weight=weight,
            p_bias=bias,
            **tables,
            p_f=b_filters,
            p_dense0=denses[0],
            p_dense1=denses[1],
            key_strides=key.stride(),
            rows=problem.rows,
            filter_programs=programs[0],
            dense0_programs=programs[1],
            **problem.keys,
            TAPS=problem.taps,
            PLANES=problem.planes,
            ACC=_ctype(problem.dtype),
            R=knobs['ROWS'],
            T=knobs['TAPS'],
            E=knobs['ELEMENTS'],
            FORMS=problem.constants(),
            num_warps=knobs['WARPS'],
        )
        settings = problem.by_windows()
        if settings:
            windows.forward[
                (problem.units * problem.tiles(windows.KNOBS['COLS']),)
            ](
                p_bias=bias,
                p_lse=lse,
                **tables,
                **maps,
                **settings,
                **problem.regions(),
            )
        for half, form, settings in problem.by_classes():
            grid = problem.units * form['NC'] * form['MT']
            classes.forward[(grid,)](
                p_dense=denses[half],
                p_lse=norms[half],
                **maps,
                **settings,
                TP=form['TP'],
                N=min(classes.KNOBS['TAPS'], form['TP']),
                num_warps=form['M'] // 16,
            )
    return outputs


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = value.shape
    groups = len(small)
    dtype = torch.promote_types(query.dtype, torch.float32)
    planes = 2 if query.element_size() == 2 else 1
    channels = query.shape[1] // groups
    b_filters = query.new_empty(batch, groups, planes, len(bias), channels)
    sizes = [(len(table[0]) + 1) // 2 for table in (small, large)]
    forms = [None, None]
    if classes.count_classes(height, width, max(sizes)) <= (
        classes.MOST_CLASSES
    ):
        forms = _forms(int(height), int(width), *sizes)
    lse = query.new_empty(
        forms.count(None), batch, groups, height, width, dtype=dtype
    )
    dense = query.new_empty(
        sum(map(sum, _dense_sizes(forms, groups))), dtype=dtype
    )
    norms = query.new_empty(
        batch * sum(_positions(forms, groups)), dtype=dtype
    )
    return torch.empty_like(value), lse, norms, b_filters, dense


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
    norms: Tensor,
    b_filters: Tensor,
    dense: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first seven arguments of :func:`_mix`."""
    inputs = query, key, weight, bias, small, large, value
    if not value.numel():
        return tuple(map(torch.zeros_like, inputs))
    grads = tuple(map(torch.empty_like, inputs))
    dq, dkey, dw, dbias, dsmall, dlarge, dv = grads
    problem = _Problem(query, key, small, large, value, scale)
    grad = _narrow(grad)
    batch, groups, units = problem.batch, problem.groups, problem.units
    channels = problem.mixing['CQ']
    sizes = _dense_sizes(problem.forms, groups)
    denses = dense.split([*map(sum, sizes)])

    def scratch(*shape) -> Tensor:
        return lse.new_empty(shape)

    positions = _positions(problem.forms, problem.groups)
    norms = norms.split([n * problem.batch for n in positions])
    tables = dict(p_table0=small, p_table1=large)
    maps = dict(
        p_q=query,
        p_f=b_filters,
        p_do=grad,
        q_strides=query.stride(),
        do_strides=grad.stride(),
    )
    values = dict(p_v=value, v_strides=value.stride())
    outs = dict(p_out=out, out_strides=out.stride())
    dvs = dict(p_dv=dv, dv_strides=dv.stride())
    # Of each size: df, db and the gradient of the table in parts, numbers of
    # parts of the first two, and of chunks of images.
    dfs, dbs, dtables = [None, None], [None, None], [None, None]
    parts, terms, chunks = [0, 0], [0, 0], [0, 0]
    by_classes = list(problem.by_classes())
    total = None  # what the kernels before have made of dq
    with torch.cuda.device_of(value):
        settings = problem.by_windows()
        if settings:
            tiles = problem.tiles(windows.KNOBS['COLS'])
            for half, size in enumerate(problem.sizes):
                if problem.forms[half] is None:
                    dfs[half] = scratch(tiles, units * size**2, channels)
                    dbs[half] = scratch(tiles * units, size**2)
                    dtables[half] = scratch(
                        problem.height,
                        problem.across(windows.KNOBS['COLS']),
                        size,
                        units,
                        2 * size - 1,
                    )
                    parts[half], terms[half] = tiles, tiles * units
            total = (
                torch.empty_like(query, dtype=problem.dtype)
                if by_classes
                else dq
            )
            spans = {
                f'SPAN{half}': _power(2 * size - 1)
                for half, size in enumerate(problem.sizes)
            }
            windows.backward_positions[(units * tiles,)](
                p_bias=bias,
                p_lse=lse,
                **tables,
                **maps,
                **values,
                **outs,
                p_dq=total,
                p_df0=dfs[0],
                p_df1=dfs[1],
                p_db0=dbs[0],
                p_db1=dbs[1],
                p_dtable0=dtables[0],
                p_dtable1=dtables[1],
                dq_strides=total.stride(),
                **settings,
                **problem.regions(),
                **spans,
                maxnreg=windows.KNOBS['REGISTERS'],
            )
            windows.backward_pixels[(units * problem.tiles(problem.pixels),)](
                p_bias=bias,
                p_lse=lse,
                **tables,
                **maps,
                **dvs,
                **settings,
                PIXELS=problem.pixels,
                maxnreg=windows.KNOBS['REGISTERS'],
            )
        for n, (half, form, settings) in enumerate(by_classes):
            tiles = form['NC'] * form['MT']
            m, t, tp, size = (form[name] for name in ('M', 'T', 'TP', 'K'))
            common = dict(maps, **settings, p_lse=norms[half])
            delta = torch.empty_like(norms[half])
            dense = denses[half]
            last = n == len(by_classes) - 1
            result = (
                dq if last else torch.empty_like(query, dtype=problem.dtype)
            )
            classes.backward_query[(units * tiles,)](
                **common,
                **values,
                **outs,
                p_dense=dense,
                p_delta=delta,
                p_dq=result,
                p_sum=total,
                dq_strides=result.stride(),
                sum_strides=None if total is None else total.stride(),
                TP=tp,
                N=min(classes.KNOBS['TAPS'], tp),
                num_warps=m // 16,
            )
            total = result
            each = groups * tiles * (tp // t)
            images = triton.cdiv(
                batch, triton.cdiv(classes.KNOBS['PROGRAMS'], each)
            )
            chunk = triton.cdiv(batch, images)
            dfs[half] = scratch(tiles, units * size**2, channels)
            dbs[half] = scratch(chunk * groups * tiles, tp)
            dtables[half] = scratch(chunk, groups, tiles, m, tp)
            chunks[half], parts[half] = chunk, tiles
            terms[half] = chunk * groups * tiles
            classes.backward_filters[(each * chunk,)](
                **common,
                **values,
                p_dense=dense,
                p_delta=delta,
                p_df=dfs[half],
                p_ddense=dtables[half],
                p_db=dbs[half],
                images=images,
                TP=tp,
                T=t,
                num_warps=t // 16,
                maxnreg=classes.KNOBS['REGISTERS'],
            )
            t, pt = form['PIXELS'], form['PT']
            classes.backward_value[(units * (pt // t),)](
                **common,
                **dvs,
                p_pixels=dense[sizes[half][0] :],
                PT=pt,
                T=t,
                num_warps=t // 16,
            )

        knobs = filters.KNOBS
        tiles = sum(triton.cdiv(k**2, knobs['TAPS']) for k in problem.sizes)
        blocks = triton.cdiv(problem.rows, knobs['ROWS'])
        regions = problem.keys['S']
        dkey_parts = scratch(tiles, problem.rows, regions)
        dw_parts = scratch(blocks, problem.taps, regions)
        filters.contract[(blocks * tiles,)](
            p_df0=dfs[0],
            p_df1=dfs[1],
            p_key=key,
            p_weight=weight,
            p_dkey=dkey_parts,
            p_dw=dw_parts,
            key_strides=key.stride(),
            parts0=parts[0],
            parts1=parts[1],
            rows=problem.rows,
            **problem.keys,
            COUNT0=problem.sizes[0] ** 2,
            COUNT1=problem.sizes[1] ** 2,
            R=knobs['ROWS'],
            T=knobs['TAPS'],
            PARTS=knobs['PARTS'],
            num_warps=knobs['WARPS'],
        )
        key_programs = triton.cdiv(problem.rows * regions, knobs['ELEMENTS'])
        programs = key_programs
        programs += triton.cdiv(problem.taps * regions, knobs['SUMS'])
        for size in problem.sizes:
            programs += triton.cdiv(size**2, knobs['SUMS'])
            programs += groups * (2 * size - 1)
        filters.finish[(programs,)](
            p_dkey=dkey,
            p_dkey_parts=dkey_parts,
            p_dw=dw,
            p_dw_parts=dw_parts,
            p_dbias=dbias,
            p_db0=dbs[0],
            p_db1=dbs[1],
            p_dtable0=dsmall,
            p_dtable1=dlarge,
            p_parts0=dtables[0],
            p_parts1=dtables[1],
            dkey_strides=dkey.stride(),
            rows=problem.rows,
            blocks=blocks,
            batch=batch,
            height=problem.height,
            across=problem.across(windows.KNOBS['COLS']),
            chunks0=chunks[0],
            chunks1=chunks[1],
            terms0=terms[0],
            terms1=terms[1],
            key_programs=key_programs,
            S=regions,
            SX=problem.keys['SX'],
            CHANNELS=query.shape[1],
            TILES=tiles,
            TAPS=problem.taps,
            FORMS=problem.constants(),
            SPAN0=_power(2 * problem.sizes[0] - 1),
            SPAN1=_power(2 * problem.sizes[1] - 1),
            E=knobs['ELEMENTS'],
            TERMS=knobs['TERMS'],
            SUMS=knobs['SUMS'],
            num_warps=knobs['WARPS'],
        )
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
    tensors = ctx.saved_tensors
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
