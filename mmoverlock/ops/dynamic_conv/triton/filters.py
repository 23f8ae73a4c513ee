"""What ContMix makes of its key and weights before, and of sums after.

``prepare`` runs once a forward pass, ``contract`` and ``finish`` at the end
of the backward pass; nothing else is launched but the kernels that mix. Sums
are made in parts and in a fixed order, without atomic operations.

Filters are ``scale key^T weight^T / ln 2``, (B, G, PLANES, TAPS, CQ), TAPS
the taps of both kernel sizes. They have the dtype of the query; where that
has 16 bits, a second plane has what rounding to the first one lost.
"""

import triton
import triton.language as tl

from .classes import class_positions
from .common import LOG2E, dot, window_start

KNOBS = dict(
    ROWS=64,  # channels of a tile
    TAPS=32,  # of a tile
    PARTS=4,  # loaded at a time
    ELEMENTS=1024,  # of maps and tables, made by a program
    SUMS=16,  # columns of a tile of what is added up
    TERMS=128,  # rows of it
    WARPS=8,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    ROWS=(32, 64, 128),
    TAPS=(16, 32, 64),
    PARTS=(2, 4, 8),
    ELEMENTS=(512, 1024, 2048),
    SUMS=(8, 16, 32),
    TERMS=(64, 128, 256),
    WARPS=(4, 8),
)


