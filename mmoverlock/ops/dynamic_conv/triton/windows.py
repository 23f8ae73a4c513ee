"""ContMix on maps of any size: every position has a window of its own.

With the filters f of a position's image, and biases of all taps by where the
position is in its window (filters.py)::

    s[n] = q . f[n] + dense[n]       n: tap
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

Shapes: as in classes.py, but lse (B, G, H, W) and dense (G, K^2, K, N), N > K
taps of a row, where those beyond K have the weight 0.

FORMS go on with ROWS, COLS and PIXELS of a tile, REGION, STAGES.
"""

import triton
import triton.language as tl

from .common import (
    dot,
    exp2,
    log2,
    map_offset,
    offsets,
    power,
    window_start,
)

KNOBS = dict(
    ROWS=4,  # of positions or pixels of a tile, and warps
    COLS=16,  # of positions
    PIXELS=32,  # columns of pixels
    STAGES=2,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    ROWS=(2, 4, 8),
    COLS=(16, 32),
    PIXELS=(16, 32, 64),
    STAGES=(1, 2, 3),
)


def tile_windows(width: int, size: int) -> dict:
    """Constants of the tiling of a map."""
    row = power(size + 1)
    return dict(
        K=size,
        TP=size * row,
        NT=row,
        SPAN=power(2 * size - 1),
        ROWS=KNOBS['ROWS'],
        COLS=KNOBS['COLS'],
        PIXELS=min(KNOBS['PIXELS'], power(width)),
        REGION=power(min(size + KNOBS['COLS'] - 1, width)),
        STAGES=KNOBS['STAGES'],
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
    pid,
    height,
    width,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What a program works on.

    Returns:
        tuple: Tile, images, group, rows, first column, columns, and which of
        them are real (ROWS, COLS).
    """
    across = tl.cdiv(width, COLS)
    tiles = across * tl.cdiv(height, ROWS)
    tile = pid % tiles
    rest = pid // tiles
    y = tile // across * ROWS + tl.arange(0, ROWS)
    x0 = tile % across * COLS
    x = x0 + tl.arange(0, COLS)
    real = (y < height)[:, None] & (x < width)[None, :]
    return tile, rest // G, rest % G, y, x0, x, real


@triton.jit
def _pick(index, LENGTH: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr):
    """Indices (ROWS, I, J) for a gather; LAST for (I, J) not in [0, LENGTH).

    The last of a row of taps is none, and has the weight 0.
    """
    index = tl.where((index >= 0) & (index < LENGTH), index, LAST)[None]
    return tl.broadcast_to(index, (ROWS, index.shape[1], index.shape[2]))


@triton.jit
def _dense_rows(down, across, group, HALF: tl.constexpr, FORMS: tl.constexpr):
    """Rows (ROWS, COLS, 1) of the biases, by where windows start.

    ``down`` (ROWS, ) and ``across`` (COLS, ) are from there to positions.
    """
    K: tl.constexpr = FORMS[HALF][2]
    row = ((group * K + down) * K)[:, None] + across[None, :]
    return (row * FORMS[HALF][3])[:, :, None]


@triton.jit
def _logits(b_q, p_f, p_dense, m_f, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """Filters (ROWS, QC, N) and logits (ROWS, COLS, N) of a row of taps."""
    b_s = tl.load(p_dense)
    b_f = tl.load(p_f, mask=m_f, other=0.0)
    b_f = tl.broadcast_to(b_f, (b_q.shape[0], b_f.shape[1], b_f.shape[2]))
    b_s = dot(b_q, b_f, b_s)
    if PLANES == 2:
        b_low = tl.load(p_f + PLANE, mask=m_f, other=0.0)
        b_low = tl.broadcast_to(b_low, b_f.shape)
        b_s = dot(b_q, b_low, b_s)
    return b_f, b_s


@triton.jit
def forward(
    pid,
    p_q,
    p_f,
    p_dense,
    p_v,
    p_out,
    p_lse,
    q_strides,
    v_strides,
    out_strides,
    batch,
    images,
    height,
    width,
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """out = softmax(s) v, and lse to the base 2.

    Programs: chunks of images * G * tiles of ROWS x COLS positions.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    VC: tl.constexpr = MIX[4]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    N: tl.constexpr = FORMS[HALF][4]
    ROWS: tl.constexpr = FORMS[HALF][6]
    COLS: tl.constexpr = FORMS[HALF][7]
    VT: tl.constexpr = p_v.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    _, chunk, group, y, x0, x, real = _tile(pid, height, width, G, ROWS, COLS)
    y = tl.minimum(y, height - 1)
    x = tl.minimum(x, width - 1)
    top = window_start(y, height, K)
    left = window_start(x, width, K)
    o_r = window_start(x0, width, K) + tl.arange(0, FORMS[HALF][9])
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, MIX[3])
    o_v = tl.arange(0, VC)
    m_f = (o_n < K)[None, None] & (o_q < CQ)[None, :, None]
    m_r = (o_r < width)[None, :, None] & (o_v < CV)[None, None]
    o_f = (o_q[:, None] + (o_n * CQ)[None, :])[None]
    o_in = offsets(top, o_r, o_v, v_strides)
    p_dense += _dense_rows(y - top, x - left, group, HALF, FORMS)
    p_dense += o_n[None, None]
    channel = (HALF * G + group) * CV
    shift = _pick(o_r[None] - left[:, None], K, ROWS, N - 1)
    for image in tl.range(
        chunk * images, tl.minimum((chunk + 1) * images, batch), num_stages=1
    ):
        unit = (image * G + group).to(tl.int64)
        p_image = p_q + map_offset(image, group * CQ, q_strides)
        b_q = tl.load(
            p_image + offsets(y, x, o_q, q_strides),
            mask=(o_q < CQ)[None, None],
            other=0.0,
        )
        p_unit = p_f + (unit * PLANES * TAPS + FORMS[HALF][1]) * CQ
        p_image = p_v + map_offset(image, channel, v_strides)
        b_m = tl.full((ROWS, COLS), float('-inf'), ACC)
        b_l = tl.zeros((ROWS, COLS), ACC)
        b_acc = tl.zeros((ROWS, COLS, VC), ACC)
        for i in tl.range(K, num_stages=FORMS[HALF][10]):
            b_v = tl.load(
                p_image + i * v_strides[2] + o_in, mask=m_r, other=0.0
            )  # (ROWS, REGION, VC)
            b_f, b_s = _logits(
                b_q,
                p_unit + i * K * CQ + o_f,
                p_dense + i * N,
                m_f,
                TAPS * CQ,
                PLANES,
            )
            m_i = tl.maximum(b_m, tl.max(b_s, 2))
            alpha = exp2(b_m - m_i)
            b_p = exp2(b_s - m_i[:, :, None])
            b_l = b_l * alpha + tl.sum(b_p, 2)
            b_m = m_i
            b_p = tl.gather(b_p.to(VT), shift, 2)  # (ROWS, COLS, REGION)
            b_acc = dot(b_p, b_v, b_acc * alpha[:, :, None])

        p_image = p_out + map_offset(image, channel, out_strides)
        tl.store(
            p_image + offsets(y, x, o_v, out_strides),
            (b_acc * (1 / b_l)[:, :, None]).to(VT),
            mask=real[:, :, None] & (o_v < CV)[None, None],
        )
        p_image = p_lse + unit * height * width
        o_lse = (y * width)[:, None] + x[None]
        tl.store(p_image + o_lse, b_m + log2(b_l), mask=real)


