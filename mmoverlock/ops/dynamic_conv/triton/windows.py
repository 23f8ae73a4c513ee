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
  through the K rows of taps, R in a step: all of a small kernel, or one. The
  logits of a step are a matrix product (COLS x CQ)(CQ x N), folded into a
  running softmax.
- For one row of taps, a row of positions sees one row of the map, of at most
  COLS - 1 + K values; where those are 16, two rows are a region. Shifted by
  where the windows start (a gather within the warp), the weights are a dense
  matrix, and mixing is another product, (COLS x REGION)(REGION x CV).
- Nothing K^2 wide is stored, only the logarithm of the sum of exponentials.

The backward pass makes the kernels again, twice: by positions, for the
gradients of query, filters, biases and tables, and by pixels, for the gradient
of the values, where a tile of pixels goes through the positions that see it.

Shapes: as in classes.py, but lse (B, G, H, W) and dense (G, K^2, K, N), N > K
taps of a row, where those beyond K have the weight 0.

FORMS go on with ROWS, COLS and PIXELS of a tile, REGION, STAGES, R, N taps of
a step, and ACROSS columns of a region, which has REGION pixels.
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
    TAPS=32,  # of a step, if all of a kernel and another one are no more
    STAGES=2,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    ROWS=(2, 4, 8),
    COLS=(16, 32),
    PIXELS=(16, 32, 64),
    TAPS=(16, 32),
    STAGES=(1, 2, 3),
)


def tile_windows(width: int, size: int) -> dict:
    """Constants of the tiling of a map."""
    row = power(size + 1)
    # A small kernel is a single step.
    rows = size if size**2 < KNOBS['TAPS'] else 1
    across = power(min(size + KNOBS['COLS'] - 1, width))
    return dict(
        K=size,
        TP=size * row,
        NT=row,
        SPAN=power(2 * size - 1),
        ROWS=KNOBS['ROWS'],
        COLS=KNOBS['COLS'],
        PIXELS=min(KNOBS['PIXELS'], power(width)),
        REGION=max(across, 32) if rows > 1 else across,
        STAGES=KNOBS['STAGES'],
        R=rows,
        N=power(rows * size + 1),
        ACROSS=across,
    )