@triton.jit
def _load_key(
    p_key,
    o_row,
    rows,
    key_strides,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Rows (R, SP) of the key as a (B * channels, S) matrix."""
    o_s = tl.arange(0, SP)
    image = (o_row // CHANNELS).to(tl.int64)
    channel = o_row % CHANNELS
    o_row = image * key_strides[0] + channel * key_strides[1]
    o_col = o_s // SX * key_strides[2] + o_s % SX * key_strides[3]
    return tl.load(
        p_key + o_row[:, None] + o_col[None, :],
        mask=(image * CHANNELS < rows)[:, None] & (o_s < S)[None, :],
        other=0.0,
    )


@triton.jit
def _make_filters(
    pid,
    p_key,
    p_weight,
    p_f,
    key_strides,
    rows,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    CQ: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """A tile of filters, of rows of the key and of taps."""
    FT: tl.constexpr = p_f.dtype.element_ty
    TILES: tl.constexpr = (TAPS + T - 1) // T
    o_row = pid // TILES * R + tl.arange(0, R)
    o_tap = pid % TILES * T + tl.arange(0, T)
    o_s = tl.arange(0, SP)
    b_key = _load_key(p_key, o_row, rows, key_strides, S, SP, SX, CHANNELS)
    b_w = tl.load(
        p_weight + o_tap[None, :] * S + o_s[:, None],
        mask=(o_tap < TAPS)[None, :] & (o_s < S)[:, None],
        other=0.0,
    )  # (SP, T)
    b_f = dot(b_key.to(ACC), b_w.to(ACC), tl.zeros((R, T), ACC))
    b_f *= SCALE * LOG2E
    unit = (o_row // CQ).to(tl.int64)
    o_f = unit * PLANES * TAPS * CQ + o_row % CQ
    o_f = o_f[:, None] + (o_tap * CQ)[None, :]
    m_f = (o_row < rows)[:, None] & (o_tap < TAPS)[None, :]
    b_high = b_f.to(FT)
    tl.store(p_f + o_f, b_high, mask=m_f)
    if PLANES == 2:
        b_low = (b_f - b_high.to(ACC)).to(FT)
        tl.store(p_f + TAPS * CQ + o_f, b_low, mask=m_f)


@triton.jit
def _make_dense(
    pid,
    p_bias,
    p_table,
    p_dense,
    ACC: tl.constexpr,
    FORMS: tl.constexpr,
    HALF: tl.constexpr,
    E: tl.constexpr,
):
    """Biases as logarithms to the base 2, by taps and then by pixels."""
    G: tl.constexpr = FORMS[HALF][0]
    H: tl.constexpr = FORMS[HALF][1]
    W: tl.constexpr = FORMS[HALF][2]
    K: tl.constexpr = FORMS[HALF][3]
    NC: tl.constexpr = FORMS[HALF][4]
    M: tl.constexpr = FORMS[HALF][5]
    MT: tl.constexpr = FORMS[HALF][6]
    TP: tl.constexpr = FORMS[HALF][7]
    PT: tl.constexpr = FORMS[HALF][8]
    TILES: tl.constexpr = NC * MT
    BLOCKS: tl.constexpr = (G * TILES * M * TP + E - 1) // E
    at = pid * E + tl.arange(0, E)
    if pid < BLOCKS:
        n = at % TP
        m = at // TP % M
        tile = at // (TP * M) % TILES
        group = at // (TP * M * TILES)
    else:
        at -= BLOCKS * E
        n = at // M % PT
        m = at % M
        tile = at // (M * PT) % TILES
        group = at // (M * PT * TILES)
    m += tile % MT * M
    y, x, m_m, top, left = class_positions(tile // MT, m, H, W, K)
    if pid < BLOCKS:
        i = n // K
        j = n % K
    else:
        i = n // W - top
        j = n % W - left
        p_dense += G * TILES * M * TP
    inside = (i >= 0) & (i < K) & (j >= 0) & (j < K)
    real = m_m & inside & (group < G)
    row = top + i - y + K - 1
    col = left + j - x + K - 1
    bias = tl.load(p_bias + i * K + j, mask=real, other=0.0).to(ACC)
    table = tl.load(
        p_table + (group * (2 * K - 1) + row) * (2 * K - 1) + col,
        mask=real,
        other=0.0,
    ).to(ACC)
    dense = tl.where(inside, (bias + table) * LOG2E, float('-inf'))
    tl.store(p_dense + at, dense, mask=group < G)


@triton.jit
def prepare(
    p_key,
    p_weight,
    p_bias,
    p_table0,
    p_table1,
    p_f,
    p_dense0,
    p_dense1,
    key_strides,
    rows,
    filter_programs,
    dense0_programs,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    CQ: tl.constexpr,
    TAPS: tl.constexpr,
    PLANES: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    FORMS: tl.constexpr,
):
    """Filters; and dense biases for each kernel size that runs by classes.

    ``FORMS`` are (G, H, W, K, NC, M, MT, TP, PT) of the two sizes, see
    classes.py, NC = 0 for one that does not run by classes. Grid: (tiles of
    filters + blocks of E of the first dense biases + of the second, ).
    """
    pid = tl.program_id(0)
    if pid < filter_programs:
        _make_filters(
            pid,
            p_key,
            p_weight,
            p_f,
            key_strides,
            rows,
            SCALE,
            S,
            SP,
            SX,
            CHANNELS,
            CQ,
            TAPS,
            PLANES,
            ACC,
            R,
            T,
        )
    elif pid < filter_programs + dense0_programs:
        if FORMS[0][4] > 0:
            _make_dense(
                pid - filter_programs,
                p_bias,
                p_table0,
                p_dense0,
                ACC,
                FORMS,
                0,
                E,
            )
    else:
        if FORMS[1][4] > 0:
            _make_dense(
                pid - filter_programs - dense0_programs,
                p_bias + FORMS[0][3] * FORMS[0][3],
                p_table1,
                p_dense1,
                ACC,
                FORMS,
                1,
                E,
            )


@triton.jit
def _contract_size(
    tile,
    o_row,
    p_df,
    parts,
    p_key,
    p_weight,
    p_dkey,
    p_dw,
    key_strides,
    rows,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    CQ: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
):
    ACC: tl.constexpr = p_df.dtype.element_ty
    n = tile * T + tl.arange(0, T)
    o_s = tl.arange(0, SP)
    m_n = n < COUNT
    m_row = o_row < rows
    m_s = o_s < S
    o_df = (o_row // CQ).to(tl.int64) * COUNT * CQ + o_row % CQ
    o_df = (n * CQ)[:, None] + o_df[None, :]
    m_df = m_n[:, None] & m_row[None, :]
    b_df = tl.zeros((T, R), ACC)
    for part in range(0, parts, PARTS):
        for i in tl.static_range(PARTS):
            at = tl.cast(part + i, tl.int64)
            b_df += tl.load(
                p_df + at * rows * COUNT + o_df,
                mask=m_df & (at < parts),
                other=0.0,
            )
    b_df *= SCALE
    b_w = tl.load(
        p_weight + ((FIRST + n) * S)[:, None] + o_s[None, :],
        mask=m_n[:, None] & m_s[None, :],
        other=0.0,
    ).to(ACC)
    b_dkey = dot(tl.trans(b_df), b_w, tl.zeros((R, SP), ACC))
    tl.store(
        p_dkey + (o_row * S)[:, None] + o_s[None, :],
        b_dkey,
        mask=m_row[:, None] & m_s[None, :],
    )
    b_key = _load_key(p_key, o_row, rows, key_strides, S, SP, SX, CHANNELS)
    b_dw = dot(b_df, b_key.to(ACC), tl.zeros((T, SP), ACC))
    tl.store(
        p_dw + ((FIRST + n) * S)[:, None] + o_s[None, :],
        b_dw,
        mask=m_n[:, None] & m_s[None, :],
    )


@triton.jit
def contract(
    p_df0,
    p_df1,
    p_key,
    p_weight,
    p_dkey,
    p_dw,
    key_strides,
    parts0,
    parts1,
    rows,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    CQ: tl.constexpr,
    COUNT0: tl.constexpr,
    COUNT1: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Parts of dkey = scale df weight and dweight = scale df^T key.

    df of a kernel size is the sum of (parts, B, G, K^2, CQ). Writes dkey
    (tiles of taps, B * G * CQ, S) and dweight (tiles of rows, TAPS, S). Grid:
    (tiles of rows * tiles of taps, ).
    """
    TILES0: tl.constexpr = (COUNT0 + T - 1) // T
    TILES: tl.constexpr = TILES0 + (COUNT1 + T - 1) // T
    TAPS: tl.constexpr = COUNT0 + COUNT1
    pid = tl.program_id(0)
    block = pid // TILES
    tile = pid % TILES
    o_row = block * R + tl.arange(0, R)
    p_dkey += tl.cast(tile, tl.int64) * rows * S
    p_dw += tl.cast(block, tl.int64) * TAPS * S
    if tile < TILES0:
        _contract_size(
            tile,
            o_row,
            p_df0,
            parts0,
            p_key,
            p_weight,
            p_dkey,
            p_dw,
            key_strides,
            rows,
            SCALE,
            S,
            SP,
            SX,
            CHANNELS,
            CQ,
            0,
            COUNT0,
            R,
            T,
            PARTS,
        )
    else:
        _contract_size(
            tile - TILES0,
            o_row,
            p_df1,
            parts1,
            p_key,
            p_weight,
            p_dkey,
            p_dw,
            key_strides,
            rows,
            SCALE,
            S,
            SP,
            SX,
            CHANNELS,
            CQ,
            COUNT0,
            COUNT1,
            R,
            T,
            PARTS,
        )


@triton.jit
def _sum_rows(
    pid,
    p_out,
    p_parts,
    parts,
    cols,
    stride,
    TERMS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Sums of the columns of (parts, cols) with rows ``stride`` apart."""
    o_c = pid * SUMS + tl.arange(0, SUMS)
    o_p = tl.arange(0, TERMS)
    b_sum = tl.zeros((SUMS,), p_parts.dtype.element_ty)
    for part in range(0, parts, TERMS):
        at = (part + o_p).to(tl.int64)
        b_sum += tl.sum(
            tl.load(
                p_parts + (at * stride)[:, None] + o_c[None, :],
                mask=(at < parts)[:, None] & (o_c < cols)[None, :],
                other=0.0,
            ),
            0,
        )
    b_sum = b_sum.to(p_out.dtype.element_ty)
    tl.store(p_out + o_c, b_sum, mask=o_c < cols)


@triton.jit
def _sum_key(
    pid,
    p_dkey,
    p_parts,
    rows,
    dkey_strides,
    TILES: tl.constexpr,
    S: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    E: tl.constexpr,
):
    at = pid.to(tl.int64) * E + tl.arange(0, E)
    m_at = at < rows * S
    b_sum = tl.zeros((E,), p_parts.dtype.element_ty)
    for tile in tl.static_range(TILES):
        o_part = at + tl.cast(tile, tl.int64) * rows * S
        b_sum += tl.load(p_parts + o_part, mask=m_at, other=0.0)
    s = at % S
    row = at // S
    o_key = row // CHANNELS * dkey_strides[0]
    o_key += row % CHANNELS * dkey_strides[1]
    o_key += s // SX * dkey_strides[2] + s % SX * dkey_strides[3]
    tl.store(p_dkey + o_key, b_sum.to(p_dkey.dtype.element_ty), mask=m_at)


@triton.jit
def _sum_table_of_windows(
    group,
    row,
    p_parts,
    batch,
    height,
    across,
    G: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    TERMS: tl.constexpr,
):
    """A row of the gradient of a table, of (H, across, K, B, G, 2K - 1)."""
    o_c = tl.arange(0, SPAN)
    o_p = tl.arange(0, TERMS)
    b_sum = tl.zeros((SPAN,), p_parts.dtype.element_ty)
    for part in range(0, height * across * batch, TERMS):
        at = part + o_p
        y = at // (across * batch)
        i = row - (K - 1) + y - window_start(y, height, K)
        m_p = (y < height) & (i >= 0) & (i < K)
        o_part = (at // batch).to(tl.int64) * K + i
        o_part = (o_part * batch + at % batch) * G + group
        b_sum += tl.sum(
            tl.load(
                p_parts + (o_part * (2 * K - 1))[:, None] + o_c[None, :],
                mask=m_p[:, None] & (o_c < 2 * K - 1)[None, :],
                other=0.0,
            ),
            0,
        )
    return b_sum


@triton.jit
def _sum_table_of_classes(
    group,
    row,
    p_parts,
    chunks,
    G: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    NC: tl.constexpr,
    M: tl.constexpr,
    MT: tl.constexpr,
    TP: tl.constexpr,
    SPAN: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The same, of (chunks, G, classes, tiles * M, TP)."""
    o_c = tl.arange(0, SPAN)
    o_p = tl.arange(0, TERMS)
    b_sum = tl.zeros((SPAN,), p_parts.dtype.element_ty)
    for part in range(0, chunks * NC * MT * M, TERMS):
        at = part + o_p
        m = at % (MT * M)
        cls = at // (MT * M) % NC
        chunk = (at // (MT * M * NC)).to(tl.int64)
        y, x, m_m, top, left = class_positions(cls, m, H, W, K)
        i = row - (K - 1) + y - top
        j = o_c[None, :] - (K - 1) + (x - left)[:, None]
        m_p = m_m & (chunk < chunks) & (i >= 0) & (i < K)
        o_part = ((chunk * G + group) * NC + cls) * MT * M + m
        b_sum += tl.sum(
            tl.load(
                p_parts + (o_part * TP + i * K)[:, None] + j,
                mask=m_p[:, None] & (j >= 0) & (j < K),
                other=0.0,
            ),
            0,
        )
    return b_sum


@triton.jit
def _sum_size(
    pid,
    p_dbias,
    p_db,
    p_dtable,
    p_parts,
    batch,
    height,
    across,
    chunks,
    terms,
    bias_programs: tl.constexpr,
    FORMS: tl.constexpr,
    HALF: tl.constexpr,
    SPAN: tl.constexpr,
    TERMS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Gradients of the bias and the table of a kernel size."""
    G: tl.constexpr = FORMS[HALF][0]
    K: tl.constexpr = FORMS[HALF][3]
    NC: tl.constexpr = FORMS[HALF][4]
    if pid < bias_programs:
        if NC > 0:
            stride = FORMS[HALF][7]
        else:
            stride = K * K
        _sum_rows(pid, p_dbias, p_db, terms, K * K, stride, TERMS, SUMS)
    else:
        row = (pid - bias_programs) % (2 * K - 1)
        group = (pid - bias_programs) // (2 * K - 1)
        if NC > 0:
            b_sum = _sum_table_of_classes(
                group,
                row,
                p_parts,
                chunks,
                G,
                FORMS[HALF][1],
                FORMS[HALF][2],
                K,
                NC,
                FORMS[HALF][5],
                FORMS[HALF][6],
                FORMS[HALF][7],
                SPAN,
                TERMS,
            )
        else:
            b_sum = _sum_table_of_windows(
                group, row, p_parts, batch, height, across, G, K, SPAN, TERMS
            )
        o_c = tl.arange(0, SPAN)
        tl.store(
            p_dtable + (group * (2 * K - 1) + row) * (2 * K - 1) + o_c,
            b_sum.to(p_dtable.dtype.element_ty),
            mask=o_c < 2 * K - 1,
        )


@triton.jit
def finish(
    p_dkey,
    p_dkey_parts,
    p_dw,
    p_dw_parts,
    p_dbias,
    p_db0,
    p_db1,
    p_dtable0,
    p_dtable1,
    p_parts0,
    p_parts1,
    dkey_strides,
    rows,
    blocks,
    batch,
    height,
    across,
    chunks0,
    chunks1,
    terms0,
    terms1,
    key_programs,
    S: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    TAPS: tl.constexpr,
    FORMS: tl.constexpr,
    SPAN0: tl.constexpr,
    SPAN1: tl.constexpr,
    E: tl.constexpr,
    TERMS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Add up the parts of all gradients that come in parts.

    Grid: (blocks of E of dkey + blocks of SUMS of dweight + for each size,
    blocks of SUMS of dbias and rows of dtable, ).
    """
    K0: tl.constexpr = FORMS[0][3]
    K1: tl.constexpr = FORMS[1][3]
    WEIGHTS: tl.constexpr = (TAPS * S + SUMS - 1) // SUMS
    BIASES0: tl.constexpr = (K0 * K0 + SUMS - 1) // SUMS
    BIASES1: tl.constexpr = (K1 * K1 + SUMS - 1) // SUMS
    SIZE0: tl.constexpr = BIASES0 + FORMS[0][0] * (2 * K0 - 1)
    pid = tl.program_id(0)
    if pid < key_programs:
        _sum_key(
            pid,
            p_dkey,
            p_dkey_parts,
            rows,
            dkey_strides,
            TILES,
            S,
            SX,
            CHANNELS,
            E,
        )
    elif pid < key_programs + WEIGHTS:
        _sum_rows(
            pid - key_programs,
            p_dw,
            p_dw_parts,
            blocks,
            TAPS * S,
            TAPS * S,
            TERMS,
            SUMS,
        )
    elif pid < key_programs + WEIGHTS + SIZE0:
        _sum_size(
            pid - key_programs - WEIGHTS,
            p_dbias,
            p_db0,
            p_dtable0,
            p_parts0,
            batch,
            height,
            across,
            chunks0,
            terms0,
            BIASES0,
            FORMS,
            0,
            SPAN0,
            TERMS,
            SUMS,
        )
    else:
        _sum_size(
            pid - key_programs - WEIGHTS - SIZE0,
            p_dbias + K0 * K0,
            p_db1,
            p_dtable1,
            p_parts1,
            batch,
            height,
            across,
            chunks1,
            terms1,
            BIASES1,
            FORMS,
            1,
            SPAN1,
            TERMS,
            SUMS,
        )