@triton.jit
def backward_positions(
    pid,
    p_q,
    p_f,
    p_dense,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_dq,
    p_df,
    p_db,
    p_dtable,
    q_strides,
    v_strides,
    out_strides,
    do_strides,
    batch,
    images,
    height,
    width,
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """ds = p (do v^T - delta), dq / ln 2 = ds f^T, df = ds^T q, sums of ds.

    Writes df (tiles, B, G, K^2, CQ), db (tiles, B, G, K^2) and dtable (H,
    tiles across, K, B, G, 2K - 1): a row of positions and a row of taps meet
    one row of the table. Programs: as ``forward``.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    QC: tl.constexpr = MIX[3]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    N: tl.constexpr = FORMS[HALF][4]
    ROWS: tl.constexpr = FORMS[HALF][6]
    COLS: tl.constexpr = FORMS[HALF][7]
    REGION: tl.constexpr = FORMS[HALF][9]
    FT: tl.constexpr = p_f.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    units = batch * G
    tile, chunk, group, y0, x0, x, real = _tile(
        pid, height, width, G, ROWS, COLS
    )
    y = tl.minimum(y0, height - 1)
    x = tl.minimum(x, width - 1)
    top = window_start(y, height, K)
    left = window_start(x, width, K)
    region0 = window_start(x0, width, K)
    o_r = region0 + tl.arange(0, REGION)
    o_n = tl.arange(0, N)
    o_t = tl.arange(0, FORMS[HALF][5])
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, MIX[4])
    m_f = (o_n < K)[None, None] & (o_q < CQ)[None, :, None]
    m_r = (o_r < width)[None, :, None] & (o_v < CV)[None, None]
    m_v = real[:, :, None] & (o_v < CV)[None, None]
    m_df = (o_q < CQ)[:, None] & (o_n < K)[None, :]
    m_t = (y0 < height)[:, None] & (o_t < 2 * K - 1)[None, :]
    o_f = (o_q[:, None] + (o_n * CQ)[None, :])[None]
    o_in = offsets(top, o_r, o_v, v_strides)
    p_dense += _dense_rows(y - top, x - left, group, HALF, FORMS)
    p_dense += o_n[None, None]
    o_df = o_q[:, None] + (o_n * CQ)[None, :]
    across = tl.cdiv(width, COLS)
    p_dtable += ((y0.to(tl.int64) * across + tile % across) * K * units)[
        :, None
    ] * (2 * K - 1)
    p_dtable += o_t[None, :]
    o_pixel = (y * width)[:, None] + x[None]
    unshift = _pick(
        (left - region0)[:, None] + o_n[None], REGION, ROWS, REGION - 1
    )
    col = left - x + K - 1
    spread = _pick(o_t[None] - col[:, None], K, ROWS, N - 1)
    channel = (HALF * G + group) * CV
    for image in tl.range(
        chunk * images, tl.minimum((chunk + 1) * images, batch), num_stages=1
    ):
        unit = (image * G + group).to(tl.int64)
        p_image = p_q + map_offset(image, group * CQ, q_strides)
        b_q = tl.load(
            p_image + offsets(y, x, o_q, q_strides),
            mask=(o_q < CQ)[None, None],
            other=0.0,
        )
        p_image = p_do + map_offset(image, channel, do_strides)
        b_do = tl.load(
            p_image + offsets(y, x, o_v, do_strides), mask=m_v, other=0.0
        )
        p_image = p_out + map_offset(image, channel, out_strides)
        b_out = tl.load(
            p_image + offsets(y, x, o_v, out_strides), mask=m_v, other=0.0
        )
        b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 2)[:, :, None]
        b_lse = tl.load(p_lse + unit * height * width + o_pixel)[:, :, None]
        p_unit = p_f + (unit * PLANES * TAPS + FORMS[HALF][1]) * CQ
        p_image = p_v + map_offset(image, channel, v_strides)
        part = (tile * units + unit) * K * K
        b_dq = tl.zeros((ROWS, COLS, QC), ACC)
        for i in tl.range(K, num_stages=FORMS[HALF][10]):
            b_v = tl.load(
                p_image + i * v_strides[2] + o_in, mask=m_r, other=0.0
            )  # (ROWS, REGION, VC)
            b_f, b_s = _logits(
                b_q,
                p_unit + i * K * CQ + o_f,
                p_dense + i * N,
                m_f,
                TAPS * CQ,
                PLANES,
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
            p_part = p_df + (part + i * K) * CQ
            tl.store(p_part + o_df, tl.sum(b_df, 0), mask=m_df)
            tl.store(
                p_db + part + i * K + o_n,
                tl.sum(tl.sum(b_ds, 1), 0),
                mask=o_n < K,
            )
            tl.store(
                p_dtable + (i * units + unit) * (2 * K - 1),
                tl.sum(tl.gather(b_ds, spread, 2), 1),
                mask=m_t,
            )
        p_image = p_dq + (
            (tl.cast(image, tl.int64) * height * width * G + group) * CQ
        )
        tl.store(
            p_image + (o_pixel * G * CQ)[:, :, None] + o_q[None, None],
            b_dq,
            mask=real[:, :, None] & (o_q < CQ)[None, None],
        )


@triton.jit
def backward_pixels(
    pid,
    p_q,
    p_f,
    p_dense,
    p_lse,
    p_do,
    p_dv,
    q_strides,
    do_strides,
    dv_strides,
    batch,
    images,
    height,
    width,
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """dv[pixel] = sum of p do over the positions that see the pixel.

    Programs: chunks of images * G * tiles of ROWS x PIXELS pixels.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    VC: tl.constexpr = MIX[4]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    N: tl.constexpr = FORMS[HALF][4]
    ROWS: tl.constexpr = FORMS[HALF][6]
    COLS: tl.constexpr = FORMS[HALF][7]
    PIXELS: tl.constexpr = FORMS[HALF][8]
    VT: tl.constexpr = p_do.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    _, chunk, group, row, col0, col, real = _tile(
        pid, height, width, G, ROWS, PIXELS
    )
    row = tl.minimum(row, height - 1)
    first_y = _first_viewer(row, K)
    last_y = _last_viewer(row, height, K)
    first_x = _first_viewer(col0, K)
    last_col = tl.minimum(col0 + PIXELS, width) - 1
    last_x = _last_viewer(last_col, width, K)
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, MIX[3])
    o_v = tl.arange(0, VC)
    m_q = (o_q < CQ)[None, None]
    m_v = (o_v < CV)[None, None]
    m_f = (o_n < K)[None, None] & (o_q < CQ)[None, :, None]
    o_f = (o_q[:, None] + (o_n * CQ)[None, :])[None]
    p_dense += o_n[None, None]
    channel = (HALF * G + group) * CV
    for image in tl.range(
        chunk * images, tl.minimum((chunk + 1) * images, batch), num_stages=1
    ):
        unit = (image * G + group).to(tl.int64)
        p_queries = p_q + map_offset(image, group * CQ, q_strides)
        p_grads = p_do + map_offset(image, channel, do_strides)
        p_unit = p_f + (unit * PLANES * TAPS + FORMS[HALF][1]) * CQ
        b_dv = tl.zeros((ROWS, PIXELS, VC), ACC)
        for step in tl.range(
            tl.max(last_y - first_y, 0) + 1, num_stages=FORMS[HALF][10]
        ):
            y = first_y + step
            seen = y <= last_y
            y = tl.minimum(y, height - 1)
            top = window_start(y, height, K)
            i = tl.maximum(row - top, 0)[:, None, None]  # the row of taps
            for x0 in tl.range(
                first_x, last_x + 1, COLS, num_stages=FORMS[HALF][10]
            ):
                x = x0 + tl.arange(0, COLS)
                both = seen[:, None] & (x < width)[None, :]
                x = tl.minimum(x, width - 1)
                left = window_start(x, width, K)
                o_x = offsets(y, x, o_q, q_strides)
                b_q = tl.load(p_queries + o_x, mask=m_q, other=0.0)
                b_do = tl.load(
                    p_grads + offsets(y, x, o_v, do_strides),
                    mask=both[:, :, None] & m_v,
                    other=0.0,
                )
                o_lse = (y * width)[:, None] + x[None, :]
                b_lse = tl.load(p_lse + unit * height * width + o_lse)
                o_dense = _dense_rows(y - top, x - left, group, HALF, FORMS)
                b_f, b_s = _logits(
                    b_q,
                    p_unit + i * K * CQ + o_f,
                    p_dense + o_dense + i * N,
                    m_f,
                    TAPS * CQ,
                    PLANES,
                )
                b_p = exp2(b_s - b_lse[:, :, None])
                shift = _pick(col[None] - left[:, None], K, ROWS, N - 1)
                b_p = tl.gather(b_p.to(VT), shift, 2)  # (ROWS, COLS, PIXELS)
                b_dv = dot(tl.permute(b_p, 0, 2, 1), b_do, b_dv)

        p_image = p_dv + map_offset(image, channel, dv_strides)
        tl.store(
            p_image + offsets(row, col, o_v, dv_strides),
            b_dv.to(VT),
            mask=real[:, :, None] & m_v,
        )
