"""ContMix on maps of any size: every position has a window of its own.

With the filters f of a position's image (filters.py)::

    s[n] = q . f[n] + (bias[n] + table[n - position]) / ln 2     n: tap
    p = 2^(s - lse)
    out = sum over n of p[n] v[window start + n]

Maps are read and written once or twice, but a position and group has K^2
logits, each with an exponential and products of some 16 channels before and
after it. That is more work for the instruction units than for the memory, so
products go to the tensor cores, and all that is between them stays in
registers:

- A program has ROWS rows of COLS positions, a warp for each row, and goes
  through the K rows of taps. The logits of a row of taps are a matrix product
  (COLS x CQ)(CQ x N), folded into a running softmax.
- For one row of taps, a row of positions sees one row of the map, of at most
  COLS - 1 + K values. Shifted by where the windows start (a gather within the
  warp), the weights are a dense matrix, and mixing is another product,
  (COLS x REGION)(REGION x CV).
- Nothing K^2 wide is stored, only the logarithm of the sum of exponentials.

The backward pass makes the kernels again, twice: by positions, for the
gradients of query, filters, biases and tables, and by pixels, for the gradient
of the values, where a tile of pixels goes through the positions that see it.

A program works on one kernel size, or on both, one after the other.

Shapes: as in classes.py; bias (TAPS, ), tables (G, 2K - 1, 2K - 1).
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, dot, exp2, offsets, window_start

KNOBS = dict(
    ROWS=4,  # of positions or pixels of a tile, and warps
    COLS=16,  # of positions
    PIXELS=32,  # columns of pixels
    STAGES=2,
    REGISTERS=168,  # at most, backward, for three blocks a multiprocessor
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    ROWS=(2, 4, 8),
    COLS=(16, 32),
    PIXELS=(16, 32, 64),
    STAGES=(1, 2, 3),
    REGISTERS=(128, 168, 255),
)


@triton.jit
def _first_viewer(pixel, K: tl.constexpr):
    """First position whose window has the pixel."""
    return tl.where(pixel < K, 0, pixel - K // 2)


@triton.jit
def _last_viewer(pixel, length, K: tl.constexpr):
    return tl.where(pixel >= length - K, length - 1, pixel + K // 2)


@triton.jit
def _tile(
    height, width, G: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """What a program works on; a unit is a group of an image.

    Returns:
        tuple: Tile, unit, image, group, rows, first column, columns, and
        which of them are real (ROWS, COLS).
    """
    across = tl.cdiv(width, COLS)
    tiles = across * tl.cdiv(height, ROWS)
    tile = tl.program_id(0) % tiles
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    y = tile // across * ROWS + tl.arange(0, ROWS)
    x0 = tile % across * COLS
    x = x0 + tl.arange(0, COLS)
    real = (y < height)[:, None] & (x < width)[None, :]
    return tile, unit, unit // G, unit % G, y, x0, x, real


@triton.jit
def _pick(index, LENGTH: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr):
    """Indices (ROWS, I, J) for a gather; LAST for (I, J) not in [0, LENGTH).

    The last of a row of taps is none, and has the weight 0.
    """
    index = tl.where((index >= 0) & (index < LENGTH), index, LAST)[None]
    return tl.broadcast_to(index, (ROWS, index.shape[1], index.shape[2]))


@triton.jit
def _logits(
    b_q,
    p_f,
    p_b,
    p_t,
    m_f,
    m_n,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Filters (ROWS, QC, N) and logits (ROWS, COLS, N) of a row of taps."""
    b_b = tl.load(p_b, mask=m_n, other=float('-inf')).to(ACC)
    b_t = tl.load(p_t, mask=m_n, other=0.0).to(ACC)
    b_s = b_t * LOG2E + b_b * LOG2E
    b_f = tl.load(p_f, mask=m_f, other=0.0)
    b_f = tl.broadcast_to(b_f, (b_q.shape[0], b_f.shape[1], b_f.shape[2]))
    b_s = dot(b_q, b_f, b_s)
    if PLANES == 2:
        b_low = tl.load(p_f + PLANE, mask=m_f, other=0.0)
        b_low = tl.broadcast_to(b_low, b_f.shape)
        b_s = dot(b_q, b_low, b_s)
    return b_f, b_s


