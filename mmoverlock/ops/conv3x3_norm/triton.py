"""The convolution and the norm: a kernel forward, and one backward pass.

A program has all channels of some strips. It convolves them, then it reads
the result again, its last row first: that is what a GPU's cache still has. So
some 6 bytes a value move forward in bfloat16, where two launches move 8. It
is two where more than a quarter of the lanes would have no channel.

Backward, the norm's gradient of y is added to the one that comes from
elsewhere while it is made, and one launch adds the partial sums of all four
gradients.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import partial_sums, tiles
from ..common import (
    cdiv,
    channels_last,
    contiguous,
    custom_op,
    next_power_of_2,
    saved_tensors,
)
from ..conv3x3 import triton as conv
from ..launching import jit
from ..layernorm import triton as norm

KNOBS = dict(
    channels=1024,  # of a program, at most
    share=0.75,  # of lanes with a channel, at least: all take their time
)


@jit(do_not_specialize=conv.SIZES)
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_scale,
    p_shift,
    p_y,
    p_z,
    channels,
    height,
    width,
    rows,
    strips,
    eps,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``y = conv(x)`` and ``z = norm(y) scale + shift``.

    As the convolution's kernel, whose y this is; LANES[1] are all channels.
    z (B, H, W, C), scale and shift (C, ); grid (blocks of LANES[0] of all
    strips, ).
    """
    conv._forward_kernel(
        p_x,
        p_weight,
        p_bias,
        p_y,
        None,
        channels,
        height,
        width,
        rows,
        strips,
        False,
        RESIDUAL,
        False,
        COLUMNS,
        LANES,
        1,
    )
    tl.debug_barrier()  # Other threads have stored what this one reads.
    WIDE: tl.constexpr = triton.next_power_of_2(COLUMNS)
    lane = tl.arange(0, LANES[0] * WIDE)[:, None]
    strip = tl.program_id(0) * LANES[0] + lane // WIDE
    image, row, col = conv._strip(strip, height, width, rows, COLUMNS)
    o_channel = tl.arange(0, LANES[1])[None]
    m_channel = o_channel < channels
    m_lane = (strip < strips) & (lane % WIDE < COLUMNS)
    m_lane = m_lane & (col + lane % WIDE < width) & m_channel
    b_scale = tiles.load(p_scale, o_channel, m_channel)
    b_shift = tiles.load(p_shift, o_channel, m_channel)
    line = tl.cast(width, tl.int64) * channels
    row += rows - 1
    o_y = (image * height + row) * width + col + lane % WIDE
    o_y = o_y.to(tl.int64) * channels + o_channel
    coming = tl.load(p_y + o_y, mask=m_lane & (row < height), other=0)
    for i in range(rows):
        b_y = coming.to(tl.float32)
        m_y = m_lane & (row - i < height)
        p_row = p_z + o_y
        o_y -= line
        m_next = m_lane & (row - i <= height) & (i + 1 < rows)
        coming = tl.load(p_y + o_y, mask=m_next, other=0)
        b_y, _ = norm.normalize(b_y, m_channel, channels, eps)
        b_z = tl.fma(b_y, b_scale, b_shift).to(p_z.dtype.element_ty)
        tl.store(p_row, b_z, mask=m_y)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """One launch, or two; arguments as of :func:`conv_norm`.

    Args:
        x (Tensor): (B, C, H, W), in channels_last, not empty.
        weight, bias, scale, shift (Tensor): Contiguous.
    """
    batch, channels, height, width = x.shape
    block = next_power_of_2(channels)
    # Without loads of 16 bytes, it spills.
    too_wide = block > KNOBS['channels']
    if too_wide or channels < KNOBS['share'] * block or channels % 16:
        y, _ = conv.forward(x, weight, bias, residual=residual)
        return y, norm.forward(y, scale, shift, eps)
    y, z = torch.empty_like(x), torch.empty_like(x)
    form = conv.KNOBS['forward'].of_channels(block)
    slots = partial_sums.programs(x.device, form.resident)
    lanes, rows, strips, *_ = conv.plan(tuple(x.shape), form, slots, block)
    _forward_kernel[(cdiv(batch * strips, lanes[0]),)](
        x,
        weight,
        bias,
        scale,
        shift,
        y,
        z,
        channels,
        height,
        width,
        rows,
        batch * strips,
        eps,
        RESIDUAL=residual,
        COLUMNS=form.columns,
        LANES=lanes,
        num_warps=form.warps,
        maxnreg=form.registers,
    )
    return y, z


@custom_op('mmoverlock::conv_norm')
def _conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    partial_sums.check_device(x)
    x = channels_last(x)
    if not x.numel():
        return torch.empty_like(x), torch.empty_like(x)
    parameters = contiguous(weight, bias, scale, shift)
    return forward(x, *parameters, eps, residual)


@_conv_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    return torch.empty_like(x), torch.empty_like(x)


@custom_op('mmoverlock::conv_norm_backward', differentiable=False)
def _conv_norm_backward(
    grad_y: Tensor | None,
    grad_z: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> list[Tensor]:
    """Gradients of x, weight, bias if there is one, scale and shift."""
    x = channels_last(x)
    parameters = [t for t in (weight, bias, scale, shift) if t is not None]
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters)]
    grads = [torch.empty_like(t) for t in parameters]
    grad_bias = None if bias is None else grads[1]
    if grad_y is not None:
        grad_y = channels_last(grad_y)
    grad, norm_parts = norm.backward(
        channels_last(grad_z), y, scale.contiguous(), eps, grad_y
    )
    grad_x, parts = conv.backward(
        grad, x, weight.contiguous(), residual=residual
    )
    partial_sums.add((parts, grads[0], grad_bias), (norm_parts, *grads[-2:]))
    return [grad_x, *grads]


@_conv_norm_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_z: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> list[Tensor]:
    tensors = channels_last(x), weight, bias, scale, shift
    return [torch.empty_like(t) for t in tensors if t is not None]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps, ctx.residual = inputs
    ctx.save_for_backward(tensors[0], output[0], *tensors[1:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_z is None:
        return (None,) * 7
    saved = saved_tensors(ctx)
    _, y, _, bias, *_ = saved
    if grad_z is None:
        grad_z = torch.zeros_like(y)
    grads = _conv_norm_backward(grad_y, grad_z, *saved, ctx.eps, ctx.residual)
    if bias is None:
        grads.insert(2, None)
    return *grads, None, None


_conv_norm.register_autograd(_differentiate, setup_context=_save)


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmoverlock.ops.conv_norm`."""
    x = channels_last(x)
    return _conv_norm(x, weight, bias, scale, shift, eps, residual)
