"""Products of the channels of every pixel with a matrix, for GPUs.

Maps are (B, H * W, C) in memory (channels_last). What comes before or behind
a product and would be a pass over a map by itself is done where values are
loaded or stored: a scale per image and channel, sums over an image. Tiles of
pixels do not cross images.

These products are bound by memory in the network's first two stages: every
map is read or written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv

# Tiles: pixels, outputs, inputs; warps and stages of loads.
KNOBS = dict(
    product=dict(pixels=64, outputs=128, inputs=64, num_warps=4, num_stages=3),
    weight_grad=dict(
        pixels=64, outputs=128, inputs=64, num_warps=4, num_stages=3
    ),
)
CANDIDATES = {  # for benchmarks/gpu_tune.py
    f'{kernel}.{name}': values
    for kernel in ('product', 'weight_grad')
    for name, values in dict(
        pixels=(32, 64, 128),
        outputs=(64, 128),
        inputs=(32, 64),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
    ).items()
}
PROGRAMS = 264  # of the gradient of a weight, where there is enough to do
SIZES = ('pixels', 'tiles', 'items', 'splits', 'count')
INTERPRET = triton.knobs.runtime.interpret
PRECISION = tl.constexpr('tf32x3')  # of products of fp32


@triton.jit
def _load_map(
    p_map,
    p_scale,
    p_shift,
    image,
    o_pixel,
    pixels,
    o_channel,
    channels,
    FACTOR: tl.constexpr,
):
    """A block (PIXELS, C) of a map, ``x * scale[image] + shift``.

    Pixels behind the last one are zero before the shift; nothing counts them.
    """
    m_channel = o_channel < channels
    m_map = (o_pixel < pixels)[:, None] & m_channel[None]
    o_map = (image * pixels + o_pixel)[:, None] * channels + o_channel[None]
    b_map = tl.load(p_map + o_map, mask=m_map, other=0)
    if p_scale is not None:
        b_scale = tl.load(
            p_scale + image * channels + o_channel, mask=m_channel, other=0
        )
        b_wide = b_map.to(tl.float32) * b_scale[None]
        if p_shift is not None:
            b_shift = tl.load(p_shift + o_channel, mask=m_channel, other=0)
            b_wide += b_shift[None]
        b_map = b_wide.to(p_map.dtype.element_ty)
    return b_map.to(FACTOR)


@triton.jit(do_not_specialize=SIZES)
def _product_kernel(
    p_x,
    p_scale,
    p_shift,
    p_weight,
    p_bias,
    p_out,
    p_factor,
    p_sums,
    pixels,
    tiles,
    inputs,
    outputs,
    s_output,
    s_input,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``out[n] = weight (x[n] scale[image] + shift) + bias``.

    x (B, H W, inputs), scale (B, inputs), shift (inputs, ), out (B, H W,
    outputs), weight (outputs, inputs) with strides; grid (B tiles, blocks of
    outputs). With a factor (B, H W, outputs), also what the gradient of a
    scale and a shift behind it is made of: sums (B, tiles, 2 outputs) over
    the pixels of a tile of ``out factor`` and ``out``.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if UPCAST else DTYPE
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o_pixel = tile * PIXELS + tl.arange(0, PIXELS)
    o_out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    m_out = o_out < outputs
    acc = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        o_in = first + tl.arange(0, INPUTS)
        b_x = _load_map(
            p_x,
            p_scale,
            p_shift,
            image,
            o_pixel,
            pixels,
            o_in,
            inputs,
            FACTOR,
        )
        b_weight = tl.load(
            p_weight + o_in[:, None] * s_input + o_out[None] * s_output,
            mask=(o_in < inputs)[:, None] & m_out[None],
            other=0,
        )
        acc = tl.dot(
            b_x,
            b_weight.to(DTYPE).to(FACTOR),
            acc=acc,
            input_precision=PRECISION,
        )
    if p_bias is not None:
        acc += tl.load(p_bias + o_out, mask=m_out, other=0)[None]
    m_map = (o_pixel < pixels)[:, None] & m_out[None]
    o_map = (image * pixels + o_pixel)[:, None] * outputs + o_out[None]
    b_out = acc.to(p_out.dtype.element_ty)
    tl.store(p_out + o_map, b_out, mask=m_map)
    if p_factor is not None:
        b_factor = tl.load(p_factor + o_map, mask=m_map, other=0)
        b_wide = tl.where(m_map, b_out.to(tl.float32), 0.0)
        p_sum = p_sums + tl.program_id(0).to(tl.int64) * 2 * outputs + o_out
        b_sum = tl.sum(b_wide * b_factor.to(tl.float32), 0)
        tl.store(p_sum, b_sum, mask=m_out)
        tl.store(p_sum + outputs, tl.sum(b_wide, 0), mask=m_out)


@triton.jit(do_not_specialize=SIZES)
def _weight_grad_kernel(
    p_grad,
    p_x,
    p_scale,
    p_shift,
    p_parts,
    pixels,
    tiles,
    items,
    inputs,
    outputs,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Parts of the gradients of a weight and a bias.

    ``parts[o, i] = sum over n of grad[n, o] (x[n, i] scale[image, i] +
    shift[i])``, and ``sum of grad[n, o]`` behind the last i.

    grad (B, H W, outputs), x (B, H W, inputs), parts (splits, outputs, inputs
    + 1); grid (splits, blocks of outputs, blocks of inputs).
    """
    FACTOR: tl.constexpr = tl.float32 if UPCAST else p_x.dtype.element_ty
    o_out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    o_in = tl.program_id(2) * INPUTS + tl.arange(0, INPUTS)
    acc = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        image = (item // tiles).to(tl.int64)
        o_pixel = item % tiles * PIXELS + tl.arange(0, PIXELS)
        b_grad = _load_map(
            p_grad, None, None, image, o_pixel, pixels, o_out, outputs, FACTOR
        )
        b_x = _load_map(
            p_x,
            p_scale,
            p_shift,
            image,
            o_pixel,
            pixels,
            o_in,
            inputs,
            FACTOR,
        )
        acc = tl.dot(tl.trans(b_grad), b_x, acc=acc, input_precision=PRECISION)
        if tl.program_id(2) == 0:
            total += tl.sum(b_grad.to(tl.float32), 0)
    width = inputs + 1
    o_part = tl.program_id(0).to(tl.int64) * outputs + o_out
    p_part = p_parts + o_part * width
    m_part = (o_out < outputs)[:, None] & (o_in < inputs)[None]
    tl.store(p_part[:, None] + o_in[None], acc, mask=m_part)
    if tl.program_id(2) == 0:
        tl.store(p_part + inputs, total, mask=o_out < outputs)


@triton.jit(do_not_specialize=SIZES)
def _finish_kernel(
    p_parts,
    p_weight,
    p_bias,
    splits,
    count,
    inputs,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Sum parts (splits, outputs, inputs + 1) to both gradients."""
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < count
    acc = tl.zeros((SPLITS, BLOCK), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        acc += tl.load(
            p_parts + split.to(tl.int64) * count + o_out[None],
            mask=(split < splits) & m_out[None],
            other=0,
        )
    b_sum = tl.sum(acc, 0)
    row = o_out // (inputs + 1)
    col = o_out % (inputs + 1)
    tl.store(
        p_weight + row * inputs + col,
        b_sum.to(p_weight.dtype.element_ty),
        mask=m_out & (col < inputs),
    )
    tl.store(
        p_bias + row,
        b_sum.to(p_bias.dtype.element_ty),
        mask=m_out & (col == inputs),
    )


def _upcast(x):
    # The interpreter computes nonsense from products of bf16.
    return INTERPRET and x.dtype == torch.bfloat16


def _tiles(x, knobs):
    return cdiv(x.shape[2:].numel(), knobs['pixels'])


def _blocks(knobs):
    knobs = dict(knobs)
    names = 'pixels', 'outputs', 'inputs'
    return {name.upper(): knobs.pop(name) for name in names} | knobs


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    transposed: bool = False,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``weight (x * scale + shift) + bias`` for the channels of every pixel.

    Args:
        x (Tensor): (B, I, H, W) in channels_last.
        weight (Tensor): (O, I, 1, 1), or (I, O, 1, 1) if it is transposed.
        bias (Tensor, optional): (O, ).
        scale (Tensor, optional): (B, I), float32.
        shift (Tensor, optional): (I, ), where there is a scale.
        transposed (bool): Whether the weight is that of the product whose
            gradient this is. Defaults to False.
        factor (Tensor, optional): (B, O, H, W) in channels_last.

    Returns:
        tuple[Tensor, Tensor | None]: The product, (B, O, H, W) in
        channels_last, and with a factor the parts (B, tiles, 2 * O) of the
        sums over an image of the product times the factor and by itself.
    """
    knobs = KNOBS['product']
    batch, inputs, height, width = x.shape
    outputs = weight.shape[1 if transposed else 0]
    strides = (1, outputs) if transposed else (inputs, 1)
    out = x.new_empty(batch, height, width, outputs).permute(0, 3, 1, 2)
    tiles = _tiles(x, knobs)
    sums = None
    if factor is not None:
        sums = x.new_empty(batch, tiles, 2 * outputs, dtype=torch.float32)
    if out.numel():
        grid = batch * tiles, cdiv(outputs, knobs['outputs'])
        with torch.cuda.device_of(x):
            _product_kernel[grid](
                x,
                scale,
                shift,
                weight,
                bias,
                out,
                factor,
                sums,
                height * width,
                tiles,
                inputs,
                outputs,
                *strides,
                UPCAST=_upcast(x),
                **_blocks(knobs),
            )
    return out, sums


def weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` and ``bias`` of :func:`product`."""
    knobs = KNOBS['weight_grad']
    inputs, outputs = x.shape[1], grad.shape[1]
    tiles = _tiles(x, knobs)
    items = len(x) * tiles
    blocks = (
        cdiv(outputs, knobs['outputs']),
        cdiv(inputs, knobs['inputs']),
    )
    splits = cdiv(PROGRAMS, blocks[0] * blocks[1])
    splits = max(1, min(items, splits))
    parts = x.new_empty(splits, outputs, inputs + 1, dtype=torch.float32)
    grad_weight = torch.empty_like(weight)
    grad_bias = torch.empty_like(bias)
    with torch.cuda.device_of(x):
        _weight_grad_kernel[(splits, *blocks)](
            grad,
            x,
            scale,
            shift,
            parts,
            x.shape[2:].numel(),
            tiles,
            items,
            inputs,
            outputs,
            UPCAST=_upcast(x),
            **_blocks(knobs),
        )
        count = outputs * (inputs + 1)
        _finish_kernel[(cdiv(count, 256),)](
            parts,
            grad_weight,
            grad_bias,
            splits,
            count,
            inputs,
            BLOCK=256,
            SPLITS=4,
        )
    return grad_weight, grad_bias