@triton.jit
def _forward_size(
    b_q,
    p_f,
    p_bias,
    p_table,
    p_v,
    p_out,
    p_lse,
    y,
    x0,
    x,
    real,
    unit,
    image,
    group,
    v_strides,
    out_strides,
    height,
    width,
    G: tl.constexpr,
    CQ: tl.constexpr,
    CV: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    N: tl.constexpr,
    REGION: tl.constexpr,
):
    VT: tl.constexpr = p_v.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    top = window_start(y, height, K)
    left = window_start(x, width, K)
    o_r = window_start(x0, width, K) + tl.arange(0, REGION)
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_n = (o_n < K)[None, None]
    m_f = m_n & (o_q < CQ)[None, :, None]
    m_r = (o_r < width)[None, :, None] & (o_v < CV)[None, None]

    p_f += (unit * PLANES * TAPS + FIRST) * CQ
    p_f += (o_q[:, None] + (o_n * CQ)[None, :])[None]
    p_bias += FIRST + o_n[None, None]
    p_table += group * (2 * K - 1) * (2 * K - 1)
    p_table += offsets(
        top - y + K - 1, left - x + K - 1, o_n, (0, 1, 2 * K - 1, 1)
    )
    channel = (HALF * G + group) * CV
    p_v += image * v_strides[0] + channel * v_strides[1]
    p_v += offsets(top, o_r, o_v, v_strides)
    shift = _pick(o_r[None] - left[:, None], K, ROWS, N - 1)
    b_m = tl.full((ROWS, COLS), float('-inf'), ACC)
    b_l = tl.zeros((ROWS, COLS), ACC)
    b_acc = tl.zeros((ROWS, COLS, VC), ACC)
    for i in range(K):
        b_v = tl.load(
            p_v + tl.cast(i, tl.int64) * v_strides[2], mask=m_r, other=0.0
        )  # (ROWS, REGION, VC)
        b_f, b_s = _logits(
            b_q,
            p_f + i * K * CQ,
            p_bias + i * K,
            p_table + i * (2 * K - 1),
            m_f,
            m_n,
            TAPS * CQ,
            PLANES,
            ACC,
        )
        m_i = tl.maximum(b_m, tl.max(b_s, 2))
        alpha = exp2(b_m - m_i)
        b_p = exp2(b_s - m_i[:, :, None])
        b_l = b_l * alpha + tl.sum(b_p, 2)
        b_m = m_i
        b_p = tl.gather(b_p.to(VT), shift, 2)  # (ROWS, COLS, REGION)
        b_acc = dot(b_p, b_v, b_acc * alpha[:, :, None])

    p_out += image * out_strides[0] + channel * out_strides[1]
    tl.store(
        p_out + offsets(y, x, o_v, out_strides),
        (b_acc / b_l[:, :, None]).to(VT),
        mask=real[:, :, None] & (o_v < CV)[None, None],
    )
    p_lse += (unit * height + y)[:, None] * width
    tl.store(p_lse + x[None], b_m + tl.log2(b_l), mask=real)


@triton.jit
def _load_query(
    p_q,
    y,
    x,
    image,
    group,
    q_strides,
    CQ: tl.constexpr,
    QC: tl.constexpr,
):
    """Queries (ROWS, COLS, QC)."""
    o_q = tl.arange(0, QC)
    p_q += image * q_strides[0] + group * CQ * q_strides[1]
    return tl.load(
        p_q + offsets(y, x, o_q, q_strides),
        mask=(o_q < CQ)[None, None],
        other=0.0,
    )


@triton.jit
def forward(
    p_q,
    p_f,
    p_bias,
    p_table0,
    p_table1,
    p_v,
    p_out,
    p_lse,
    q_strides,
    v_strides,
    out_strides,
    height,
    width,
    units,
    G: tl.constexpr,
    CQ: tl.constexpr,
    CV: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    RUN0: tl.constexpr,
    RUN1: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    REGION0: tl.constexpr,
    REGION1: tl.constexpr,
):
    """out = softmax(s) v, and lse to the base 2.

    Grid: (B * G * tiles of ROWS x COLS positions, ).
    """
    tile, unit, image, group, y, x0, x, real = _tile(
        height, width, G, ROWS, COLS
    )
    y = tl.minimum(y, height - 1)
    x = tl.minimum(x, width - 1)
    b_q = _load_query(p_q, y, x, image, group, q_strides, CQ, QC)
    if RUN0:
        _forward_size(
            b_q,
            p_f,
            p_bias,
            p_table0,
            p_v,
            p_out,
            p_lse,
            y,
            x0,
            x,
            real,
            unit,
            image,
            group,
            v_strides,
            out_strides,
            height,
            width,
            G,
            CQ,
            CV,
            QC,
            VC,
            TAPS,
            PLANES,
            0,
            0,
            K0,
            ROWS,
            COLS,
            N0,
            REGION0,
        )
    if RUN1:
        if RUN0:
            p_lse += tl.cast(units, tl.int64) * height * width
        _forward_size(
            b_q,
            p_f,
            p_bias,
            p_table1,
            p_v,
            p_out,
            p_lse,
            y,
            x0,
            x,
            real,
            unit,
            image,
            group,
            v_strides,
            out_strides,
            height,
            width,
            G,
            CQ,
            CV,
            QC,
            VC,
            TAPS,
            PLANES,
            1,
            K0 * K0,
            K1,
            ROWS,
            COLS,
            N1,
            REGION1,
        )


