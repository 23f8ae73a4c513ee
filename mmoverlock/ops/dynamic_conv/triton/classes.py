"""ContMix where a map has few windows, by classes of positions.

The window of a position starts at ``clamp(y - K // 2, 0, H - K)``, so a map
has (H - K + 1)(W - K + 1) windows: 14 x 14 with K = 13 has four, each of 49
positions, and 7 x 7 with K = 7 has one. The positions that share a window are
a *class*. Inside of it ContMix is attention: taps are keys, no window has to
be gathered, and the biases of taps are a dense matrix, which is the same for
all images (``dense``, see filters.py)::

    s[m, n] = q[m] . f[n] + dense[m, n]        m: position, n: tap
    p = 2^(s - lse)
    out[m] = sum over n of p[m, n] v[n]

Classes are cut into tiles of M positions, row by row.
A program goes through some images: where positions and taps are is the same
in all of them. Images are the fastest index of programs, so that ``dense``
stays in the cache.

Shapes: q (B, G * CQ, H, W), v and out (B, 2 * G * CV, H, W) by strides;
filters f (B, G, PLANES, TAPS, CQ); dense (G, classes * tiles * M, TP), TP the
taps of this size in whole tiles, and the same by pixels, (G, classes * tiles,
PT, M); lse (B, G, classes * tiles * M), inf where no position is.

FORMS go on with H, W, NC classes of MT tiles of M positions, T taps that are
rows, PT pixels in tiles of PIXELS, N taps of a step, STAGES.
"""

import triton
import triton.language as tl

from .common import dot, exp2, log2, map_offset, pixel_offsets, power

# Sizes of tiles, at most; a warp has 16 rows.
KNOBS = dict(
    POSITIONS=64,
    TAPS=64,  # a step of the forward pass and of the gradient of the query
    ROWS=64,  # taps that are rows
    PIXELS=64,  # pixels that are rows
    PROGRAMS=800,  # at least, for the gradient of the filters
    STAGES=1,
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    POSITIONS=(16, 32, 64),
    TAPS=(32, 64),
    ROWS=(32, 64),
    PIXELS=(16, 32, 64),
    PROGRAMS=(400, 800, 1600),
    STAGES=(1, 2, 3),
)
MOST_CLASSES = 4  # more have too few positions each for whole tiles


def count_classes(height: int, width: int, size: int) -> int:
    """The number of windows of a size."""
    return (height - size + 1) * (width - size + 1)


def tile_classes(height: int, width: int, size: int) -> dict:
    """Constants of the tiling of a map."""

    def most(
        length: int,
    ) -> int:  # positions along an axis that share a window
        return size if length == size else size // 2 + 1

    positions = most(height) * most(width)
    m = min(power(positions), KNOBS['POSITIONS'])
    rows = min(power(size**2), KNOBS['ROWS'])
    pixels = min(power(height * width), KNOBS['PIXELS'])
    taps = triton.cdiv(size**2, rows) * rows
    return dict(
        K=size,
        TP=taps,
        NT=size,
        SPAN=power(2 * size - 1),
        H=height,
        W=width,
        NC=count_classes(height, width, size),
        MT=triton.cdiv(positions, m),
        M=m,
        T=rows,
        PT=triton.cdiv(height * width, pixels) * pixels,
        PIXELS=pixels,
        N=min(KNOBS['TAPS'], taps),
        STAGES=KNOBS['STAGES'],
    )