@triton.jit
def _first_viewer(pixel, K: tl.constexpr):
    """First position whose window has the pixel."""
    return tl.where(pixel < K, 0, pixel - K // 2)


@triton.jit
def _last_viewer(pixel, length, K: tl.constexpr):
    """Last position whose window has the pixel."""
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
    """The share of a program.

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
def _taps(pixels, starts, N: tl.constexpr, K: tl.constexpr):
    """Taps (I, J) by which windows see pixels along an axis, N - 1 if none."""
    tap = pixels - starts
    return tl.where((tap >= 0) & (tap < K), tap, N - 1)


@triton.jit
def _pick(b_x, index):
    """Gather (ROWS, I, J) of the last axis, in all rows alike.

    The last tap of a step is none, and has the weight 0.
    """
    shape: tl.constexpr = (b_x.shape[0], index.shape[0], index.shape[1])
    index = tl.minimum(index, b_x.shape[2] - 1)[None]
    return tl.gather(b_x, tl.broadcast_to(index, shape), 2)


@triton.jit
def _dense_rows(down, across, group, HALF: tl.constexpr, FORMS: tl.constexpr):
    """Rows (ROWS, COLS, 1) of the biases, by where windows start.

    ``down`` (ROWS, ) and ``across`` (COLS, ) are from there to positions.
    """
    K: tl.constexpr = FORMS[HALF][2]
    row = ((group * K + down) * K)[:, None] + across[None, :]
    return (row * FORMS[HALF][3])[:, :, None]


@triton.jit
def _dense_taps(HALF: tl.constexpr, FORMS: tl.constexpr):
    """Positions of taps of a step (1, 1, N) in a row of the biases."""
    K: tl.constexpr = FORMS[HALF][2]
    NT: tl.constexpr = FORMS[HALF][4]
    n = tl.arange(0, FORMS[HALF][12])
    there = n < FORMS[HALF][11] * K
    return tl.where(there, n // K * NT + n % K, NT - 1)[None, None]


@triton.jit
def _region(
    top,
    x0,
    channel,
    width,
    strides,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """The pixels that a tile sees with some rows of taps, from their first on.

    Returns:
        tuple: Their rows, columns (REGION, ), offsets (ROWS, REGION, C), and
        which there are (1, REGION, 1).
    """
    ACROSS: tl.constexpr = FORMS[HALF][13]
    o_e = tl.arange(0, FORMS[HALF][9])
    band = o_e // ACROSS
    col = window_start(x0, width, FORMS[HALF][2]) + o_e % ACROSS
    pixel = ((top[:, None] + band) * strides[2]) + col * strides[3]
    at = pixel[:, :, None] + (channel * strides[1])[None, None, :]
    return band, col, at, (col < width)[None, :, None]


@triton.jit
def _logits(b_q, p_f, b_s, m_f, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """Filters (ROWS, QC, N) and logits (ROWS, COLS, N), biases added."""
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
    ROWS: tl.constexpr = FORMS[HALF][6]
    COLS: tl.constexpr = FORMS[HALF][7]
    R: tl.constexpr = FORMS[HALF][11]
    N: tl.constexpr = FORMS[HALF][12]
    BAND: tl.constexpr = FORMS[HALF][9] // FORMS[HALF][13]
    VT: tl.constexpr = p_v.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    _, chunk, group, y, x0, x, real = _tile(pid, height, width, G, ROWS, COLS)
    y = tl.minimum(y, height - 1)
    x = tl.minimum(x, width - 1)
    top = window_start(y, height, K)
    left = window_start(x, width, K)
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, MIX[3])
    o_v = tl.arange(0, VC)
    m_f = (o_n < R * K)[None, None] & (o_q < CQ)[None, :, None]
    o_f = (o_q[:, None] + (o_n * CQ)[None, :])[None]
    band, col, o_in, m_in = _region(
        top, x0, o_v, width, v_strides, HALF, FORMS
    )
    m_v = (o_v < CV)[None, None]
    tap = band[None] * K + _taps(col[None], left[:, None], N, K)
    p_dense += _dense_rows(y - top, x - left, group, HALF, FORMS)
    p_dense += _dense_taps(HALF, FORMS)
    channel = (HALF * G + group) * CV
    if R == K:
        b_dense = tl.load(p_dense)
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
        for i in tl.range(0, K, R, num_stages=FORMS[HALF][10]):
            if R < K:
                b_dense = tl.load(p_dense + i * N)
            p_i = p_unit + i * K * CQ + o_f
            b_f, b_s = _logits(b_q, p_i, b_dense, m_f, TAPS * CQ, PLANES)
            m_i = tl.maximum(b_m, tl.max(b_s, 2))
            alpha = exp2(b_m - m_i)
            b_p = exp2(b_s - m_i[:, :, None])
            b_l = b_l * alpha + tl.sum(b_p, 2)
            b_m = m_i
            b_p = b_p.to(VT)
            b_acc *= alpha[:, :, None]
            for r in tl.static_range(0, R, BAND):
                b_v = tl.load(
                    p_image + (i + r) * v_strides[2] + o_in,
                    mask=m_in & m_v & (band < R - r)[None, :, None],
                    other=0.0,
                )  # (ROWS, REGION, VC)
                b_acc = dot(_pick(b_p, tap + r * K), b_v, b_acc)

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
def _store_sums(
    b_ds,
    p_db,
    p_dtable,
    units,
    tile,
    height,
    width,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """Sums of ds (ROWS, COLS, N): over positions; of a row, for the table."""
    ROWS: tl.constexpr = FORMS[HALF][6]
    COLS: tl.constexpr = FORMS[HALF][7]
    K: tl.constexpr = FORMS[HALF][2]
    R: tl.constexpr = FORMS[HALF][11]
    N: tl.constexpr = FORMS[HALF][12]
    o_n = tl.arange(0, N)
    tl.store(p_db + o_n, tl.sum(tl.sum(b_ds, 1), 0), mask=o_n < R * K)
    o_t = tl.arange(0, FORMS[HALF][5])
    across = tl.cdiv(width, COLS)
    x = tl.minimum(tile % across * COLS + tl.arange(0, COLS), width - 1)
    shift = (x - window_start(x, width, K))[:, None]
    tap = _taps(o_t[None] - (K - 1), -shift, N, K)
    y = tile // across * ROWS
    step = tl.cast(K * units * (2 * K - 1), tl.int64)
    p_dtable += (y * across + tile % across) * step
    o_y = tl.arange(0, ROWS)[:, None]
    o_table = o_y * across * step + o_t[None]
    m_t = (o_y < height - y) & (o_t < 2 * K - 1)[None]
    for r in tl.static_range(R):
        b_row = tl.sum(_pick(b_ds, tap + r * K), 1)
        p_row = p_dtable + r * units * (2 * K - 1)
        tl.store(p_row + o_table, b_row, mask=m_t)


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
    one row of the table. With all taps in a step, the last two are by chunks
    of images in place of B. Programs: as ``forward``.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    QC: tl.constexpr = MIX[3]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    ROWS: tl.constexpr = FORMS[HALF][6]
    COLS: tl.constexpr = FORMS[HALF][7]
    REGION: tl.constexpr = FORMS[HALF][9]
    R: tl.constexpr = FORMS[HALF][11]
    N: tl.constexpr = FORMS[HALF][12]
    ACROSS: tl.constexpr = FORMS[HALF][13]
    FT: tl.constexpr = p_f.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    units = (tl.cdiv(batch, images) if R == K else batch) * G
    tile, chunk, group, y0, x0, x, real = _tile(
        pid, height, width, G, ROWS, COLS
    )
    y = tl.minimum(y0, height - 1)
    x = tl.minimum(x, width - 1)
    top = window_start(y, height, K)
    left = window_start(x, width, K)
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, MIX[4])
    m_n = o_n < R * K
    m_f = m_n[None, None] & (o_q < CQ)[None, :, None]
    m_c = (o_v < CV)[None, None]
    m_v = real[:, :, None] & m_c
    m_df = m_n[:, None] & (o_q < CQ)[None, :]
    o_f = (o_q[:, None] + (o_n * CQ)[None, :])[None]
    band, col, o_in, m_in = _region(
        top, x0, o_v, width, v_strides, HALF, FORMS
    )
    p_dense += _dense_rows(y - top, x - left, group, HALF, FORMS)
    p_dense += _dense_taps(HALF, FORMS)
    o_df = (o_n * CQ)[:, None] + o_q[None, :]
    o_pixel = (y * width)[:, None] + x[None]
    pixel = (left - window_start(x0, width, K))[:, None] + o_n[None] % K
    pixel = (pixel + o_n[None] // K * ACROSS) % REGION
    channel = (HALF * G + group) * CV
    if R == K:
        b_dense = tl.load(p_dense)
        b_sum = tl.zeros((ROWS, COLS, N), ACC)
    for image in tl.range(
        chunk * images,
        tl.minimum((chunk + 1) * images, batch),
        num_stages=1,
        disable_licm=True,
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
        part = (tl.cast(tile, tl.int64) * batch * G + unit) * K * K
        b_dq = tl.zeros((ROWS, COLS, QC), ACC)
        for i in tl.range(0, K, R, num_stages=FORMS[HALF][10]):
            b_dp = tl.zeros((ROWS, COLS, N), ACC)
            for r in tl.range(0, R, REGION // ACROSS, num_stages=1):
                b_v = tl.load(
                    p_image + (i + r) * v_strides[2] + o_in,
                    mask=m_in & m_c & (band < R - r)[None, :, None],
                    other=0.0,
                )  # (ROWS, REGION, VC)
                b_seen = dot(
                    b_do,
                    tl.permute(b_v, 0, 2, 1),
                    tl.zeros((ROWS, COLS, REGION), ACC),
                )
                b_seen = _pick(b_seen, pixel)
                b_dp = tl.where((o_n >= r * K)[None, None], b_seen, b_dp)
            if R < K:
                b_dense = tl.load(p_dense + i * N)
            p_i = p_unit + i * K * CQ + o_f
            b_f, b_s = _logits(b_q, p_i, b_dense, m_f, TAPS * CQ, PLANES)
            b_ds = exp2(b_s - b_lse) * (b_dp - b_delta)
            b_16 = b_ds.to(FT)
            b_dq = dot(b_16, tl.permute(b_f, 0, 2, 1), b_dq)
            b_df = dot(
                tl.trans(tl.reshape(b_16, (ROWS * COLS, N))),
                tl.reshape(b_q, (ROWS * COLS, QC)),
                tl.zeros((N, QC), ACC),
            )
            tl.store(p_df + (part + i * K) * CQ + o_df, b_df, mask=m_df)
            if R == K:
                b_sum += b_ds
            else:
                _store_sums(
                    b_ds,
                    p_db + (tile * units + unit) * K * K + i * K,
                    p_dtable + (i * units + unit) * (2 * K - 1),
                    units,
                    tile,
                    height,
                    width,
                    HALF,
                    FORMS,
                )
        p_image = p_dq + (
            (tl.cast(image, tl.int64) * height * width * G + group) * CQ
        )
        tl.store(
            p_image + (o_pixel * G * CQ)[:, :, None] + o_q[None, None],
            b_dq,
            mask=real[:, :, None] & (o_q < CQ)[None, None],
        )
    if R == K:
        unit = chunk * G + group
        _store_sums(
            b_sum,
            p_db + (tile * units + unit) * K * K,
            p_dtable + unit * (2 * K - 1),
            units,
            tile,
            height,
            width,
            HALF,
            FORMS,
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
    ADDS: tl.constexpr,
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
    steps = tl.max(last_y - first_y, 0) + 1
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
        for x0 in tl.range(first_x, last_x + 1, COLS, num_stages=1):
            x = x0 + tl.arange(0, COLS)
            m_x = x < width
            x = tl.minimum(x, width - 1)
            left = window_start(x, width, K)
            tap = _taps(col[None], left[:, None], N, K)
            for step in tl.range(steps, num_stages=FORMS[HALF][10]):
                y = first_y + step
                seen = y <= last_y
                y = tl.minimum(y, height - 1)
                top = window_start(y, height, K)
                i = tl.maximum(row - top, 0)[:, None, None]  # row of taps
                o_x = offsets(y, x, o_q, q_strides)
                b_q = tl.load(p_queries + o_x, mask=m_q, other=0.0)
                b_do = tl.load(
                    p_grads + offsets(y, x, o_v, do_strides),
                    mask=(seen[:, None] & m_x[None, :])[:, :, None] & m_v,
                    other=0.0,
                )
                o_lse = (y * width)[:, None] + x[None, :]
                b_lse = tl.load(p_lse + unit * height * width + o_lse)
                o_dense = _dense_rows(y - top, x - left, group, HALF, FORMS)
                b_s = tl.load(p_dense + o_dense + i * N)
                p_i = p_unit + i * K * CQ + o_f
                b_f, b_s = _logits(b_q, p_i, b_s, m_f, TAPS * CQ, PLANES)
                b_p = exp2(b_s - b_lse[:, :, None]).to(VT)
                b_p = _pick(b_p, tap)  # (ROWS, COLS, PIXELS)
                b_dv = dot(tl.permute(b_p, 0, 2, 1), b_do, b_dv)

        p_image = p_dv + map_offset(image, channel, dv_strides)
        o_dv = offsets(row, col, o_v, dv_strides)
        m_dv = real[:, :, None] & m_v
        if ADDS:
            b_dv += tl.load(p_image + o_dv, mask=m_dv)
        tl.store(p_image + o_dv, b_dv.to(VT), mask=m_dv)