@triton.jit
def _backward_positions_size(
    b_dq,
    b_q,
    p_f,
    p_bias,
    p_table,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_df,
    p_db,
    p_dtable,
    tile,
    y0,
    y,
    x0,
    x,
    real,
    unit,
    units,
    image,
    group,
    v_strides,
    out_strides,
    do_strides,
    height,
    width,
    G: tl.constexpr,
    CQ: tl.constexpr,
    CV: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    N: tl.constexpr,
    REGION: tl.constexpr,
    SPAN: tl.constexpr,
):
    FT: tl.constexpr = p_f.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    top = window_start(y, height, K)
    left = window_start(x, width, K)
    region0 = window_start(x0, width, K)
    o_r = region0 + tl.arange(0, REGION)
    o_n = tl.arange(0, N)
    o_t = tl.arange(0, SPAN)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_n = (o_n < K)[None, None]
    m_f = m_n & (o_q < CQ)[None, :, None]
    m_r = (o_r < width)[None, :, None] & (o_v < CV)[None, None]
    m_v = real[:, :, None] & (o_v < CV)[None, None]
    m_df = (o_q < CQ)[:, None] & (o_n < K)[None, :]
    m_t = (y0 < height)[:, None] & (o_t < 2 * K - 1)[None, :]
    col = left - x + K - 1

    channel = (HALF * G + group) * CV
    p_do += image * do_strides[0] + channel * do_strides[1]
    b_do = tl.load(p_do + offsets(y, x, o_v, do_strides), mask=m_v, other=0.0)
    p_out += image * out_strides[0] + channel * out_strides[1]
    b_out = tl.load(
        p_out + offsets(y, x, o_v, out_strides), mask=m_v, other=0.0
    )
    b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 2)[:, :, None]
    p_lse += (unit * height + y)[:, None] * width
    b_lse = tl.load(p_lse + x[None])[:, :, None]

    p_f += (unit * PLANES * TAPS + FIRST) * CQ
    p_f += (o_q[:, None] + (o_n * CQ)[None, :])[None]
    p_bias += FIRST + o_n[None, None]
    p_table += group * (2 * K - 1) * (2 * K - 1)
    p_table += offsets(top - y + K - 1, col, o_n, (0, 1, 2 * K - 1, 1))
    p_v += image * v_strides[0] + channel * v_strides[1]
    p_v += offsets(top, o_r, o_v, v_strides)
    part = tile * units + unit
    p_df += part * K * K * CQ + o_q[:, None] + (o_n * CQ)[None, :]
    p_db += part * K * K + o_n
    across = tl.cdiv(width, COLS)
    p_dtable += ((y0.to(tl.int64) * across + tile % across) * K * units)[
        :, None
    ] * (2 * K - 1)
    p_dtable += unit * (2 * K - 1) + o_t[None, :]
    unshift = _pick(
        (left - region0)[:, None] + o_n[None], REGION, ROWS, REGION - 1
    )
    spread = _pick(o_t[None] - col[:, None], K, ROWS, N - 1)
    for i in range(K):
        b_v = tl.load(
            p_v + tl.cast(i, tl.int64) * v_strides[2], mask=m_r, other=0.0
        )  # (ROWS, REGION, VC)
        b_f, b_s = _logits(
            b_q,
            p_f + i * K * CQ,
            p_bias + i * K,
            p_table + i * (2 * K - 1),
            m_f,
            m_n,
            TAPS * CQ,
            PLANES,
            ACC,
        )
        b_p = exp2(b_s - b_lse)
        b_dp = dot(
            b_do,
            tl.permute(b_v, 0, 2, 1),
            tl.zeros((ROWS, COLS, REGION), ACC),
        )
        b_dp = tl.gather(b_dp, unshift, 2)  # (ROWS, COLS, N)
        b_ds = b_p * (b_dp - b_delta)
        b_16 = b_ds.to(FT)
        b_dq = dot(b_16, tl.permute(b_f, 0, 2, 1), b_dq)
        b_df = dot(
            tl.permute(b_q, 0, 2, 1), b_16, tl.zeros((ROWS, QC, N), ACC)
        )
        tl.store(p_df + i * K * CQ, tl.sum(b_df, 0), mask=m_df)
        tl.store(p_db + i * K, tl.sum(tl.sum(b_ds, 1), 0), mask=o_n < K)
        tl.store(
            p_dtable + tl.cast(i, tl.int64) * units * (2 * K - 1),
            tl.sum(tl.gather(b_ds, spread, 2), 1),
            mask=m_t,
        )
    return b_dq


