"""Products of the channels of every pixel with a matrix, for GPUs.

Maps are (B, H * W, C) in memory (channels_last). What comes before or behind
a product and would be a pass over a map by itself is done where values are
loaded or stored: a scale per image and channel, GELU, sums over an image.
Tiles of pixels do not cross images where something is of an image.

These products are bound by memory in the network's first two stages: every
map is read or written once.
"""

from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..activations import gelu, gelu_slope
from ..common import cdiv, next_power_of_2
from ..grn.triton import store_scales
from ..launching import jit, odd

# Tiles: pixels, outputs, inputs; warps and stages of loads.
KNOBS = dict(
    product=dict(pixels=64, outputs=128, inputs=64, num_warps=4, num_stages=3),
    weight_grad=dict(
        pixels=64, outputs=128, inputs=64, num_warps=4, num_stages=3
    ),
    programs=264,  # of gradients of weights, where there is enough to do
)
# In place of these, since others do not fit: for fp32 the registers and 99 KB
# of shared memory; with GELU of x, 16 bytes are spilled on 8.0
WIDE = dict(outputs=64, inputs=32, num_stages=2)
ACTIVE = dict(inputs=32)
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
} | dict(programs=(132, 264, 528))
SIZES = ('pixels', 'count')
INTERPRET = triton.knobs.runtime.interpret
PRECISION = tl.constexpr('tf32x3')  # of products of fp32


