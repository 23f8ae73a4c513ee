"""A Focus block as one node: the launches of its parts, and their gradients.

Maps are in channels_last, products are those of PyTorch. The gradient of what
ContMix, the branches and the gate read is handed on in this order, and each
adds to it; so it is with that of the map behind the first norm. All sums of
parts are made in the end, in one launch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from .. import partial_sums, tiles
from ..common import cdiv, channels_last, flatten, lengths, nest
from ..conv3x3 import triton as conv
from ..depthwise.triton import branches as large_conv
from ..dynamic_conv import triton as contmix
from ..excitation import triton as excitation
from ..ffn import triton as ffn
from ..grn import triton as response_norm
from ..launching import jit
from ..layernorm import triton as layer_norm
from ..pointwise import round_parameters, rows, to_map
from ..pointwise.triton import product, weight_grads
from ..prior import triton as prior
from ..residual import triton as residual
from . import FocusParameters

aten = torch.ops.aten
SIZES = 'count', 'height', 'width'


@jit(do_not_specialize=SIZES)
def _unpool_kernel(
    p_grad,
    p_out,
    count,
    height,
    width,
    step,
    channels,
    REGIONS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the gradient of means over regions, which may overlap.

    Region i of S an axis begins at floor(i H / S) and ends before ceil((i + 1)
    H / S). grad (B, REGIONS^2, C), out (count = B H W, C), whose rows are
    ``step`` apart; of the regions, DOWN and ACROSS at most meet in a row and
    in a column; grid (blocks of rows and of C, ).
    """
    tile, o_channel, m_channel = tiles.place(channels, BLOCK)
    row = tile * ROWS + tl.arange(0, ROWS)
    image = (row // (height * width)).to(tl.int64)
    y = row // width % height
    x = row % width
    m_out = (row < count)[:, None] & m_channel[None]
    o_out = row.to(tl.int64)[:, None] * step + o_channel[None]
    acc = tiles.load(p_out, o_out, m_out)
    for down in tl.static_range(DOWN):
        i = y * REGIONS // height + down
        rows = tl.cdiv((i + 1) * height, REGIONS) - i * height // REGIONS
        for across in tl.static_range(ACROSS):
            j = x * REGIONS // width + across
            columns = tl.cdiv((j + 1) * width, REGIONS) - j * width // REGIONS
            met = (i <= ((y + 1) * REGIONS - 1) // height) & (
                j <= ((x + 1) * REGIONS - 1) // width
            )
            region = (image * REGIONS + i) * REGIONS + j
            o_grad = region[:, None] * channels + o_channel[None]
            b_grad = tiles.load(p_grad, o_grad, m_out & met[:, None])
            acc += b_grad / (rows * columns)[:, None]
    tiles.store(p_out, o_out, acc, m_out)


def _unpool(grad, out):
    """Add the gradient of an adaptive average of a part of a map."""
    batch, channels, height, width = out.shape
    regions = grad.shape[2]
    block = tiles.form(channels)
    count = batch * height * width
    _unpool_kernel[(cdiv(count, block[0]) * cdiv(channels, block[1]),)](
        channels_last(grad),
        out,
        count,
        height,
        width,
        out.stride(3),
        channels,
        REGIONS=regions,
        DOWN=regions // height + 2,
        ACROSS=regions // width + 2,
        ROWS=block[0],
        BLOCK=block[1],
        num_warps=tiles.KNOBS['warps'],
    )


class _Settings(NamedTuple):
    scale: float
    eps: tuple[float, float]
    regions: int


class _Saved(NamedTuple):
    """Maps that are kept, and what else the backward pass needs."""

    z: Tensor
    initial: Tensor | None
    updated: Tensor
    identity: Tensor
    x: Tensor
    mix: tuple  # before the norm, before GELU, before the product, behind it
    response: tuple  # norm and scale
    fused: Tensor
    query: tuple  # before the norm, behind it
    key: tuple  # pooled, before the norm, behind it
    mixed: tuple  # the result, and what is with it
    value: Tensor
    branches: tuple  # statistics, taps, the first one's output
    branches_out: Tensor
    gate: Tensor
    norms: Tensor
    state: Tensor
    excited: Tensor
    projected: Tensor
    statistics: tuple  # of the four norms: means and reciprocal deviations
    middle: Tensor
    identity2: Tensor
    x2: Tensor
    ffn: tuple
    rounded: tuple


def _product(x, weight, bias=None):
    factors = rows(x), weight.flatten(1).mT
    if bias is None:
        return to_map(torch.mm(*factors), x)
    return to_map(torch.addmm(bias, *factors), x)


def _product_grad(grad, weight):
    return to_map(rows(grad) @ weight.flatten(1), grad)


def _norm(x, norm):
    """A batch norm in training mode; the map, mean and deviation."""
    scale, shift, mean, variance, _, momentum, eps = norm
    return torch.native_batch_norm(
        x, scale, shift, mean, variance, True, momentum, eps
    )


def _norm_grad(grad, x, norm, statistics):
    return aten.native_batch_norm_backward(
        channels_last(grad),
        x,
        norm.scale,
        None,
        None,
        *statistics,
        True,
        norm.eps,
        [True, True, True],
    )


def _forward(z, initial, p, keeps, settings):
    """The result, and what to keep."""
    updated = z
    if p.prior:
        updated = prior.forward(z, initial, *p.prior)
    weights = *p.mix, p.query, p.key, p.value, p.gate, p.out[0], *p.expand
    rounded = round_parameters(z.dtype, *weights, p.reduce[0])
    mix, mix_bias, query, key, value, gate, out, *hidden = rounded
    identity, _ = conv.forward(updated, *p.conv1)
    x = layer_norm.forward(identity, *p.norm1, settings.eps[0])

    neighbors, _ = conv.forward(x, *p.mix_conv, residual=False)
    normal, *mix_statistics = _norm(neighbors, p.mix_norm)
    active = F.gelu(normal)
    products = _product(active, mix, mix_bias)
    fused, *response = response_norm.forward(products, *p.response)

    features, guide = x.split([query.shape[1], key.shape[1]], 1)
    queries = _product(features, query)
    normal_queries, *query_statistics = _norm(queries, p.query_norm)
    pooled = F.adaptive_avg_pool2d(guide, settings.regions)
    pooled = channels_last(pooled)
    keys = _product(pooled, key)
    normal_keys, *key_statistics = _norm(keys, p.key_norm)
    mixed = contmix._mix.function(
        normal_queries, normal_keys, *p.kernels, fused, settings.scale
    )

    values = _product(mixed[0], value)
    gates = _product(fused, gate)
    fields = _fields(p.branches)
    running = large_conv._Running(*fields[3:6], fields[7])
    branches = large_conv._measure(
        fused, *fields[:3], fields[6], fields[8], running
    )
    branches_out = large_conv._forward(fused, branches)
    fields = _fields([p.value_norm, p.branches_norm, p.gate_norm])
    others = p.mix_norm, p.query_norm, p.key_norm, p.out_norm
    fields[4] += [norm.batches for norm in others]
    parts, norms = excitation.measure([values, branches_out, gates], *fields)
    excited, state = excitation.forward(
        values, *p.excite, gates, True, branches_out, (parts, norms)
    )
    projected, *out_statistics = _norm(excited, p.out_norm)
    gain, offset = p.scale1
    middle, _ = product(
        projected,
        out,
        p.out[1],
        keep=keeps[0],
        identity=identity,
        gain=gain,
        offset=offset,
    )

    identity2, _ = conv.forward(middle, *p.conv2)
    x2 = layer_norm.forward(identity2, *p.norm2, settings.eps[1])
    expand, expand_bias, reduce = hidden
    result, *kept = ffn.feed_forward.function(
        x2,
        expand,
        expand_bias,
        *p.conv3,
        *p.response2,
        reduce,
        p.reduce[1],
        identity2,
        *p.scale2,
        keeps[1],
        True,
    )
    saved = _Saved(
        z,
        initial,
        updated,
        identity,
        x,
        (neighbors, normal, active, products),
        response,
        fused,
        (queries, normal_queries),
        (pooled, keys, normal_keys),
        mixed,
        values,
        branches[:3],
        branches_out,
        gates,
        norms,
        state,
        excited,
        projected,
        (*mix_statistics, *query_statistics, *key_statistics, *out_statistics),
        middle,
        identity2,
        x2,
        kept[:4],
        rounded,
    )
    return result, saved


def _fields(tuples):
    """Lists of the fields of some tuples of one kind."""
    return [list(field) for field in zip(*tuples, strict=True)]


def _backward(grad, s, p, keeps, settings):
    """Gradients of z, of initial, and of the parameters, as those are."""
    mix, _, query, key, value, gate, out, expand, _, reduce = s.rounded
    jobs, products = [], []

    def empty(tensors, parts, *more):
        """Gradients that will be sums of parts."""
        grads = [torch.empty_like(tensor) for tensor in (*tensors, *more)]
        jobs.append((parts, *grads))
        return grads

    def differentiate(grad, x, *tensors):
        """Gradients that a launch for all products will make."""
        grads = [torch.empty_like(tensor) for tensor in tensors]
        products.append((rows(channels_last(grad)), rows(x), grads))
        return grads

    grads = {}
    hidden = *p.expand, *p.conv3, *p.response2, *p.reduce
    others = s.identity2, *p.scale2, keeps[1]
    grad, *results = ffn._feed_forward_backward.function(
        grad, s.x2, *s.ffn, expand, reduce, *hidden, *others, True
    )
    grad_identity, *grads['scale2'] = results[8:]
    names = 'expand', 'conv3', 'response2', 'reduce'
    for i, name in enumerate(names):
        grads[name] = results[2 * i : 2 * i + 2]
    grad, parts = layer_norm.backward(
        grad, s.identity2, p.norm2[0], settings.eps[1], grad_identity
    )
    grads['norm2'] = empty(p.norm2, parts)
    grad, parts = conv.backward(grad, s.middle, p.conv2[0])
    grads['conv2'] = empty(p.conv2, parts)
    grad_identity, grad_y, parts = residual.backward(
        grad, s.identity, s.projected.dtype, p.scale1[0], keeps[0]
    )
    grads['scale1'] = empty(p.scale1, parts)
    if grad_y is None:
        grad_y = grad.to(s.projected.dtype)

    grads['out'] = differentiate(grad_y, s.projected, *p.out)
    mix_statistics, query_statistics, key_statistics, out_statistics = (
        s.statistics[i : i + 2] for i in range(0, 8, 2)
    )
    grad, *grads['out_norm'] = _norm_grad(
        _product_grad(grad_y, out), s.excited, p.out_norm, out_statistics
    )
    results = excitation.backward(
        grad,
        s.value,
        *p.excite,
        s.gate,
        s.state,
        True,
        s.branches_out,
        s.norms,
    )
    grad_value, *grads['excite'], grad_gate, grad_branches, norms = results
    norms = norms.unbind()
    grads['value_norm'], grads['branches_norm'], grads['gate_norm'] = (
        norms[:2],
        norms[2:4],
        norms[4:],
    )
    grads['gate'] = differentiate(grad_gate, s.fused, p.gate)
    grads['value'] = differentiate(grad_value, s.mixed[0], p.value)
    grad_query, grad_key, *grads['kernels'], grad_fused = (
        contmix._mix_backward.function(
            _product_grad(grad_value, value),
            s.query[1],
            s.key[2],
            *p.kernels,
            s.fused,
            settings.scale,
            *s.mixed,
        )
    )
    fields = _fields(p.branches)
    statistics, taps, first = s.branches
    grad, norms, weights = large_conv._backward(
        grad_branches,
        s.fused,
        first,
        taps,
        statistics,
        *fields[:2],
        fields[6],
        fields[8],
        other=channels_last(grad_fused),
    )
    grads['branches'] = [*zip(weights, *norms, strict=True)]
    rows(grad).addmm_(rows(grad_gate), gate.flatten(1))
    grad, parts = response_norm.backward(
        grad, s.mix[3], p.response[0], *s.response
    )
    grads['response'] = empty(p.response, parts)

    neighbors, normal, active, _ = s.mix
    grads['mix'] = differentiate(grad, active, *p.mix)
    grad = aten.gelu_backward(_product_grad(grad, mix), normal)
    grad, *grads['mix_norm'] = _norm_grad(
        grad, neighbors, p.mix_norm, mix_statistics
    )
    grad, parts = conv.backward(grad, s.x, p.mix_conv[0], residual=False)
    grads['mix_conv'] = empty(p.mix_conv, parts)
    features = s.x[:, : query.shape[1]]
    grad_features, grad_guide = grad.split([query.shape[1], key.shape[1]], 1)
    grad_query, *grads['query_norm'] = _norm_grad(
        grad_query, s.query[0], p.query_norm, query_statistics
    )
    grads['query'] = differentiate(grad_query, features, p.query)
    rows(grad_features).addmm_(rows(grad_query), query.flatten(1))
    grad_key, *grads['key_norm'] = _norm_grad(
        grad_key, s.key[1], p.key_norm, key_statistics
    )
    grads['key'] = differentiate(grad_key, s.key[0], p.key)
    _unpool(_product_grad(grad_key, key), grad_guide)
    grad, parts = layer_norm.backward(
        grad, s.identity, p.norm1[0], settings.eps[0], grad_identity
    )
    grads['norm1'] = empty(p.norm1, parts)
    grad, parts = conv.backward(grad, s.updated, p.conv1[0])
    grads['conv1'] = empty(p.conv1, parts)
    grad_initial, grads['prior'] = None, []
    if p.prior:
        weight, _, initial_weight, _ = p.prior
        grad, grad_initial, parts = prior.backward(
            grad, s.z, s.initial, weight, initial_weight
        )
        # Both shifts have the same gradient, in memory of their own.
        grads['prior'] = [torch.empty_like(tensor) for tensor in p.prior]
        first, shift, second, initial_shift = grads['prior']
        jobs.append((parts, first, second, shift))
        jobs.append((parts, None, None, initial_shift))
    parts = weight_grads(*(operands for *operands, _ in products))
    for (*_, outs), sums in zip(products, parts, strict=True):
        jobs += zip(sums, outs, strict=False)
    partial_sums.add(*jobs)
    return grad, grad_initial, grads


def _leaves(p):
    """The tensors among the parameters that have gradients, by name."""
    leaves = []
    for value in p:
        if isinstance(value, Tensor):
            leaves.append(value)
        elif hasattr(value, 'running_mean'):
            leaves += value[:2]
        elif isinstance(value, list):
            leaves += [t for branch in value for t in branch[:3]]
        else:
            leaves += value
    return leaves


def _without_statistics(p):
    """The parameters without what other batches will change."""
    nothing = dict(running_mean=None, running_var=None, batches=None)

    def strip(value):
        if isinstance(value, list):
            return [*map(strip, value)]
        if hasattr(value, 'running_mean'):
            return value._replace(**nothing)
        return value

    return type(p)(*map(strip, p))


class _FocusBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, initial, p, keeps, settings, *leaves) -> Tensor:
        result, saved = _forward(z, initial, p, keeps, settings)
        ctx.settings = _without_statistics(p), keeps, settings
        ctx.lengths = lengths(saved)
        # The parameters, so that a change of them is noticed
        ctx.save_for_backward(*flatten(saved), *leaves)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad) -> tuple[Tensor | None, ...]:
        saved = _Saved(*nest(ctx.saved_tensors, ctx.lengths))
        p, keeps, settings = ctx.settings
        with partial_sums.together(), torch.cuda.device_of(grad):
            grad, grad_initial, grads = _backward(
                channels_last(grad), saved, p, keeps, settings
            )
        leaves = []
        for name in p._fields:
            value = grads[name]
            if isinstance(value, Tensor):
                leaves.append(value)
            elif name == 'branches':
                leaves += [t for branch in value for t in branch]
            else:
                leaves += value
        return grad, grad_initial, None, None, None, *leaves


def focus_block(
    z: Tensor,
    initial: Tensor | None,
    parameters: FocusParameters,
    keeps: Sequence[Tensor | None],
    scale: float,
    eps: tuple[float, float],
    regions: int,
) -> Tensor:
    """See :func:`mmoverlock.ops.focus.focus_block`."""
    partial_sums.check_device(z)
    z = channels_last(z)
    if initial is not None:
        initial = channels_last(initial)
    settings = _Settings(scale, eps, regions)
    leaves = _leaves(parameters)
    if not all(leaf.is_contiguous() for leaf in leaves):
        parameters = tree_map_only(Tensor, Tensor.contiguous, parameters)
        leaves = _leaves(parameters)
    return _FocusBlock.apply(z, initial, parameters, keeps, settings, *leaves)