@triton.jit
def backward_positions(
    p_q,
    p_f,
    p_bias,
    p_table0,
    p_table1,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_dq,
    p_df0,
    p_df1,
    p_db0,
    p_db1,
    p_dtable0,
    p_dtable1,
    q_strides,
    v_strides,
    out_strides,
    do_strides,
    dq_strides,
    height,
    width,
    units,
    G: tl.constexpr,
    CQ: tl.constexpr,
    CV: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    RUN0: tl.constexpr,
    RUN1: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    REGION0: tl.constexpr,
    REGION1: tl.constexpr,
    SPAN0: tl.constexpr,
    SPAN1: tl.constexpr,
):
    """ds = p (do v^T - delta), dq = ds f^T, df = ds^T q, and sums of ds.

    Of each kernel size, writes df (tiles, B, G, K^2, CQ), db (tiles, B, G,
    K^2) and dtable (H, tiles across, K, B, G, 2K - 1): a row of positions
    and a row of taps meet one row of the table. Grid: as ``forward``.
    """
    ACC: tl.constexpr = p_lse.dtype.element_ty
    tile, unit, image, group, y0, x0, x, real = _tile(
        height, width, G, ROWS, COLS
    )
    y = tl.minimum(y0, height - 1)
    x = tl.minimum(x, width - 1)
    b_q = _load_query(p_q, y, x, image, group, q_strides, CQ, QC)
    b_dq = tl.zeros((ROWS, COLS, QC), ACC)
    if RUN0:
        b_dq = _backward_positions_size(
            b_dq,
            b_q,
            p_f,
            p_bias,
            p_table0,
            p_v,
            p_out,
            p_lse,
            p_do,
            p_df0,
            p_db0,
            p_dtable0,
            tile,
            y0,
            y,
            x0,
            x,
            real,
            unit,
            units,
            image,
            group,
            v_strides,
            out_strides,
            do_strides,
            height,
            width,
            G,
            CQ,
            CV,
            QC,
            VC,
            TAPS,
            PLANES,
            0,
            0,
            K0,
            ROWS,
            COLS,
            N0,
            REGION0,
            SPAN0,
        )
    if RUN1:
        if RUN0:
            p_lse += tl.cast(units, tl.int64) * height * width
        b_dq = _backward_positions_size(
            b_dq,
            b_q,
            p_f,
            p_bias,
            p_table1,
            p_v,
            p_out,
            p_lse,
            p_do,
            p_df1,
            p_db1,
            p_dtable1,
            tile,
            y0,
            y,
            x0,
            x,
            real,
            unit,
            units,
            image,
            group,
            v_strides,
            out_strides,
            do_strides,
            height,
            width,
            G,
            CQ,
            CV,
            QC,
            VC,
            TAPS,
            PLANES,
            1,
            K0 * K0,
            K1,
            ROWS,
            COLS,
            N1,
            REGION1,
            SPAN1,
        )
    o_q = tl.arange(0, QC)
    p_dq += image * dq_strides[0] + group * CQ * dq_strides[1]
    tl.store(
        p_dq + offsets(y, x, o_q, dq_strides),
        (b_dq * LN2).to(p_dq.dtype.element_ty),
        mask=real[:, :, None] & (o_q < CQ)[None, None],
    )


