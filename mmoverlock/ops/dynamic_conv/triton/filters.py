"""Filters that ContMix makes of key and weights, and their gradients.

``prepare`` runs once a forward pass, ``finish`` at the end of the backward
pass; what it leaves of the gradients of weights and biases, in parts, joins
other sums of parts (partial_sums.py). Sums are made in a fixed order, without
atomic operations.

Filters are ``scale key^T weight^T / ln 2``, (B, G, PLANES, TAPS, CQ), TAPS
the taps of both kernel sizes. They have the dtype of the query; where that
has 16 bits, a second plane has what rounding to the first one lost.
"""

import triton
import triton.language as tl

from ...launching import jit
from .classes import class_positions
from .common import (
    LN2,
    LOG2E,
    SIZES,
    dot,
    map_offset,
    pixel_offsets,
    window_start,
)

KNOBS = dict(
    ROWS=128,  # channels of a tile of filters
    TAPS=32,  # of a tile
    KEYS=32,  # channels of a tile of gradients of keys
    PARTS=4,  # loaded at a time
    PROGRAMS=128,  # at least, for gradients of keys
    ELEMENTS=4096,  # of maps and tables, made by a program
    TERMS=128,  # rows of a table's parts, at a time
    WARPS=8,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    ROWS=(32, 64, 128),
    TAPS=(16, 32, 64),
    KEYS=(16, 32, 64),
    PARTS=(2, 4, 8),
    PROGRAMS=(64, 128, 256),
    ELEMENTS=(1024, 2048, 4096),
    TERMS=(64, 128, 256),
    WARPS=(4, 8),
)
# Kinds of tasks, of prepare and of finish
FILTERS = tl.constexpr(0)
DENSE_TAPS = tl.constexpr(1)
DENSE_PIXELS = tl.constexpr(2)
DENSE_ROWS = tl.constexpr(3)
CONTRACT = tl.constexpr(0)
QUERY = tl.constexpr(1)
TABLE_OF_CLASSES = tl.constexpr(2)
TABLE_OF_WINDOWS = tl.constexpr(3)


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
    """Rows (R, SP) of the key as a (B * channels, S) matrix.

    Returns:
        tuple: The rows, their offsets and which elements there are.
    """
    o_s = tl.arange(0, SP)
    image = (o_row // CHANNELS).to(tl.int64)
    channel = o_row % CHANNELS
    o_row = image * key_strides[0] + channel * key_strides[1]
    o_col = o_s // SX * key_strides[2] + o_s % SX * key_strides[3]
    at = o_row[:, None] + o_col[None, :]
    m_key = (image * CHANNELS < rows)[:, None] & (o_s < S)[None, :]
    return tl.load(p_key + at, mask=m_key, other=0.0), at, m_key


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
    b_key, _, _ = _load_key(
        p_key, o_row, rows, key_strides, S, SP, SX, CHANNELS
    )
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
    G: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
    KIND: tl.constexpr,
    E: tl.constexpr,
):
    """Biases as logarithms to the base 2, see classes.py and windows.py.

    By classes, those by pixels are behind those by taps.
    """
    K: tl.constexpr = FORMS[HALF][2]
    TP: tl.constexpr = FORMS[HALF][3]
    at = pid * E + tl.arange(0, E)
    if KIND == DENSE_ROWS:
        i = at % TP // FORMS[HALF][4]
        j = at % FORMS[HALF][4]
        across = at // TP % K
        down = at // (TP * K) % K
        group = at // (TP * K * K)
    else:
        W: tl.constexpr = FORMS[HALF][7]
        MT: tl.constexpr = FORMS[HALF][9]
        M: tl.constexpr = FORMS[HALF][10]
        PT: tl.constexpr = FORMS[HALF][12]
        TILES: tl.constexpr = FORMS[HALF][8] * MT
        if KIND == DENSE_PIXELS:
            n = at // M % PT
            m = at % M
            tile = at // (M * PT)
        else:
            n = at % TP
            m = at // TP % M
            tile = at // (TP * M)
        group = tile // TILES
        m += tile % MT * M
        y, x, _, top, left = class_positions(
            tile % TILES // MT, m, FORMS[HALF][6], W, K
        )
        down = y - top
        across = x - left
        if KIND == DENSE_PIXELS:
            i = n // W - top
            j = n % W - left
            p_dense += G * TILES * M * TP
        else:
            i = n // K
            j = n % K
    inside = (i >= 0) & (i < K) & (j >= 0) & (j < K)
    m_at = group < G
    row = (group * (2 * K - 1) + i - down + K - 1) * (2 * K - 1)
    o_table = row + j - across + K - 1
    bias = tl.load(p_bias + i * K + j, mask=inside & m_at, other=0.0)
    table = tl.load(p_table + o_table, mask=inside & m_at, other=0.0)
    ACC: tl.constexpr = p_dense.dtype.element_ty
    b_dense = (bias.to(ACC) + table.to(ACC)) * LOG2E
    b_dense = tl.where(inside, b_dense, float('-inf'))
    tl.store(p_dense + at, b_dense, mask=m_at)


