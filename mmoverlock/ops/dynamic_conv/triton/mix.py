"""The kernels that mix, with both kernel sizes, forward and backward.

What classes.py and windows.py have to do is independent: it is one launch.
"""

import triton.language as tl

from ...launching import jit
from . import classes, windows
from .common import SIZES

KNOBS = dict(
    WARPS=4,
    IMAGES=8,  # of a program, at most
    PROGRAMS=400,  # of a task, at least
    REGISTERS=168,  # at most, for three blocks a multiprocessor
)
CANDIDATES = dict(  # for benchmarks/gpu_tune.py
    WARPS=(2, 4, 8),
    IMAGES=(1, 2, 4, 8),
    PROGRAMS=(400, 800, 1600),
    REGISTERS=(128, 168, 255),
)
# Kinds of tasks, those of classes first
CLASSES = tl.constexpr(0)
WINDOWS = tl.constexpr(1)
CLASS_FILTERS = tl.constexpr(0)
CLASS_QUERY = tl.constexpr(1)
CLASS_VALUE = tl.constexpr(2)
POSITIONS = tl.constexpr(3)
PIXELS = tl.constexpr(4)


@jit(do_not_specialize=SIZES)
def forward(
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
    height,
    width,
    images,
    odds,
    TASKS: tl.constexpr,
    MIX: tl.constexpr,
    FORMS: tl.constexpr,
):
    """out = softmax(s) v, and lse to the base 2.

    Grid: (programs of all tasks, ). ``dense`` and ``lse`` are by size. Numbers
    of programs and images are odd, see ``launching.odd`` and ``common.steps``.
    """
    pid = tl.program_id(0)
    for t in tl.static_range(len(TASKS)):
        if (pid >= 0) & (pid < odds[t] // 2):
            if TASKS[t][0] == CLASSES:
                classes.forward(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_v,
                    p_out,
                    p_lse[TASKS[t][1]],
                    q_strides,
                    v_strides,
                    out_strides,
                    batch,
                    (images[TASKS[t][1]] + 1) // 2,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                )
            else:
                windows.forward(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_v,
                    p_out,
                    p_lse[TASKS[t][1]],
                    q_strides,
                    v_strides,
                    out_strides,
                    batch,
                    (images[TASKS[t][1]] + 1) // 2,
                    height,
                    width,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                )
        pid -= odds[t] // 2


@jit(do_not_specialize=SIZES)
def backward(
    p_q,
    p_f,
    p_dense,
    p_v,
    p_out,
    p_lse,
    p_do,
    p_dq,
    p_dv,
    p_df,
    p_db,
    p_dtable,
    q_strides,
    v_strides,
    out_strides,
    do_strides,
    dv_strides,
    batch,
    height,
    width,
    images,
    filter_images,
    odds,
    TASKS: tl.constexpr,
    MIX: tl.constexpr,
    FORMS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Gradients of the value, and those of the rest in parts.

    With ADDS, the former are added to what is there.
    dq / ln 2 is (2, B, H, W, G * CQ), a part of each size; those of filters,
    biases and tables are by size, too. Grid: as ``forward``.
    """
    pid = tl.program_id(0)
    for t in tl.static_range(len(TASKS)):
        o_part = tl.cast(TASKS[t][1], tl.int64) * batch * height * width
        p_part = p_dq + o_part * (MIX[0] * MIX[1])
        if (pid >= 0) & (pid < odds[t] // 2):
            if TASKS[t][0] == CLASS_FILTERS:
                classes.backward_filters(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_v,
                    p_out,
                    p_lse[TASKS[t][1]],
                    p_do,
                    p_df[TASKS[t][1]],
                    p_dtable[TASKS[t][1]],
                    p_db[TASKS[t][1]],
                    q_strides,
                    v_strides,
                    out_strides,
                    do_strides,
                    batch,
                    (filter_images[TASKS[t][1]] + 1) // 2,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                )
            elif TASKS[t][0] == CLASS_QUERY:
                classes.backward_query(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_v,
                    p_out,
                    p_lse[TASKS[t][1]],
                    p_do,
                    p_part,
                    q_strides,
                    v_strides,
                    out_strides,
                    do_strides,
                    batch,
                    (images[TASKS[t][1]] + 1) // 2,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                )
            elif TASKS[t][0] == CLASS_VALUE:
                classes.backward_value(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_lse[TASKS[t][1]],
                    p_do,
                    p_dv,
                    q_strides,
                    do_strides,
                    dv_strides,
                    batch,
                    (images[TASKS[t][1]] + 1) // 2,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                    ADDS,
                )
            elif TASKS[t][0] == POSITIONS:
                windows.backward_positions(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_v,
                    p_out,
                    p_lse[TASKS[t][1]],
                    p_do,
                    p_part,
                    p_df[TASKS[t][1]],
                    p_db[TASKS[t][1]],
                    p_dtable[TASKS[t][1]],
                    q_strides,
                    v_strides,
                    out_strides,
                    do_strides,
                    batch,
                    (images[TASKS[t][1]] + 1) // 2,
                    height,
                    width,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                )
            else:
                windows.backward_pixels(
                    pid,
                    p_q,
                    p_f,
                    p_dense[TASKS[t][1]],
                    p_lse[TASKS[t][1]],
                    p_do,
                    p_dv,
                    q_strides,
                    do_strides,
                    dv_strides,
                    batch,
                    (images[TASKS[t][1]] + 1) // 2,
                    height,
                    width,
                    MIX,
                    TASKS[t][1],
                    FORMS,
                    ADDS,
                )
        pid -= odds[t] // 2