@triton.jit
def class_positions(
    cls, o_m, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr
):
    """Positions of a class, and the corner of its window.

    Returns:
        tuple: y, x, which of them are real, top, left. Those that are not
        are at the first one.
    """
    NX: tl.constexpr = W - K + 1
    SIDE: tl.constexpr = K // 2 + 1 if NX > 1 else W
    top = cls // NX
    left = cls % NX
    y0 = tl.where(top == 0, 0, top + K // 2)
    y1 = tl.where(top == H - K, H, top + K // 2 + 1)
    x0 = tl.where(left == 0, 0, left + K // 2)
    x1 = tl.where(left == W - K, W, left + K // 2 + 1)
    y = y0 + o_m // SIDE
    x = x0 + o_m % SIDE
    real = (y < y1) & (x < x1)
    return tl.where(real, y, y0), tl.where(real, x, x0), real, top, left


@triton.jit
def _load(p_x, o_x, m_c, MASKED: tl.constexpr):
    """Load channels, which are fewer than those of a block if MASKED."""
    if MASKED:
        return tl.load(p_x + o_x, mask=m_c, other=0.0)
    else:
        return tl.load(p_x + o_x)


@triton.jit
def _class_program(pid, chunks, NC: tl.constexpr, MT: tl.constexpr):
    """(images, tile of the class, class, group) of a program."""
    rest = pid // chunks
    return pid % chunks, rest % MT, rest // MT % NC, rest // (MT * NC)


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
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """out = softmax(q f + dense) v, and lse to the base 2.

    Programs: groups * classes * tiles * chunks of images.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    QC: tl.constexpr = MIX[3]
    VC: tl.constexpr = MIX[4]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    TP: tl.constexpr = FORMS[HALF][3]
    NC: tl.constexpr = FORMS[HALF][8]
    MT: tl.constexpr = FORMS[HALF][9]
    M: tl.constexpr = FORMS[HALF][10]
    N: tl.constexpr = FORMS[HALF][14]
    VT: tl.constexpr = p_v.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    chunks = tl.cdiv(batch, images)
    chunk, mt, cls, group = _class_program(pid, chunks, NC, MT)
    o_m = mt * M + tl.arange(0, M)
    y, x, m_m, top, left = class_positions(
        cls, o_m, FORMS[HALF][6], FORMS[HALF][7], K
    )
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_q = o_q < CQ
    m_v = o_v < CV
    channel = (HALF * G + group) * CV
    p_dense += ((group * NC + cls) * MT * M + o_m)[:, None] * TP
    o_lse = cls * MT * M + o_m
    for image in tl.range(
        chunk * images, tl.minimum((chunk + 1) * images, batch), num_stages=1
    ):
        unit = (image * G + group).to(tl.int64)
        p_image = p_q + map_offset(image, group * CQ, q_strides)
        b_q = _load(
            p_image, pixel_offsets(y, x, o_q, q_strides), m_q[None, :], CQ < QC
        )
        p_unit = p_f + (unit * PLANES * TAPS + FORMS[HALF][1]) * CQ
        p_image = p_v + map_offset(image, channel, v_strides)
        b_m = tl.full((M,), float('-inf'), ACC)
        b_l = tl.zeros((M,), ACC)
        b_acc = tl.zeros((M, VC), ACC)
        for n0 in tl.range(0, K * K, N, num_stages=FORMS[HALF][15]):
            # Taps beyond the last one have the weight 0.
            n = tl.minimum(n0 + o_n, K * K - 1)
            b_s = tl.load(p_dense + (n0 + o_n)[None, :])  # (M, N)
            o_f = o_q[:, None] + (n * CQ)[None, :]
            for plane in tl.static_range(PLANES):
                b_f = _load(
                    p_unit + plane * TAPS * CQ, o_f, m_q[:, None], CQ < QC
                )  # (QC, N)
                b_s = dot(b_q, b_f, b_s)
            b_v = _load(
                p_image,
                pixel_offsets(top + n // K, left + n % K, o_v, v_strides),
                m_v[None, :],
                CV < VC,
            )  # (N, VC)
            m_i = tl.maximum(b_m, tl.max(b_s, 1))
            alpha = exp2(b_m - m_i)
            b_p = exp2(b_s - m_i[:, None])
            b_l = b_l * alpha + tl.sum(b_p, 1)
            b_m = m_i
            b_acc = dot(b_p.to(VT), b_v, b_acc * alpha[:, None])

        p_image = p_out + map_offset(image, channel, out_strides)
        tl.store(
            p_image + pixel_offsets(y, x, o_v, out_strides),
            (b_acc * (1 / b_l)[:, None]).to(VT),
            mask=m_m[:, None] & m_v[None, :],
        )
        b_lse = tl.where(m_m, b_m + log2(b_l), float('inf'))
        tl.store(p_lse + unit * NC * MT * M + o_lse, b_lse)


@triton.jit
def backward_query(
    pid,
    p_q,
    p_f,
    p_dense,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_dq,
    q_strides,
    v_strides,
    out_strides,
    do_strides,
    batch,
    images,
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """dq / ln 2 = (p (do v^T - delta)) f^T, with delta = do . out.

    Programs: groups * classes * tiles * chunks of images.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    QC: tl.constexpr = MIX[3]
    VC: tl.constexpr = MIX[4]
    TAPS: tl.constexpr = MIX[5]
    K: tl.constexpr = FORMS[HALF][2]
    TP: tl.constexpr = FORMS[HALF][3]
    H: tl.constexpr = FORMS[HALF][6]
    W: tl.constexpr = FORMS[HALF][7]
    NC: tl.constexpr = FORMS[HALF][8]
    MT: tl.constexpr = FORMS[HALF][9]
    M: tl.constexpr = FORMS[HALF][10]
    N: tl.constexpr = FORMS[HALF][14]
    FT: tl.constexpr = p_f.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    chunks = tl.cdiv(batch, images)
    chunk, mt, cls, group = _class_program(pid, chunks, NC, MT)
    o_m = mt * M + tl.arange(0, M)
    y, x, m_m, top, left = class_positions(cls, o_m, H, W, K)
    o_n = tl.arange(0, N)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_q = o_q < CQ
    m_v = o_v < CV
    m_do = m_m[:, None] & m_v[None, :]
    m_dq = m_m[:, None] & m_q[None, :]
    channel = (HALF * G + group) * CV
    p_dense += ((group * NC + cls) * MT * M + o_m)[:, None] * TP
    o_lse = cls * MT * M + o_m
    o_dq = ((y * W + x) * G * CQ)[:, None] + o_q[None, :]
    # No constant, so that the loop stays one: registers are few.
    stop = tl.minimum(K * K, batch * K * K)
    for image in tl.range(
        chunk * images, tl.minimum((chunk + 1) * images, batch), num_stages=1
    ):
        unit = (image * G + group).to(tl.int64)
        b_q = _load(
            p_q + map_offset(image, group * CQ, q_strides),
            pixel_offsets(y, x, o_q, q_strides),
            m_q[None, :],
            CQ < QC,
        )
        p_image = p_do + map_offset(image, channel, do_strides)
        b_do = tl.load(
            p_image + pixel_offsets(y, x, o_v, do_strides),
            mask=m_do,
            other=0.0,
        )
        p_image = p_out + map_offset(image, channel, out_strides)
        b_out = tl.load(
            p_image + pixel_offsets(y, x, o_v, out_strides),
            mask=m_do,
            other=0.0,
        )
        b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
        b_lse = tl.load(p_lse + unit * NC * MT * M + o_lse)
        p_unit = p_f + (unit * MIX[6] * TAPS + FORMS[HALF][1]) * CQ
        p_image = p_v + map_offset(image, channel, v_strides)
        b_dq = tl.zeros((M, QC), ACC)
        for n0 in tl.range(0, stop, N, num_stages=FORMS[HALF][15]):
            n = tl.minimum(n0 + o_n, K * K - 1)
            b_s = tl.load(p_dense + (n0 + o_n)[None, :])  # (M, N)
            o_f = o_q[:, None] + (n * CQ)[None, :]
            b_f = _load(p_unit, o_f, m_q[:, None], CQ < QC)  # (QC, N)
            b_s = dot(b_q, b_f, b_s)
            if MIX[6] == 2:
                p_low = p_unit + TAPS * CQ
                b_low = _load(p_low, o_f, m_q[:, None], CQ < QC)
                b_s = dot(b_q, b_low, b_s)
            b_v = _load(
                p_image,
                pixel_offsets(top + n // K, left + n % K, o_v, v_strides),
                m_v[None, :],
                CV < VC,
            )  # (N, VC)
            b_p = exp2(b_s - b_lse[:, None])
            b_dp = dot(b_do, tl.trans(b_v), tl.zeros((M, N), ACC))
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = dot(b_ds.to(FT), tl.trans(b_f), b_dq)

        p_image = p_dq + (tl.cast(image, tl.int64) * H * W * G + group) * CQ
        tl.store(p_image + o_dq, b_dq, mask=m_dq)


@triton.jit
def backward_filters(
    pid,
    p_q,
    p_f,
    p_dense,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_df,
    p_ddense,
    p_db,
    q_strides,
    v_strides,
    out_strides,
    do_strides,
    batch,
    images,
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
):
    """df = ds^T q, and sums of ds: one over images, one over positions too.

    A program goes through ``images`` images. Writes df (classes * tiles, B,
    G, K^2, CQ), ddense (chunks of images, G, classes * tiles, M, TP) and
    db (chunks, G, classes * tiles, TP). Programs: chunks * tiles of taps *
    classes * tiles * groups.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    QC: tl.constexpr = MIX[3]
    VC: tl.constexpr = MIX[4]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    TP: tl.constexpr = FORMS[HALF][3]
    NC: tl.constexpr = FORMS[HALF][8]
    MT: tl.constexpr = FORMS[HALF][9]
    M: tl.constexpr = FORMS[HALF][10]
    T: tl.constexpr = FORMS[HALF][11]
    FT: tl.constexpr = p_f.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    chunks = tl.cdiv(batch, images)
    chunk = pid % chunks
    n0 = pid // chunks % (TP // T) * T
    rest = pid // chunks // (TP // T)
    tile = rest % (NC * MT)
    group = rest // (NC * MT)
    o_m = tile % MT * M + tl.arange(0, M)
    y, x, m_m, top, left = class_positions(
        tile // MT, o_m, FORMS[HALF][6], FORMS[HALF][7], K
    )
    o_n = n0 + tl.arange(0, T)
    n = tl.minimum(o_n, K * K - 1)
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_q = o_q < CQ
    m_v = o_v < CV

    o_lse = tile * M + tl.arange(0, M)
    channel = (HALF * G + group) * CV
    m_do = m_m[:, None] & m_v[None, :]
    p_dense += (group * NC * MT + tile) * M * TP
    o_dense = (tl.arange(0, M) * TP)[None, :] + o_n[:, None]  # (T, M)
    b_dd = tl.zeros((T, M), ACC)
    for image in tl.range(
        chunk * images,
        tl.minimum((chunk + 1) * images, batch),
        num_stages=FORMS[HALF][15],
    ):
        b_q = _load(
            p_q + map_offset(image, group * CQ, q_strides),
            pixel_offsets(y, x, o_q, q_strides),
            m_q[None, :],
            CQ < QC,
        )
        b_do = tl.load(
            p_do
            + map_offset(image, channel, do_strides)
            + pixel_offsets(y, x, o_v, do_strides),
            mask=m_do,
            other=0.0,
        )
        b_out = tl.load(
            p_out
            + map_offset(image, channel, out_strides)
            + pixel_offsets(y, x, o_v, out_strides),
            mask=m_do,
            other=0.0,
        )
        b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
        unit = (image * G + group).to(tl.int64)
        b_lse = tl.load(p_lse + unit * NC * MT * M + o_lse)
        b_s = tl.load(p_dense + o_dense)
        p_unit = p_f + (unit * PLANES * TAPS + FORMS[HALF][1]) * CQ
        o_f = (n * CQ)[:, None] + o_q[None, :]
        for plane in tl.static_range(PLANES):
            b_f = _load(
                p_unit + plane * TAPS * CQ, o_f, m_q[None, :], CQ < QC
            )  # (T, QC)
            b_s = dot(b_f, tl.trans(b_q), b_s)
        b_v = _load(
            p_v + map_offset(image, channel, v_strides),
            pixel_offsets(top + n // K, left + n % K, o_v, v_strides),
            m_v[None, :],
            CV < VC,
        )  # (T, VC)
        b_p = exp2(b_s - b_lse[None, :])
        b_dp = dot(b_v, tl.trans(b_do), tl.zeros((T, M), ACC))
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dd += b_ds
        b_df = dot(b_ds.to(FT), b_q, tl.zeros((T, QC), ACC))
        tl.store(
            p_df
            + (tile * batch * G + unit) * K * K * CQ
            + (o_n * CQ)[:, None]
            + o_q[None, :],
            b_df,
            mask=(o_n < K * K)[:, None] & m_q[None, :],
        )
    at = (chunk * G + group) * NC * MT + tile
    tl.store(p_ddense + at * M * TP + o_dense, b_dd)
    tl.store(p_db + at * TP + o_n, tl.sum(b_dd, 1))


@triton.jit
def backward_value(
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
    MIX: tl.constexpr,
    HALF: tl.constexpr,
    FORMS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """dv = sum over classes of p^T do, for a tile of pixels.

    Programs: groups * tiles of pixels * chunks of images.
    """
    G: tl.constexpr = MIX[0]
    CQ: tl.constexpr = MIX[1]
    CV: tl.constexpr = MIX[2]
    QC: tl.constexpr = MIX[3]
    VC: tl.constexpr = MIX[4]
    TAPS: tl.constexpr = MIX[5]
    PLANES: tl.constexpr = MIX[6]
    K: tl.constexpr = FORMS[HALF][2]
    H: tl.constexpr = FORMS[HALF][6]
    W: tl.constexpr = FORMS[HALF][7]
    NC: tl.constexpr = FORMS[HALF][8]
    MT: tl.constexpr = FORMS[HALF][9]
    M: tl.constexpr = FORMS[HALF][10]
    PT: tl.constexpr = FORMS[HALF][12]
    T: tl.constexpr = FORMS[HALF][13]
    VT: tl.constexpr = p_do.dtype.element_ty
    ACC: tl.constexpr = p_lse.dtype.element_ty
    TILES: tl.constexpr = PT // T
    chunks = tl.cdiv(batch, images)
    chunk = pid % chunks
    tile = pid // chunks % TILES
    group = pid // chunks // TILES
    pixel = tile * T + tl.arange(0, T)
    row = pixel // W
    col = pixel % W
    o_q = tl.arange(0, QC)
    o_v = tl.arange(0, VC)
    m_q = o_q < CQ
    m_v = o_v < CV
    m_dv = (pixel < H * W)[:, None] & m_v[None, :]
    channel = (HALF * G + group) * CV
    # Those by pixels are behind the others.
    p_dense += (G * FORMS[HALF][3] + group * PT) * NC * MT * M
    p_dense += (pixel * M)[:, None] + tl.arange(0, M)[None, :]
    stop = tl.minimum(NC * MT, batch * NC * MT)  # no constant, as above
    for image in tl.range(
        chunk * images, tl.minimum((chunk + 1) * images, batch), num_stages=1
    ):
        unit = (image * G + group).to(tl.int64)
        p_queries = p_q + map_offset(image, group * CQ, q_strides)
        p_grads = p_do + map_offset(image, channel, do_strides)
        p_unit = p_f + (unit * PLANES * TAPS + FORMS[HALF][1]) * CQ
        b_dv = tl.zeros((T, VC), ACC)
        for at in tl.range(stop, num_stages=FORMS[HALF][15]):
            o_m = at % MT * M + tl.arange(0, M)
            y, x, m_m, top, left = class_positions(at // MT, o_m, H, W, K)
            i = row - top
            j = col - left
            # Pixels outside of the window have the weight 0.
            n = tl.minimum(tl.maximum(i * K + j, 0), K * K - 1)
            b_q = _load(
                p_queries,
                pixel_offsets(y, x, o_q, q_strides),
                m_q[None, :],
                CQ < QC,
            )
            b_do = tl.load(
                p_grads + pixel_offsets(y, x, o_v, do_strides),
                mask=m_m[:, None] & m_v[None, :],
                other=0.0,
            )
            o_lse = (unit * NC * MT + at) * M + tl.arange(0, M)
            b_lse = tl.load(p_lse + o_lse)
            b_s = tl.load(p_dense + at * PT * M)  # (T, M)
            o_f = (n * CQ)[:, None] + o_q[None, :]
            for plane in tl.static_range(PLANES):
                b_f = _load(
                    p_unit + plane * TAPS * CQ, o_f, m_q[None, :], CQ < QC
                )  # (T, QC)
                b_s = dot(b_f, tl.trans(b_q), b_s)
            b_p = exp2(b_s - b_lse[None, :])
            b_dv = dot(b_p.to(VT), b_do, b_dv)

        p_image = p_dv + map_offset(image, channel, dv_strides)
        o_dv = pixel_offsets(row, col, o_v, dv_strides)
        if ADDS:
            b_dv += tl.load(p_image + o_dv, mask=m_dv)
        tl.store(p_image + o_dv, b_dv.to(VT), mask=m_dv)