@triton.jit
def _load_map(
    p_map,
    p_scale,
    p_shift,
    p_keep,
    image,
    o_pixel,
    pixels,
    o_channel,
    channels,
    step,
    GELU: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A block (PIXELS, C) of ``(x * scale[image] + shift) * keep[image]``.

    Without a scale, it is x or its GELU. Pixels are ``step`` apart in memory.

    Pixels behind the last one are zero before the shift; nothing counts them.
    """
    m_channel = o_channel < channels
    m_map = (o_pixel < pixels)[:, None] & m_channel[None]
    o_map = (image * pixels + o_pixel)[:, None] * step + o_channel[None]
    b_map = tl.load(p_map + o_map, mask=m_map, other=0)
    if p_scale is not None:
        b_scale = tl.load(
            p_scale + image * channels + o_channel, mask=m_channel, other=0
        )
        b_wide = b_map.to(tl.float32) * b_scale[None]
        if p_shift is not None:
            b_shift = tl.load(p_shift + o_channel, mask=m_channel, other=0)
            b_wide += b_shift[None]
        if p_keep is not None:
            b_wide *= tl.load(p_keep + image)
        b_map = b_wide.to(p_map.dtype.element_ty)
    if GELU:
        b_map = gelu(b_map.to(tl.float32)).to(p_map.dtype.element_ty)
    return b_map.to(FACTOR)


@jit(do_not_specialize=SIZES)
def _product_kernel(
    p_x,
    p_squares,
    p_gamma,
    p_norm,
    p_scale,
    p_shift,
    p_weight,
    p_bias,
    p_keep,
    p_identity,
    p_gain,
    p_offset,
    p_input,
    p_out,
    p_factor,
    p_sums,
    p_shares,
    pixels,
    count,
    inputs,
    outputs,
    s_output,
    s_input,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GELU: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``y[n] = (weight (x[n] scale[image] + shift) + bias) keep[image]``.

    ``out[n] = y[n] + identity[n] gain + offset``, y where there is no
    identity; and if there is the input of a GELU, times the slope of that. x
    (B, H W, inputs), scale (B, inputs), shift (inputs, ), keep (B, ),
    identity, input and out (B, H W, outputs), bias, gain and offset (outputs,
    ), weight (outputs, inputs) with strides; grid (B count, blocks of
    outputs). With a factor (B, H W, outputs), which GRN scaled, gamma
    (outputs, ) and norm (B, 2, outputs), also sums (B, count, 2, outputs) of
    the gradients of gamma and beta over the pixels of a tile, and shares (B,
    count blocks of outputs) of the sum over outputs of gamma times the first.

    With squares (B, PARTS, inputs), every program makes GRN's scale of its
    image by itself, of these and gamma (inputs, ), and stores it, the same
    bits as others do, to load it where it is needed; the first one stores norm
    (B, 2, inputs).
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if UPCAST else DTYPE
    image = (tl.program_id(0) // count).to(tl.int64)
    tile = tl.program_id(0) % count
    o_pixel = tile * PIXELS + tl.arange(0, PIXELS)
    o_out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    m_out = o_out < outputs
    if p_squares is not None:
        store_scales(
            p_squares,
            p_gamma,
            p_norm,
            p_scale,
            image,
            (tile == 0) & (tl.program_id(1) == 0),
            PARTS,
            inputs,
            False,
            1,
            CHANNELS,
        )
        tl.debug_barrier()  # of the threads of a program
    acc = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        o_in = first + tl.arange(0, INPUTS)
        b_x = _load_map(
            p_x,
            p_scale,
            p_shift,
            None,
            image,
            o_pixel,
            pixels,
            o_in,
            inputs,
            inputs,
            GELU,
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
    if p_keep is not None:
        acc *= tl.load(p_keep + image)
    if p_identity is not None:
        b_identity = tiles.load(p_identity, o_map, m_map)
        if p_gain is not None:
            b_identity *= tiles.load(p_gain, o_out, m_out)[None]
        if p_offset is not None:
            b_identity += tiles.load(p_offset, o_out, m_out)[None]
        acc += b_identity
    if p_input is not None:
        acc *= gelu_slope(tiles.load(p_input, o_map, m_map))
    b_out = acc.to(p_out.dtype.element_ty)
    tl.store(p_out + o_map, b_out, mask=m_map)
    if p_factor is not None:
        b_factor = tl.load(p_factor + o_map, mask=m_map, other=0)
        b_wide = tl.where(m_map, b_out.to(tl.float32), 0.0)
        p_sum = p_sums + tl.program_id(0).to(tl.int64) * 2 * outputs + o_out
        b_sum = tl.sum(b_wide * b_factor.to(tl.float32), 0)
        p_ratio = p_norm + image * 2 * outputs + o_out
        b_sum *= tl.load(p_ratio, mask=m_out, other=0)
        tl.store(p_sum, b_sum, mask=m_out)
        p_share = p_shares + tl.program_id(0) * tl.num_programs(1)
        b_share = b_sum * tiles.load(p_gamma, o_out, m_out)
        # Of two dimensions, or Triton 3.7 fails on capability 10.0
        b_share = tl.sum(b_share[None], 1)
        tl.store(p_share + tl.program_id(1) + tl.arange(0, 1), b_share)
        tl.store(p_sum + outputs, tl.sum(b_wide, 0), mask=m_out)


@triton.jit
def _weight_grad(
    p_grad,
    p_x,
    p_scale,
    p_shift,
    p_keep,
    p_parts,
    p_bias_parts,
    split,
    splits,
    block_out,
    block_in,
    pixels,
    count,
    items,
    inputs,
    outputs,
    step,
    GELU: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of part ``split`` of :func:`_weight_grads_kernel`."""
    FACTOR: tl.constexpr = tl.float32 if UPCAST else p_x.dtype.element_ty
    o_out = block_out * OUTPUTS + tl.arange(0, OUTPUTS)
    o_in = block_in * INPUTS + tl.arange(0, INPUTS)
    acc = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for item in range(split, items, splits):
        image = tl.cast(item // count, tl.int64)
        o_pixel = item % count * PIXELS + tl.arange(0, PIXELS)
        b_grad = _load_map(
            p_grad,
            None,
            None,
            None,
            image,
            o_pixel,
            pixels,
            o_out,
            outputs,
            outputs,
            False,
            FACTOR,
        )
        b_x = _load_map(
            p_x,
            p_scale,
            p_shift,
            p_keep,
            image,
            o_pixel,
            pixels,
            o_in,
            inputs,
            step,
            GELU,
            FACTOR,
        )
        acc = tl.dot(tl.trans(b_grad), b_x, acc=acc, input_precision=PRECISION)
        if block_in == 0:
            b_total = tl.sum(b_grad.to(tl.float32), 0)
            if p_keep is not None:
                b_total *= tl.load(p_keep + image)
            total += b_total
    o_part = tl.cast(split, tl.int64) * outputs + o_out
    m_out = o_out < outputs
    tl.store(
        p_parts + o_part[:, None] * inputs + o_in[None],
        acc,
        mask=m_out[:, None] & (o_in < inputs)[None],
    )
    if block_in == 0:
        tl.store(p_bias_parts + o_part, total, mask=m_out)


@jit
def _weight_grads_kernel(
    grads,
    maps,
    scales,
    shifts,
    keeps,
    parts,
    bias_parts,
    odd_images,
    odd_pixels,
    odd_splits,
    inputs,
    outputs,
    steps,
    GELU: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Parts of the gradients of the weights and biases of some products.

    ``parts[o, i] = sum over n of g[n, o] (x[n, i] scale[image, i] + shift[i])
    ``, ``bias_parts[o] = sum over n of g[n, o]``, ``g = grad keep[image]``.

    Of each, grad (B, H W, outputs), x (B, H W, inputs), whose pixels are
    ``step`` apart, parts (splits, outputs, inputs) and (splits, outputs);
    without a scale, B is 1, and x may be GELU of a map. Grid (splits of all,
    times blocks of outputs and of inputs, ). Odd numbers 2 N + 1 keep Triton
    from compiling for kinds of them.
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(grads)):
        pixels = odd_pixels[i] // 2
        splits = odd_splits[i] // 2
        blocks = tl.cdiv(inputs[i], INPUTS)
        programs = splits * tl.cdiv(outputs[i], OUTPUTS) * blocks
        if (program >= 0) & (program < programs):
            count = tl.cdiv(pixels, PIXELS)
            _weight_grad(
                grads[i],
                maps[i],
                scales[i],
                shifts[i],
                keeps[i],
                parts[i],
                bias_parts[i],
                program % splits,
                splits,
                program // splits // blocks,
                program // splits % blocks,
                pixels,
                count,
                odd_images[i] // 2 * count,
                inputs[i],
                outputs[i],
                steps[i],
                GELU[i],
                PIXELS,
                OUTPUTS,
                INPUTS,
                UPCAST,
            )
        program -= programs


def _upcast(x: Tensor) -> bool:
    # The interpreter computes nonsense from products of bf16.
    return INTERPRET and x.dtype == torch.bfloat16


def _knobs(kernel: str, x: Tensor) -> dict[str, int]:
    return KNOBS[kernel] | (WIDE if x.element_size() == 4 else {})


def _blocks(knobs: dict) -> dict[str, int]:
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
    factor: tuple[Tensor, Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    identity: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    gelu_input: Tensor | None = None,
    response: tuple[Tensor, Tensor, Tensor] | None = None,
    gelu: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """A product of the channels of every pixel, and what is around it.

    ``(weight (x * scale + shift) + bias) * keep + identity * gain + offset``;
    what is None is left out.

    Args:
        x (Tensor): (B, I, H, W) in channels_last.
        weight (Tensor): (O, I, 1, 1), or (I, O, 1, 1) if it is transposed.
        bias (Tensor, optional): (O, ).
        scale (Tensor, optional): (B, I), float32.
        shift (Tensor, optional): (I, ), where there is a scale.
        transposed (bool): Whether the weight is that of the product whose
            gradient this is. Defaults to False.
        factor (tuple[Tensor, Tensor, Tensor], optional): What GRN scaled,
            (B, O, H, W) in channels_last, gamma (O values) and norms (B, 2,
            O).
        keep (Tensor, optional): (B, ), float32.
        identity (Tensor, optional): (B, O, H, W) in channels_last, whose
            dtype is that of the result. Defaults to None: that of x is.
        gain, offset (Tensor, optional): O values each, contiguous.
        gelu_input (Tensor, optional): (B, O, H, W) in channels_last; the
            result is its gradient, that of its GELU is the product.
        response (tuple[Tensor, Tensor, Tensor], optional): Squares (B, parts,
            I), of few parts, gamma (I values) and norms (B, 2, I), of GRN: the
            scale and the norms are made of the first two, and written.
        gelu (bool): Whether the product is that of GELU of x, which has no
            scale then. Defaults to False.

    Returns:
        tuple[Tensor, tuple[Tensor | None, Tensor | None]]: The result, (B, O,
        H, W) in channels_last. With a factor, the result is the gradient of
        what GRN made: parts (B, tiles, 2 * O) of those of gamma and beta, and
        (B, parts) of the sum over O of gamma times its gradient.
    """
    knobs = _knobs('product', x) | (ACTIVE if gelu else {})
    batch, inputs, height, width = x.shape
    outputs = weight.shape[1 if transposed else 0]
    strides = (1, outputs) if transposed else (inputs, 1)
    dtype = x.dtype if identity is None else identity.dtype
    out = x.new_empty(batch, height, width, outputs, dtype=dtype)
    out = out.permute(0, 3, 1, 2)
    pixels, sums = height * width, (None, None)
    if scale is keep is factor is None:  # tiles may cross images
        batch, pixels = 1, batch * pixels
    count = cdiv(pixels, knobs['pixels'])
    blocks = cdiv(outputs, knobs['outputs'])
    squares, gamma, norm = response or (None, None, None)
    if factor is not None:
        factor, gamma, norm = factor
        sums = tuple(
            norm.new_empty(batch, *shape)
            for shape in ((count, 2 * outputs), (count * blocks,))
        )
    if out.numel():
        grid = batch * count, blocks
        _product_kernel[grid](
            x,
            squares,
            gamma,
            norm,
            scale,
            shift,
            weight,
            bias,
            keep,
            identity,
            gain,
            offset,
            gelu_input,
            out,
            factor,
            *sums,
            pixels,
            count,
            inputs,
            outputs,
            *strides,
            PARTS=0 if squares is None else squares.shape[1],
            CHANNELS=0 if squares is None else next_power_of_2(inputs),
            GELU=gelu,
            UPCAST=_upcast(x),
            **_blocks(knobs),
        )
    return out, sums


class WeightGrad(NamedTuple):
    """Operands of the gradients of a weight and a bias of :func:`product`."""

    outs: Sequence[Tensor]  # that take them; the bias may be missing
    grad: Tensor  # of the result, (N, O), contiguous
    x: Tensor  # (N, I), whose values are next to each other
    scale: Tensor | None = None
    shift: Tensor | None = None  # this one and keep only where a scale is
    keep: Tensor | None = None
    gelu: bool = False


def weight_grads(*products: WeightGrad) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the weights and the biases of some products, in one launch.

    Returns:
        list[tuple[Tensor, Tensor]]: For :func:`partial_sums.add`, whose parts
        are (parts, 1, O * I) and (parts, 1, O).
    """
    outs, grads, maps, scales, shifts, keeps, gelus = zip(
        *products, strict=True
    )
    knobs = _knobs('weight_grad', maps[0])
    outputs, inputs = ([t.shape[1] for t in ts] for ts in (grads, maps))
    blocks = [
        cdiv(o, knobs['outputs']) * cdiv(i, knobs['inputs'])
        for o, i in zip(outputs, inputs, strict=True)
    ]
    images = [1 if scale is None else len(scale) for scale in scales]
    pixels = [len(x) // n for x, n in zip(maps, images, strict=True)]
    items = [
        n * cdiv(size, knobs['pixels'])
        for n, size in zip(images, pixels, strict=True)
    ]
    splits = _splits(items, blocks)
    parts = [
        [
            grad.new_empty(count, 1, size, dtype=torch.float32)
            for size in (o * i, o)
        ]
        for grad, count, o, i in zip(
            grads, splits, outputs, inputs, strict=True
        )
    ]
    grid = sum(map(mul, splits, blocks))
    _weight_grads_kernel[(grid,)](
        grads,
        maps,
        scales,
        shifts,
        keeps,
        tuple(part for part, _ in parts),
        tuple(part for _, part in parts),
        odd(images),
        odd(pixels),
        odd(splits),
        tuple(inputs),
        tuple(outputs),
        tuple(x.stride(0) for x in maps),
        GELU=gelus,
        UPCAST=_upcast(maps[0]),
        **_blocks(knobs),
    )
    return [
        job
        for pair in zip(parts, outs, strict=True)
        for job in zip(*pair, strict=False)
    ]


def _splits(items: list[int], blocks: list[int]) -> list[int]:
    """Parts of each product, for programs that all run at a time.

    Args:
        items (list[int]): Tiles of pixels of each.
        blocks (list[int]): Programs of a part of each.
    """
    programs = KNOBS['programs']
    length = cdiv(sum(map(mul, items, blocks)), programs)  # of a program
    while True:
        splits = [cdiv(n, length) for n in items]
        if sum(map(mul, splits, blocks)) <= max(programs, sum(blocks)):
            return splits
        length += cdiv(length, 16)
