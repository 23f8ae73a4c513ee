"""ContMix as Triton kernels for NVIDIA GPUs, forward and backward.

With ``filters = key weight``, formed once per image, the logits of a position
are ``query . filters[tap] + bias[tap] + table[tap - position]``, for each of
the two kernel sizes, which run one after the other.

What bounds it: maps are read and written once or twice, but a position and
group has K^2 logits, each with an exponential and products of some 16
channels before and after it. That is more work for the instruction units than
for the memory, so products go to the tensor cores, and all that is between
them stays in registers:

- A program has ROWS rows of 16 positions, a warp for each row, and goes
  through the K rows of taps. The logits of a row of taps are a matrix product
  (16 x c)(c x TAPS), folded into a running softmax.
- For one row of taps, a row of 16 positions sees one row of the map, of at
  most 15 + K values. Shifted by where the windows start (a gather within the
  warp), the weights are a dense matrix, and mixing is another product,
  (16 x REGION)(REGION x C).
- Nothing K^2 wide is stored, only the logarithm of the sum of exponentials.

The backward pass makes the kernels again, twice: by positions, for the
gradients of query, filters, bias and tables, and by pixels, for the gradient
of the values, where a tile of pixels goes through the positions that see it.
Sums over positions are written in parts, which PyTorch adds. There are no
atomic operations, so results are the same in every run.

Products of fp32 are made of three of TF32, which keeps the precision of fp32.
Offsets have 64 bits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Rows of a tile of positions or pixels, and its columns.
ROWS = 4
COLS = 16
PIXELS = 32

INTERPRET = triton.knobs.runtime.interpret
LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr('tf32x3')  # of products of fp32


@triton.jit
def _start(position, length, K: tl.constexpr):
    """Start of the window of a position."""
    return tl.minimum(tl.maximum(position - K // 2, 0), length - K)


@triton.jit
def _first_viewer(pixel, K: tl.constexpr):
    """First position whose window has the pixel."""
    return tl.where(pixel < K, 0, pixel - K // 2)


@triton.jit
def _last_viewer(pixel, length, K: tl.constexpr):
    return tl.where(pixel >= length - K, length - 1, pixel + K // 2)


@triton.jit
def _at(y, x, channel, strides):
    """Offsets (Y, X, C) of rows, columns and channels in an image."""
    y = y.to(tl.int64) * strides[2]
    x = x.to(tl.int64) * strides[3]
    channel = channel.to(tl.int64) * strides[1]
    return y[:, None, None] + x[None, :, None] + channel[None, None, :]


@triton.jit
def _tile(height, width, groups, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What a program works on; a unit is a group of an image."""
    across = tl.cdiv(width, COLS)
    tiles = across * tl.cdiv(height, ROWS)
    tile = tl.program_id(0) % tiles
    unit = tl.program_id(0) // tiles
    image = (unit // groups).to(tl.int64)
    group = (unit % groups).to(tl.int64)
    y = tile // across * ROWS + tl.arange(0, ROWS)
    x0 = tile % across * COLS
    x = x0 + tl.arange(0, COLS)
    real = (y < height)[:, None] & (x < width)[None, :]
    return tile, unit.to(tl.int64), image, group, y, x0, x, real


@triton.jit
def _of_group(tensor, strides, image, group, channels):
    """Pointer to the first channel of a group of an image."""
    return tensor + image * strides[0] + group * channels * strides[1]


@triton.jit
def _row(filters, bias, table, i, f_mask, tap, K: tl.constexpr):
    """Filters (Y, C, TAPS) and biases (Y, X, TAPS) of row i of the taps."""
    f = tl.load(filters + i * K, mask=f_mask, other=0.0)
    f = tl.broadcast_to(f[None], (table.shape[0], f.shape[0], f.shape[1]))
    b = tl.load(bias + i * K, mask=tap < K, other=float('-inf'))
    t = tl.load(table + i * (2 * K - 1), mask=(tap < K)[None, None], other=0.0)
    return f, t + b[None, None]


@triton.jit
def _taps(index, LENGTH: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr):
    """Indices (ROWS, I, J) for a gather; LAST for (I, J) not in [0, LENGTH).

    The last of a row of taps is none, and has the weight 0.
    """
    index = tl.where((index >= 0) & (index < LENGTH), index, LAST)[None]
    return tl.broadcast_to(index, (ROWS, index.shape[1], index.shape[2]))


@triton.jit
def _forward(
    query,
    filters,
    bias,
    table,
    value,
    out,
    lse,
    query_strides,
    value_strides,
    out_strides,
    height,
    width,
    groups,
    q_channels,
    v_channels,
    taps,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAPS: tl.constexpr,
    REGION: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    DTYPE: tl.constexpr = filters.dtype.element_ty
    VALUE: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if UPCAST else VALUE
    ACC: tl.constexpr = tl.float64 if VALUE == tl.float64 else tl.float32
    tile, unit, image, group, y, x0, x, real = _tile(
        height, width, groups, ROWS, COLS
    )
    y = tl.minimum(y, height - 1)
    x = tl.minimum(x, width - 1)
    top = _start(y, height, K)
    left = _start(x, width, K)
    region = _start(x0, width, K) + tl.arange(0, REGION)
    tap = tl.arange(0, TAPS)
    qc = tl.arange(0, QC)
    vc = tl.arange(0, VC)
    q_mask = (qc < q_channels)[None, None]
    v_mask = (vc < v_channels)[None, None]
    f_mask = (qc < q_channels)[:, None] & (tap < K)[None]

    query = _of_group(query, query_strides, image, group, q_channels)
    q = tl.load(query + _at(y, x, qc, query_strides), mask=q_mask, other=0.0)
    q = q.to(DTYPE)
    filters += unit * q_channels * taps + FIRST
    filters += qc[:, None] * taps + tap[None]
    bias += FIRST + tap
    table += group * (2 * K - 1) * (2 * K - 1)
    table += _at(top - y + K - 1, left - x + K - 1, tap, (0, 1, 2 * K - 1, 1))
    value = _of_group(value, value_strides, image, group, v_channels)
    value += _at(top, region, vc, value_strides)
    shift = _taps(region[None] - left[:, None], K, ROWS, TAPS - 1)
    most = tl.full((ROWS, COLS), float('-inf'), DTYPE)
    total = tl.zeros((ROWS, COLS), DTYPE)
    acc = tl.zeros((ROWS, COLS, VC), ACC)
    for i in range(K):
        f, logits = _row(filters, bias, table, i, f_mask, tap, K)
        v = tl.load(
            value + tl.cast(i, tl.int64) * value_strides[2],
            mask=(region < width)[None, :, None] & v_mask,
            other=0.0,
        ).to(FACTOR)
        logits = tl.dot(
            q, f, acc=logits, input_precision=PRECISION, out_dtype=DTYPE
        )
        logits *= LOG2E
        higher = tl.maximum(most, tl.max(logits, 2))
        shrink = tl.exp2(most - higher)
        kernel = tl.exp2(logits - higher[:, :, None])
        most = higher
        total = total * shrink + tl.sum(kernel, 2)
        dense = tl.gather(kernel.to(VALUE).to(FACTOR), shift, 2)
        acc *= shrink[:, :, None].to(ACC)
        acc = tl.dot(
            dense, v, acc=acc, input_precision=PRECISION, out_dtype=ACC
        )

    out = _of_group(out, out_strides, image, group, v_channels)
    tl.store(
        out + _at(y, x, vc, out_strides),
        (acc / total[:, :, None].to(ACC)).to(VALUE),
        mask=real[:, :, None] & v_mask,
    )
    at = (unit * height + y)[:, None] * width + x[None]
    tl.store(lse + at, most + tl.log2(total), mask=real)


@triton.jit
def _backward_positions(
    query,
    filters,
    bias,
    table,
    value,
    out,
    lse,
    grad,
    grad_query,
    grad_filters,
    grad_table,
    query_strides,
    value_strides,
    out_strides,
    grad_strides,
    result_strides,
    height,
    width,
    groups,
    q_channels,
    v_channels,
    taps,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAPS: tl.constexpr,
    REGION: tl.constexpr,
    SPAN: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    DTYPE: tl.constexpr = filters.dtype.element_ty
    VALUE: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if UPCAST else VALUE
    ACC: tl.constexpr = tl.float64 if VALUE == tl.float64 else tl.float32
    tile, unit, image, group, y0, x0, x, real = _tile(
        height, width, groups, ROWS, COLS
    )
    y = tl.minimum(y0, height - 1)
    x = tl.minimum(x, width - 1)
    top = _start(y, height, K)
    left = _start(x, width, K)
    region0 = _start(x0, width, K)
    region = region0 + tl.arange(0, REGION)
    col = left - x + K - 1
    tap = tl.arange(0, TAPS)
    span = tl.arange(0, SPAN)
    qc = tl.arange(0, QC)
    vc = tl.arange(0, VC)
    q_mask = (qc < q_channels)[None, None]
    v_mask = (vc < v_channels)[None, None]
    f_mask = (qc < q_channels)[:, None] & (tap < K)[None]

    query = _of_group(query, query_strides, image, group, q_channels)
    q = tl.load(query + _at(y, x, qc, query_strides), mask=q_mask, other=0.0)
    q = q.to(DTYPE)
    v_real = real[:, :, None] & v_mask
    grad = _of_group(grad, grad_strides, image, group, v_channels)
    g = tl.load(grad + _at(y, x, vc, grad_strides), mask=v_real, other=0.0)
    g = g.to(FACTOR)
    out = _of_group(out, out_strides, image, group, v_channels)
    o = tl.load(out + _at(y, x, vc, out_strides), mask=v_real, other=0.0)
    mean = tl.sum(g.to(ACC) * o.to(ACC), 2).to(DTYPE)[:, :, None]
    at = (unit * height + y)[:, None] * width + x[None]
    norm = tl.load(lse + at)[:, :, None]

    filters += unit * q_channels * taps + FIRST
    filters += qc[:, None] * taps + tap[None]
    bias += FIRST + tap
    table += group * (2 * K - 1) * (2 * K - 1)
    table += _at(top - y + K - 1, col, tap, (0, 1, 2 * K - 1, 1))
    value = _of_group(value, value_strides, image, group, v_channels)
    value += _at(top, region, vc, value_strides)
    across = tl.cdiv(width, COLS)
    units = tl.num_programs(0) // (across * tl.cdiv(height, ROWS))
    # (tiles, units, q_channels + 1, K^2): the last row is of the bias
    grad_filters += (tile * units + unit) * (q_channels + 1) * K * K + tap
    # (height, K, across, units, 2K - 1)
    grad_table += ((y0.to(tl.int64) * K * across + tile % across) * units)[
        :, None
    ] * (2 * K - 1)
    grad_table += unit * (2 * K - 1) + span[None]
    t_mask = (y0 < height)[:, None] & (span < 2 * K - 1)[None]
    unshift = _taps(
        (left - region0)[:, None] + tap[None], REGION, ROWS, REGION - 1
    )
    spread = _taps(span[None] - col[:, None], K, ROWS, TAPS - 1)
    gq = tl.zeros((ROWS, COLS, QC), DTYPE)
    for i in range(K):
        f, logits = _row(filters, bias, table, i, f_mask, tap, K)
        v = tl.load(
            value + tl.cast(i, tl.int64) * value_strides[2],
            mask=(region < width)[None, :, None] & v_mask,
            other=0.0,
        ).to(FACTOR)
        logits = tl.dot(
            q, f, acc=logits, input_precision=PRECISION, out_dtype=DTYPE
        )
        kernel = tl.exp2(logits * LOG2E - norm)
        gk = tl.dot(
            g, tl.permute(v, 0, 2, 1), input_precision=PRECISION, out_dtype=ACC
        )
        gk = tl.gather(gk.to(DTYPE), unshift, 2)
        gl = kernel * (gk - mean)
        gq = tl.dot(
            gl,
            tl.permute(f, 0, 2, 1),
            acc=gq,
            input_precision=PRECISION,
            out_dtype=DTYPE,
        )
        gf = tl.dot(
            tl.permute(q, 0, 2, 1),
            gl,
            input_precision=PRECISION,
            out_dtype=DTYPE,
        )
        tl.store(
            grad_filters + i * K + (qc * K * K)[:, None],
            tl.sum(gf, 0),
            mask=f_mask,
        )
        tl.store(
            grad_filters + i * K + q_channels * K * K,
            tl.sum(tl.sum(gl, 1), 0),
            mask=tap < K,
        )
        tl.store(
            grad_table + tl.cast(i, tl.int64) * across * units * (2 * K - 1),
            tl.sum(tl.gather(gl, spread, 2), 1),
            mask=t_mask,
        )

    grad_query = _of_group(
        grad_query, result_strides, image, group, q_channels
    )
    tl.store(
        grad_query + _at(y, x, qc, result_strides),
        gq.to(grad_query.dtype.element_ty),
        mask=real[:, :, None] & q_mask,
    )


@triton.jit
def _backward_pixels(
    query,
    filters,
    bias,
    table,
    lse,
    grad,
    grad_value,
    query_strides,
    grad_strides,
    result_strides,
    height,
    width,
    groups,
    q_channels,
    v_channels,
    taps,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    DTYPE: tl.constexpr = filters.dtype.element_ty
    VALUE: tl.constexpr = grad.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if UPCAST else VALUE
    ACC: tl.constexpr = tl.float64 if VALUE == tl.float64 else tl.float32
    tile, unit, image, group, row, col0, col, real = _tile(
        height, width, groups, ROWS, PIXELS
    )
    row = tl.minimum(row, height - 1)
    first_y = _first_viewer(row, K)
    last_y = _last_viewer(row, height, K)
    first_x = _first_viewer(col0, K)
    last_col = tl.minimum(col0 + PIXELS, width) - 1
    last_x = _last_viewer(last_col, width, K)
    tap = tl.arange(0, TAPS)
    qc = tl.arange(0, QC)
    vc = tl.arange(0, VC)
    q_mask = (qc < q_channels)[None, None]
    v_mask = (vc < v_channels)[None, None]
    f_mask = (qc < q_channels)[None, :, None] & (tap < K)[None, None]

    query = _of_group(query, query_strides, image, group, q_channels)
    grad = _of_group(grad, grad_strides, image, group, v_channels)
    filters += unit * q_channels * taps + FIRST
    bias += FIRST
    table += group * (2 * K - 1) * (2 * K - 1)
    acc = tl.zeros((ROWS, PIXELS, VC), ACC)
    for n in range(0, tl.max(last_y - first_y, 0) + 1):
        y = first_y + n
        seen = y <= last_y
        y = tl.minimum(y, height - 1)
        top = _start(y, height, K)
        i = tl.maximum(row - top, 0)  # the row of taps
        row_t = i + top - y + K - 1
        f = tl.load(
            filters + _at(i, qc, tap, (0, 1, K, taps)), mask=f_mask, other=0.0
        )
        b = tl.load(
            bias + (i * K)[:, None] + tap[None],
            mask=(tap < K)[None],
            other=float('-inf'),
        )
        for x0 in range(first_x, last_x + 1, COLS):
            x = x0 + tl.arange(0, COLS)
            both = seen[:, None] & (x < width)[None]
            x = tl.minimum(x, width - 1)
            left = _start(x, width, K)
            q = tl.load(
                query + _at(y, x, qc, query_strides), mask=q_mask, other=0.0
            )
            g = tl.load(
                grad + _at(y, x, vc, grad_strides),
                mask=both[:, :, None] & v_mask,
                other=0.0,
            ).to(FACTOR)
            at = (unit * height + y)[:, None] * width + x[None]
            norm = tl.load(lse + at)
            t = tl.load(
                table
                + _at(row_t, left - x + K - 1, tap, (0, 1, 2 * K - 1, 1)),
                mask=(tap < K)[None, None],
                other=0.0,
            )
            logits = t + b[:, None]
            logits = tl.dot(
                q.to(DTYPE),
                f,
                acc=logits,
                input_precision=PRECISION,
                out_dtype=DTYPE,
            )
            kernel = tl.exp2(logits * LOG2E - norm[:, :, None])
            shift = _taps(col[None] - left[:, None], K, ROWS, TAPS - 1)
            dense = tl.gather(kernel.to(VALUE).to(FACTOR), shift, 2)
            acc = tl.dot(
                tl.permute(dense, 0, 2, 1),
                g,
                acc=acc,
                input_precision=PRECISION,
                out_dtype=ACC,
            )

    grad_value = _of_group(
        grad_value, result_strides, image, group, v_channels
    )
    tl.store(
        grad_value + _at(row, col, vc, result_strides),
        acc.to(VALUE),
        mask=real[:, :, None] & v_mask,
    )


def _power(size):
    """Sizes of blocks are powers of 2, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _halves(query, small, large, value):
    """For each kernel size: its channels, and what all its kernels take."""
    half = value.shape[1] // 2
    channels = query.shape[1] // len(small), half // len(small)
    first = 0
    for i, table in enumerate((small, large)):
        k = (table.shape[-1] + 1) // 2
        settings = dict(
            table=table,
            height=value.shape[2],
            width=value.shape[3],
            groups=len(small),
            q_channels=channels[0],
            v_channels=channels[1],
            FIRST=first,
            K=k,
            ROWS=ROWS,
            COLS=COLS,
            TAPS=_power(k + 1),
            QC=_power(channels[0]),
            VC=_power(channels[1]),
            # The interpreter computes nonsense from products of bf16.
            UPCAST=INTERPRET and value.dtype == torch.bfloat16,
            num_warps=ROWS,
        )
        yield slice(i * half, (i + 1) * half), settings
        first += k**2


def _tiles(value, cols):
    return triton.cdiv(value.shape[2], ROWS) * triton.cdiv(
        value.shape[3], cols
    )


@torch.library.custom_op('mmoverlock::contmix', mutates_args=())
def _mix(
    query: Tensor,
    filters: Tensor,
    bias: Tensor,
    small: Tensor,
    large: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mix with both kernel sizes.

    Args:
        query (Tensor): (B, G * c, H, W).
        filters (Tensor): (B, G, c, k^2 + K^2), contiguous as the next three.
        bias (Tensor): (k^2 + K^2, ).
        small, large (Tensor): (G, 2k - 1, 2k - 1), (G, 2K - 1, 2K - 1).
        value (Tensor): (B, C, H, W).

    Returns:
        tuple[Tensor]: (B, C, H, W) and, for each kernel size, the logarithms
        to the base 2 of the sums of exponentials, (2, B, G, H, W).
    """
    out, lse = _empty_outputs(query, filters, bias, small, large, value)
    grid = (len(value) * len(small) * _tiles(value, COLS),)
    if not value.numel():
        return out, lse
    for i, (half, settings) in enumerate(_halves(query, small, large, value)):
        v, o = value[:, half], out[:, half]
        with torch.cuda.device_of(value):
            _forward[grid](
                query=query,
                filters=filters,
                bias=bias,
                value=v,
                out=o,
                lse=lse[i],
                taps=len(bias),
                REGION=_power(settings['K'] + COLS - 1),
                query_strides=query.stride(),
                value_strides=v.stride(),
                out_strides=o.stride(),
                **settings,
            )
    return out, lse


@_mix.register_fake
def _empty_outputs(query, filters, bias, small, large, value):
    batch, _, height, width = value.shape
    lse = filters.new_empty(2, batch, len(small), height, width)
    return torch.empty_like(value), lse


@torch.library.custom_op('mmoverlock::contmix_backward', mutates_args=())
def _mix_backward(
    grad: Tensor,
    query: Tensor,
    filters: Tensor,
    bias: Tensor,
    small: Tensor,
    large: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six arguments of :func:`_mix`."""
    if not value.numel():
        return tuple(
            torch.zeros_like(t)
            for t in (query, filters, bias, small, large, value)
        )
    units = len(value) * len(small)
    grad_value = torch.empty_like(value)
    parts = []
    for i, (half, settings) in enumerate(_halves(query, small, large, value)):
        k = settings['K']
        v, o, g, gv = (t[:, half] for t in (value, out, grad, grad_value))
        common = dict(
            query=query,
            filters=filters,
            bias=bias,
            lse=lse[i],
            grad=g,
            query_strides=query.stride(),
            grad_strides=g.stride(),
            taps=len(bias),
        )
        # Both kernel sizes add to it, in single precision at least.
        grad_query = torch.empty_like(query, dtype=filters.dtype)
        tiles = _tiles(value, COLS)
        across = triton.cdiv(value.shape[3], COLS)
        grad_filters = filters.new_empty(
            tiles, units, settings['q_channels'] + 1, k**2
        )
        grad_table = filters.new_empty(
            value.shape[2], k, across, len(value), len(small), 2 * k - 1
        )
        with torch.cuda.device_of(value):
            _backward_positions[(units * tiles,)](
                value=v,
                out=o,
                grad_query=grad_query,
                grad_filters=grad_filters,
                grad_table=grad_table,
                REGION=_power(k + COLS - 1),
                SPAN=_power(2 * k - 1),
                value_strides=v.stride(),
                out_strides=o.stride(),
                result_strides=grad_query.stride(),
                **common,
                **settings,
            )
            _backward_pixels[(units * _tiles(value, PIXELS),)](
                grad_value=gv,
                PIXELS=PIXELS,
                result_strides=gv.stride(),
                **common,
                **settings,
            )
        grad_filters = grad_filters.sum(0)
        grad_bias = grad_filters[:, -1].sum(0)
        grad_filters = grad_filters[:, :-1].unflatten(0, filters.shape[:2])
        grad_table = _sum_windows(grad_table.sum((2, 3)))
        parts.append((grad_query, grad_filters, grad_bias, grad_table))
    queries, others, biases, tables = zip(*parts, strict=True)
    return (
        (queries[0] + queries[1]).to(query.dtype),
        torch.cat(others, dim=-1),
        torch.cat(biases),
        *tables,
        grad_value,
    )


def _sum_windows(rows: Tensor) -> Tensor:
    """Add windows of the table up: (H, K, G, 2K - 1) to (G, 2K - 1, 2K - 1).

    Args:
        rows (Tensor): For every row of positions, what it adds to the rows of
            its window in the table.
    """
    k = rows.shape[1]
    side = k // 2
    # Rows near a border have windows of their own, which start at row K - 1
    # of the table for the first ones and at row 0 for the last.
    middle = rows[side : len(rows) - side].sum(0, keepdim=True)
    windows = torch.cat([rows[:side], middle, rows[len(rows) - side :]])
    # With K zeros behind each, the sum along diagonals is one of columns.
    windows = F.pad(windows.flip(0), (0, 0, 0, 0, 0, k)).flatten(0, 1)
    windows = windows[: k * (2 * k - 1)].unflatten(0, (k, -1))
    return windows.sum(0).transpose(0, 1)


@_mix_backward.register_fake
def _(grad, query, filters, bias, small, large, value, out, lse):
    return tuple(
        torch.empty_like(t)
        for t in (query, filters, bias, small, large, value)
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    return _mix_backward(grad, *ctx.saved_tensors)


_mix.register_autograd(_differentiate, setup_context=_save)


def contmix_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: tuple[Tensor, Tensor],
) -> Tensor:
    """See :func:`mmoverlock.ops.contmix`.

    ``query`` may be in a lower precision than the other operands of kernels:
    it is converted on the fly.

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
    groups = len(rpb[0])
    filters = key.flatten(2).unflatten(1, (groups, -1)) @ weight.T
    operands = (filters, bias, *rpb)
    return _mix(query, *(t.contiguous() for t in operands), value)[0]