@triton.jit
def _backward_pixels_size(
    p_q,
    p_f,
    p_bias,
    p_table,
    p_lse,
    p_do,
    p_dv,
    row,
    col0,
    col,
    real,
    unit,
    image,
    group,
    q_strides,
    do_strides,
    dv_strides,
    height,
    width,
    G: tl.constexpr,
    CQ: tl.constexpr,
    CV: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    N: tl.constexpr,
):
    VT: tl.constexpr = p_do.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    first_y = _first_viewer(row, K)
    last_y = _last_viewer(row, height, K)
    first_x = _first_viewer(col0, K)
    last_col = tl.minimum(col0 + PIXELS, width) - 1
    last_x = _last_viewer(last_col, width, K)
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_n = (o_n < K)[None, None]
    m_q = (o_q < CQ)[None, None]
    m_v = (o_v < CV)[None, None]
    m_f = m_n & (o_q < CQ)[None, :, None]

    channel = (HALF * G + group) * CV
    p_q += image * q_strides[0] + group * CQ * q_strides[1]
    p_do += image * do_strides[0] + channel * do_strides[1]
    p_f += (unit * PLANES * TAPS + FIRST) * CQ
    p_bias += FIRST
    p_table += group * (2 * K - 1) * (2 * K - 1)
    p_lse += unit * height * width
    b_dv = tl.zeros((ROWS, PIXELS, VC), ACC)
    for step in range(0, tl.max(last_y - first_y, 0) + 1):
        y = first_y + step
        seen = y <= last_y
        y = tl.minimum(y, height - 1)
        top = window_start(y, height, K)
        i = tl.maximum(row - top, 0)  # the row of taps
        for x0 in range(first_x, last_x + 1, COLS):
            x = x0 + tl.arange(0, COLS)
            both = seen[:, None] & (x < width)[None, :]
            x = tl.minimum(x, width - 1)
            left = window_start(x, width, K)
            b_q = tl.load(
                p_q + offsets(y, x, o_q, q_strides), mask=m_q, other=0.0
            )
            b_do = tl.load(
                p_do + offsets(y, x, o_v, do_strides),
                mask=both[:, :, None] & m_v,
                other=0.0,
            )
            b_lse = tl.load(p_lse + y[:, None] * width + x[None, :])
            b_f, b_s = _logits(
                b_q,
                p_f + offsets(i, o_q, o_n, (0, CQ, K * CQ, 1)),
                p_bias + (i * K)[:, None, None] + o_n[None, None],
                p_table
                + offsets(
                    i + top - y + K - 1,
                    left - x + K - 1,
                    o_n,
                    (0, 1, 2 * K - 1, 1),
                ),
                m_f,
                m_n,
                TAPS * CQ,
                PLANES,
                ACC,
            )
            b_p = exp2(b_s - b_lse[:, :, None])
            shift = _pick(col[None] - left[:, None], K, ROWS, N - 1)
            b_p = tl.gather(b_p.to(VT), shift, 2)  # (ROWS, COLS, PIXELS)
            b_dv = dot(tl.permute(b_p, 0, 2, 1), b_do, b_dv)

    p_dv += image * dv_strides[0] + channel * dv_strides[1]
    tl.store(
        p_dv + offsets(row, col, o_v, dv_strides),
        b_dv.to(VT),
        mask=real[:, :, None] & m_v,
    )


@triton.jit
def backward_pixels(
    p_q,
    p_f,
    p_bias,
    p_table0,
    p_table1,
    p_lse,
    p_do,
    p_dv,
    q_strides,
    do_strides,
    dv_strides,
    height,
    width,
    units,
    G: tl.constexpr,
    CQ: tl.constexpr,
    CV: tl.constexpr,
    QC: tl.constexpr,
    VC: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    RUN0: tl.constexpr,
    RUN1: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIXELS: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
):
    """dv[pixel] = sum of p do over the positions that see the pixel.

    Grid: (B * G * tiles of ROWS x PIXELS pixels, ).
    """
    tile, unit, image, group, row, col0, col, real = _tile(
        height, width, G, ROWS, PIXELS
    )
    row = tl.minimum(row, height - 1)
    if RUN0:
        _backward_pixels_size(
            p_q,
            p_f,
            p_bias,
            p_table0,
            p_lse,
            p_do,
            p_dv,
            row,
            col0,
            col,
            real,
            unit,
            image,
            group,
            q_strides,
            do_strides,
            dv_strides,
            height,
            width,
            G,
            CQ,
            CV,
            QC,
            VC,
            TAPS,
            PLANES,
            0,
            0,
            K0,
            ROWS,
            COLS,
            PIXELS,
            N0,
        )
    if RUN1:
        if RUN0:
            p_lse += tl.cast(units, tl.int64) * height * width
        _backward_pixels_size(
            p_q,
            p_f,
            p_bias,
            p_table1,
            p_lse,
            p_do,
            p_dv,
            row,
            col0,
            col,
            real,
            unit,
            image,
            group,
            q_strides,
            do_strides,
            dv_strides,
            height,
            width,
            G,
            CQ,
            CV,
            QC,
            VC,
            TAPS,
            PLANES,
            1,
            K0 * K0,
            K1,
            ROWS,
            COLS,
            PIXELS,
            N1,
        )