@jit
def prepare(
    p_key,
    p_weight,
    p_bias,
    p_table,
    p_f,
    p_dense,
    key_strides,
    rows,
    odds,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    TASKS: tl.constexpr,
    MIX: tl.constexpr,
    FORMS: tl.constexpr,
):
    """Filters, and dense biases of both sizes. Grid: see mix.py."""
    pid = tl.program_id(0)
    for t in tl.static_range(len(TASKS)):
        if (pid >= 0) & (pid < odds[t] // 2):
            if TASKS[t][0] == FILTERS:
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
                    MIX[1],
                    MIX[5],
                    MIX[6],
                    p_dense[0].dtype.element_ty,
                    R,
                    T,
                )
            else:
                _make_dense(
                    pid,
                    p_bias + FORMS[TASKS[t][1]][1],
                    p_table[TASKS[t][1]],
                    p_dense[TASKS[t][1]],
                    MIX[0],
                    TASKS[t][1],
                    FORMS,
                    TASKS[t][0],
                    E,
                )
        pid -= odds[t] // 2


@triton.jit
def _contract(
    block,
    p_df,
    parts,
    p_key,
    p_weight,
    p_dkey,
    p_dw,
    key_strides,
    dkey_strides,
    rows,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    CQ: tl.constexpr,
    TAPS: tl.constexpr,
    FORMS: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dkey = scale df weight of some rows, and their dweight."""
    ACC: tl.constexpr = p_dw.dtype.element_ty
    o_row = block * R + tl.arange(0, R)
    o_s = tl.arange(0, SP)
    m_row = o_row < rows
    m_s = o_s < S
    b_key, _, _ = _load_key(
        p_key, o_row, rows, key_strides, S, SP, SX, CHANNELS
    )
    b_key = b_key.to(ACC)
    b_dkey = tl.zeros((R, SP), ACC)
    p_dw += tl.cast(block, tl.int64) * TAPS * S
    first = block * R // CQ  # unit
    for half in tl.static_range(2):
        count = FORMS[half][2] * FORMS[half][2]
        count_parts = parts[half] // 2
        p_first = p_df[half] + tl.cast(first, tl.int64) * count * CQ
        step = tl.cast(rows, tl.int64) * count
        o_unit = (o_row // CQ - first) * (count * CQ) + o_row % CQ
        for n0 in range(0, count, T):
            n = n0 + tl.arange(0, T)
            m_n = n < count
            o_df = (n * CQ)[:, None] + o_unit[None, :]
            m_df = m_n[:, None] & m_row[None, :]
            b_df = tl.zeros((T, R), ACC)
            for part in range(0, count_parts, PARTS):
                for i in tl.static_range(PARTS):
                    b_df += tl.load(
                        p_first + (part + i) * step + o_df,
                        mask=m_df & (part + i < count_parts),
                        other=0.0,
                    )
            b_df *= SCALE
            o_w = ((FORMS[half][1] + n) * S)[:, None] + o_s[None, :]
            m_w = m_n[:, None] & m_s[None, :]
            b_w = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(ACC)
            b_dkey = dot(tl.trans(b_df), b_w, b_dkey)
            b_dw = dot(b_df, b_key, tl.zeros((T, SP), ACC))
            tl.store(p_dw + o_w, b_dw, mask=m_w)
    _, o_key, m_key = _load_key(
        p_dkey, o_row, rows, dkey_strides, S, SP, SX, CHANNELS
    )
    b_dkey = b_dkey.to(p_dkey.dtype.element_ty)
    tl.store(p_dkey + o_key, b_dkey, mask=m_key)


@triton.jit
def _sum_table_of_windows(
    group,
    row,
    p_parts,
    chunks,
    height,
    across,
    G: tl.constexpr,
    TERMS: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """A row of a table's gradient, of (H, across, K, chunks, G, 2K - 1)."""
    K: tl.constexpr = FORMS[HALF][2]
    SPAN: tl.constexpr = FORMS[HALF][5]
    o_c = tl.arange(0, SPAN)
    o_p = tl.arange(0, TERMS)
    b_sum = tl.zeros((SPAN,), p_parts.dtype.element_ty)
    for part in range(0, height * across * chunks, TERMS):
        at = part + o_p
        y = at // (across * chunks)
        i = row - (K - 1) + y - window_start(y, height, K)
        m_p = (y < height) & (i >= 0) & (i < K)
        o_part = (at // chunks).to(tl.int64) * K + i
        o_part = (o_part * chunks + at % chunks) * G + group
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
    TERMS: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """The same, of (chunks, G, classes, tiles * M, TP)."""
    K: tl.constexpr = FORMS[HALF][2]
    TP: tl.constexpr = FORMS[HALF][3]
    NC: tl.constexpr = FORMS[HALF][8]
    MT: tl.constexpr = FORMS[HALF][9]
    M: tl.constexpr = FORMS[HALF][10]
    SPAN: tl.constexpr = FORMS[HALF][5]
    o_c = tl.arange(0, SPAN)
    o_p = tl.arange(0, TERMS)
    b_sum = tl.zeros((SPAN,), p_parts.dtype.element_ty)
    step = G * TP * NC * MT * M
    for first in range(0, NC * MT * M, TERMS):
        at = first + o_p
        cls = at // (MT * M)
        y, x, m_m, top, left = class_positions(
            cls, at % (MT * M), FORMS[HALF][6], FORMS[HALF][7], K
        )
        i = row - (K - 1) + y - top
        j = o_c[None, :] - (K - 1) + (x - left)[:, None]
        m_p = m_m & (cls < NC) & (i >= 0) & (i < K)
        m_part = m_p[:, None] & (j >= 0) & (j < K)
        o_part = ((group * NC * MT * M + at) * TP + i * K)[:, None] + j
        b_part = tl.zeros((TERMS, SPAN), p_parts.dtype.element_ty)
        for chunk in range(chunks):
            p_chunk = p_parts + tl.cast(chunk, tl.int64) * step
            b_part += tl.load(p_chunk + o_part, mask=m_part, other=0.0)
        b_sum += tl.sum(b_part, 0)
    return b_sum


@triton.jit
def _sum_table(
    pid,
    p_parts,
    p_dtable,
    chunks,
    height,
    width,
    G: tl.constexpr,
    TERMS: tl.constexpr,
    OF_CLASSES: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """Gradient of a row of a table of biases, of the parts of positions."""
    K: tl.constexpr = FORMS[HALF][2]
    group = pid // (2 * K - 1)
    row = pid % (2 * K - 1)
    if OF_CLASSES:
        b_sum = _sum_table_of_classes(
            group, row, p_parts, chunks, G, TERMS, HALF, FORMS
        )
    else:
        across = tl.cdiv(width, FORMS[HALF][7])
        b_sum = _sum_table_of_windows(
            group, row, p_parts, chunks, height, across, G, TERMS, HALF, FORMS
        )
    o_c = tl.arange(0, FORMS[HALF][5])
    tl.store(
        p_dtable + pid * (2 * K - 1) + o_c,
        b_sum.to(p_dtable.dtype.element_ty),
        mask=o_c < 2 * K - 1,
    )


@triton.jit
def _add_query(
    pid,
    p_parts,
    p_dq,
    dq_strides,
    batch,
    height,
    width,
    E: tl.constexpr,
    MIX: tl.constexpr,
):
    """dq of the parts that both sizes make of it, (2, B, H, W, G * CQ)."""
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    QC: tl.constexpr = MIX[3]
    P: tl.constexpr = E // QC
    group = pid % G
    tiles = tl.cdiv(height * width, P)
    pixel = pid // G % tiles * P + tl.arange(0, P)
    image = (pid // G // tiles).to(tl.int64)
    o_q = tl.arange(0, QC)
    m_q = (pixel < height * width)[:, None] & (o_q < CQ)[None, :]
    p_parts += (image * height * width * G + group) * CQ
    p_parts += (pixel * (G * CQ))[:, None] + o_q[None, :]
    o_other = tl.cast(batch, tl.int64) * height * width * (G * CQ)
    b_dq = tl.load(p_parts, mask=m_q, other=0.0)
    b_dq += tl.load(p_parts + o_other, mask=m_q, other=0.0)
    p_dq += map_offset(image, group * CQ, dq_strides)
    p_dq += pixel_offsets(pixel // width, pixel % width, o_q, dq_strides)
    # The factor is in the filters.
    tl.store(p_dq, (b_dq * LN2).to(p_dq.dtype.element_ty), mask=m_q)


@jit(do_not_specialize=SIZES)
def finish(
    p_df,
    p_dq_parts,
    p_dtable_parts,
    p_key,
    p_weight,
    p_dkey,
    p_dw,
    p_dq,
    p_dtable,
    key_strides,
    dkey_strides,
    dq_strides,
    rows,
    batch,
    height,
    width,
    parts,
    chunks,
    odds,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SX: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    TERMS: tl.constexpr,
    TASKS: tl.constexpr,
    MIX: tl.constexpr,
    FORMS: tl.constexpr,
):
    """Gradients of query, key and tables; that of the weight in parts.

    df of a size is the sum of ``parts`` (parts, B, G, K^2, CQ). Writes dweight
    (blocks of R rows, TAPS, S). Grid: see mix.py; rows of tables are programs.
    """
    pid = tl.program_id(0)
    for t in tl.static_range(len(TASKS)):
        if (pid >= 0) & (pid < odds[t] // 2):
            if TASKS[t][0] == CONTRACT:
                _contract(
                    pid,
                    p_df,
                    parts,
                    p_key,
                    p_weight,
                    p_dkey,
                    p_dw,
                    key_strides,
                    dkey_strides,
                    rows,
                    SCALE,
                    S,
                    SP,
                    SX,
                    CHANNELS,
                    MIX[1],
                    MIX[5],
                    FORMS,
                    R,
                    T,
                    PARTS,
                )
            elif TASKS[t][0] == QUERY:
                _add_query(
                    pid,
                    p_dq_parts,
                    p_dq,
                    dq_strides,
                    batch,
                    height,
                    width,
                    E,
                    MIX,
                )
            else:
                _sum_table(
                    pid,
                    p_dtable_parts[TASKS[t][1]],
                    p_dtable[TASKS[t][1]],
                    chunks[TASKS[t][1]] // 2,
                    height,
                    width,
                    MIX[0],
                    TERMS,
                    TASKS[t][0] == TABLE_OF_CLASSES,
                    TASKS[t][1],
                    FORMS,
                )
        pid -= odds[t] // 2
