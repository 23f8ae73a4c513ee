"""A Focus block as one node: the launches of its parts, and their gradients.

Maps are in channels_last, products are those of PyTorch. The gradient of what
ContMix, the branches and the gate read is handed on in this order, and each
adds to it; so it is with that of the map behind the first norm. All sums of
parts are made in the end, in one launch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import partial_sums
from ...batch_norm import Norm
from ...batch_norm import triton as batch_norm
from ...common import channels_last
from ...conv3x3 import triton as conv
from ...conv3x3_norm import triton as conv_norm
from ...depthwise.triton import branches as large_conv
from ...depthwise.triton.conv2d import convolve_merged
from ...dynamic_conv import enlarged_size
from ...dynamic_conv import triton as contmix
from ...excitation import triton as excitation
from ...ffn import triton as ffn
from ...grn import triton as response_norm
from ...layernorm import triton as layer_norm
from ...pointwise import rows, to_map
from ...pointwise.triton import WeightGrad, product, weight_grads
from ...prior import triton as prior
from .. import FocusParameters
from .node import contiguous_fields, run_fused, run_node

aten = torch.ops.aten


class _Settings(NamedTuple):
    scale: float
    eps: tuple[float, float]
    regions: int
    size: Sequence[int] | None  # that maps are enlarged to for the kernels
    group: Any


class _Saved(NamedTuple):
    """Maps that are kept, and what else the backward pass needs."""

    z: Tensor
    initial: Tensor | None
    updated: Tensor
    identity: Tensor
    x: Tensor
    mix: tuple  # before the norm, before GELU, behind the product
    response: tuple  # norm and scale
    sources: tuple  # of queries and keys, of values; enlarged
    query: tuple  # before the norm, behind it
    key: tuple  # pooled, before the norm, behind it
    mixed: tuple  # the result, and what is with it
    pooled: Tensor  # the result, of the size of the map
    fused: Tensor
    value: Tensor
    branches: tuple  # statistics, taps, the first one's output
    branches_out: Tensor
    gate: Tensor
    norms: Tensor
    state: Tensor
    excited: Tensor
    projected: Tensor
    mix_norm: tuple  # what the four norms keep
    query_norm: tuple
    key_norm: tuple
    out_norm: tuple
    middle: Tensor
    identity2: Tensor
    x2: Tensor
    ffn: tuple
    rounded: tuple


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    factors = rows(x), weight.flatten(1).mT
    if bias is None:
        return to_map(torch.mm(*factors), x)
    return to_map(torch.addmm(bias, *factors), x)


def _product_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return to_map(rows(grad) @ weight.flatten(1), grad)


def _empty_pair(like: Tensor) -> Tensor:
    """Memory of two maps side by side, (2, B, C, H, W)."""
    batch, channels, height, width = like.shape
    pair = like.new_empty(2, batch, height, width, channels)
    return pair.permute(0, 1, 4, 2, 3)


def _products(
    pair: Tensor, weights: Tensor, transposed: bool = False
) -> Tensor:
    """Two maps side by side, each with a weight, or the transpose, of its."""
    weights = weights.flatten(2)
    maps = pair.permute(0, 1, 3, 4, 2)
    result = maps.flatten(1, 3) @ (weights if transposed else weights.mT)
    return result.view(*maps.shape[:-1], -1).permute(0, 1, 4, 2, 3)


def _norms(
    maps: Sequence[Tensor], norms: Sequence[Norm], group: Any
) -> list[tuple[Tensor, ...]]:
    """Batch norms in training mode: maps, and what their gradients need."""
    if group is not None:
        return batch_norm.forward(maps, norms, group)
    return [
        torch.native_batch_norm(
            x,
            norm.scale,
            norm.shift,
            norm.running_mean,
            norm.running_var,
            True,
            norm.momentum,
            norm.eps,
        )
        for x, norm in zip(maps, norms, strict=True)
    ]


def _norm_grads(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    norms: Sequence[Norm],
    kept: Sequence[tuple[Tensor, ...]],
    group: Any,
) -> list[tuple[Tensor, ...]]:
    """Gradients of the maps, each with those of scale and shift."""
    grads = [channels_last(grad) for grad in grads]
    if group is not None:
        facts = [fact for (fact,) in kept]
        return batch_norm.backward(grads, maps, facts, group)
    return [
        aten.native_batch_norm_backward(
            grad,
            x,
            norm.scale,
            None,
            None,
            *statistics,
            True,
            norm.eps,
            [True, True, True],
        )
        for grad, x, norm, statistics in zip(
            grads, maps, norms, kept, strict=True
        )
    ]


def _enlarge(x: Tensor, size: Sequence[int] | None) -> Tensor:
    """A map of another size, if there is one."""
    if size is None:
        return x
    return channels_last(F.interpolate(x, size, mode='bilinear').to(x.dtype))


def _reduce(x: Tensor, like: Tensor) -> Tensor:
    """A map of the size of another one, which may be its own."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return channels_last(F.adaptive_avg_pool2d(x, like.shape[2:]))


def _enlarge_grad(grad: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of a map from that of the enlarged one."""
    # Added up in single precision
    grad_x = aten.upsample_bilinear2d_backward(
        grad.float(), size, x.shape, False
    )
    return channels_last(grad_x.to(x.dtype))


def _forward(
    z: Tensor,
    initial: Tensor | None,
    p: FocusParameters,
    keeps: Sequence[Tensor | None],
    settings: _Settings,
) -> tuple[Tensor, _Saved]:
    """The result, and what to keep."""
    group = settings.group
    updated = z
    if p.prior:
        updated = prior.forward(z, initial, *p.prior)
    weights = *p.mix, *p.query, *p.key, p.out[0], *p.expand, p.reduce[0]
    taps, rounded = large_conv.pack(
        z.dtype, p.branches, weights, (*p.value, *p.gate)
    )
    mix, mix_bias, query, key, out, *hidden, value_and_gate = rounded
    eps1, eps2 = settings.eps
    identity, x = conv_norm.forward(updated, *p.conv1, *p.norm1, eps1)

    neighbors, _ = conv.forward(x, *p.mix_conv, residual=False)
    source = _enlarge(x, settings.size)
    features, guide = source.split([query.shape[1], key.shape[1]], 1)
    queries = _product(features, query)
    means = _pool(guide, settings.regions)
    keys = _product(means, key)
    side_by_side = _norms(
        (neighbors, queries, keys),
        (p.mix_norm, p.query_norm, p.key_norm),
        group,
    )
    normal, normal_queries, normal_keys = (y for y, *_ in side_by_side)
    products, _ = product(normal, mix, mix_bias, gelu=True)
    pair = _empty_pair(products)
    pooled, fused = pair
    _, *response = response_norm.forward(products, *p.response, fused)

    mixable = _enlarge(fused, settings.size)
    inputs = normal_queries, normal_keys, *p.kernels, mixable
    mixed = pooled if mixable is fused else torch.empty_like(mixable)
    mixed = mixed, *contmix.empty_facts(inputs)
    contmix.forward(inputs, settings.scale, mixed)
    if mixable is not fused:
        pooled.copy_(F.adaptive_avg_pool2d(mixed[0], fused.shape[2:]))

    values, gates = _products(pair, value_and_gate)
    branches_out, branches = large_conv.forward(fused, p.branches, taps, group)
    others = p.mix_norm, p.query_norm, p.key_norm, p.out_norm
    measured = batch_norm.measure(
        (values, branches_out, gates),
        (p.value_norm, p.branches_norm, p.gate_norm),
        group,
        # native_batch_norm does not count these
        [norm.batches for norm in others] if group is None else (),
    )
    excited, state = excitation.forward(
        values, *p.excite, gates, True, branches_out, measured
    )
    ((projected, *out_norm),) = _norms([excited], [p.out_norm], group)
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

    identity2, x2 = conv_norm.forward(middle, *p.conv2, *p.norm2, eps2)
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
        (neighbors, normal, products),
        response,
        (source, mixable),
        (queries, normal_queries),
        (means, keys, normal_keys),
        mixed,
        pooled,
        fused,
        values,
        branches,
        branches_out,
        gates,
        measured[1],
        state,
        excited,
        projected,
        *(tuple(kept) for _, *kept in side_by_side),
        tuple(out_norm),
        middle,
        identity2,
        x2,
        tuple(kept[:4]),
        tuple(rounded),
    )
    return result, saved


def _infer(
    z: Tensor,
    initial: Tensor | None,
    p: FocusParameters,
    settings: _Settings,
) -> Tensor:
    """The result where norms are parts of convolutions."""
    if p.prior:
        z = prior.forward(z, initial, *p.prior)
    weights = *p.mix, *p.query, *p.key, *p.gate, *p.expand
    weights += p.value[0], p.out[0], p.reduce[0]
    taps, rounded = large_conv.pack(z.dtype, p.branches, weights)
    *rounded, value, out, reduce = rounded
    pairs = zip(rounded[::2], rounded[1::2], strict=True)
    mix, query, key, gate, expand = pairs
    eps1, eps2 = settings.eps
    identity, x = conv_norm.forward(z, *p.conv1, *p.norm1, eps1, False)
    y, _ = conv.forward(x, *p.mix_conv, residual=False, activate=True)
    y = _product(y, *mix)
    fused, *_ = response_norm.forward(y, *p.response)
    source, mixable = (_enlarge(y, settings.size) for y in (x, fused))
    features, guide = source.split([query[0].shape[1], key[0].shape[1]], 1)
    means = _pool(guide, settings.regions)
    queries, keys = _product(features, *query), _product(means, *key)
    mixed, *_ = contmix._mix.function(
        queries, keys, *p.kernels, mixable, settings.scale
    )
    mixed = _reduce(mixed, fused)
    y = convolve_merged(fused, taps, p.branches)
    y, _ = product(mixed, value, p.value[1], identity=y)
    y, _ = excitation.forward(y, *p.excite, _product(fused, *gate), True)
    gain, offset = p.scale1
    z, _ = product(
        y, out, p.out[1], identity=identity, gain=gain, offset=offset
    )
    identity, x = conv_norm.forward(z, *p.conv2, *p.norm2, eps2, False)
    result, *_ = ffn.feed_forward.function(
        x,
        *expand,
        *p.conv3,
        *p.response2,
        reduce,
        p.reduce[1],
        identity,
        *p.scale2,
        None,
        False,
    )
    return result


def _pool(x: Tensor, regions: int) -> Tensor:
    """Means of regions of a map."""
    if len(x) < 16:  # a block an image in channels_last: 0.24 ms at 50 x 84
        x = x.contiguous()
    return channels_last(F.adaptive_avg_pool2d(x, regions))


def _backward(
    grad: Tensor,
    s: _Saved,
    p: FocusParameters,
    keeps: Sequence[Tensor | None],
    settings: _Settings,
) -> tuple[tuple[Tensor, Tensor | None], dict[str, list]]:
    """Gradients of the two maps; of the parameters, by field."""
    mix, _, query, key, out, *hidden, value_and_gate = s.rounded
    group = settings.group
    jobs, products = [], []

    def empty(tensors: Sequence[Tensor], parts: Tensor, *more) -> list[Tensor]:
        """Gradients that will be sums of parts."""
        grads = [torch.empty_like(tensor) for tensor in (*tensors, *more)]
        jobs.append((parts, *grads))
        return grads

    def differentiate(
        grad: Tensor, x: Tensor, *tensors, gelu: bool = False
    ) -> list[Tensor]:
        """Gradients that a launch for all products will make."""
        grads = [torch.empty_like(tensor) for tensor in tensors]
        operands = rows(channels_last(grad)), rows(x)
        products.append(WeightGrad(grads, *operands, gelu=gelu))
        return grads

    grads = {}
    expand, expand_bias, reduce = hidden
    parameters = *p.expand, *p.conv3, *p.response2, *p.reduce
    others = None, None, None, keeps[1]
    grad_y, *results = ffn._feed_forward_backward.function(
        grad,
        s.x2,
        *s.ffn,
        expand,
        reduce,
        expand_bias,
        *parameters,
        *others,
        True,
    )
    names = 'expand', 'conv3', 'response2', 'reduce'
    for i, name in enumerate(names):
        grads[name] = results[2 * i : 2 * i + 2]
    grad, parts = layer_norm.backward(
        grad_y, s.identity2, p.norm2[0], settings.eps[1], grad, p.scale2[0]
    )
    results = empty((*p.norm2, *p.scale2), parts)
    grads['norm2'], grads['scale2'] = results[:2], results[2:]
    grad_y = None if keeps[0] is None else torch.empty_like(s.middle)
    grad_middle, parts = conv.backward(
        grad, s.middle, p.conv2[0], keep=keeps[0], kept=grad_y
    )
    grads['conv2'] = empty(p.conv2, parts)
    if grad_y is None:
        grad_y = grad_middle

    grads['out'] = differentiate(grad_y, s.projected, *p.out)
    ((grad, *grads['out_norm']),) = _norm_grads(
        [_product_grad(grad_y, out)],
        [s.excited],
        [p.out_norm],
        [s.out_norm],
        group,
    )
    into = _empty_pair(grad)
    results = excitation.backward(
        grad,
        s.value,
        *p.excite,
        s.gate,
        s.state,
        True,
        s.branches_out,
        s.norms,
        group,
        *into,
    )
    grad_value, *grads['excite'], grad_gate, grad_branches, norms = results
    norms = norms.unbind()
    grads['value_norm'], grads['branches_norm'], grads['gate_norm'] = (
        norms[:2],
        norms[2:4],
        norms[4:],
    )
    grads['gate'] = differentiate(grad_gate, s.fused, *p.gate)
    grads['value'] = differentiate(grad_value, s.pooled, *p.value)
    grad, grad_fused = _products(into, value_and_gate, transposed=True)
    size, (source, mixable) = settings.size, s.sources
    grad_mixable = grad_fused
    if size is not None:
        grad = aten._adaptive_avg_pool2d_backward(grad, s.mixed[0])
        grad_mixable = torch.empty_like(mixable)
    grad_query, grad_key, *grads['kernels'] = contmix.backward(
        channels_last(grad),
        (s.query[1], s.key[2], *p.kernels, mixable),
        settings.scale,
        s.mixed,
        grad_mixable,
        adds=size is None,
    )
    if size is not None:
        grad_fused += _enlarge_grad(grad_mixable, s.fused, size)
    grad, grads['branches'] = large_conv.backward(
        grad_branches,
        s.fused,
        s.branches,
        p.branches,
        group,
        grad_fused,
    )
    grad, parts = response_norm.backward(
        grad, s.mix[2], p.response[0], *s.response
    )
    grads['response'] = empty(p.response, parts)

    neighbors, normal, _ = s.mix
    grads['mix'] = differentiate(grad, normal, *p.mix, gelu=True)
    grad, _ = product(grad, mix, transposed=True, gelu_input=normal)
    side_by_side = _norm_grads(
        (grad, grad_query, grad_key),
        (neighbors, s.query[0], s.key[1]),
        (p.mix_norm, p.query_norm, p.key_norm),
        (s.mix_norm, s.query_norm, s.key_norm),
        group,
    )
    (grad, *grads['mix_norm']), *side_by_side = side_by_side
    (grad_query, *grads['query_norm']), (grad_key, *grads['key_norm']) = (
        side_by_side
    )
    grad, parts = conv.backward(grad, s.x, p.mix_conv[0], residual=False)
    grads['mix_conv'] = empty(p.mix_conv, parts)
    channels = query.shape[1]
    grads['query'] = differentiate(grad_query, source[:, :channels], *p.query)
    grads['key'] = differentiate(grad_key, s.key[0], *p.key)
    grad_means = channels_last(_product_grad(grad_key, key))
    if size is None:
        grad_features = rows(grad)[:, :channels]
        grad_features.addmm_(rows(grad_query), query.flatten(1))
    else:
        grad_source = torch.empty_like(source)
        grad_source[:, :channels] = _product_grad(grad_query, query)
        grad_source[:, channels:] = aten._adaptive_avg_pool2d_backward(
            grad_means, source[:, channels:]
        )
        grad += _enlarge_grad(grad_source, s.x, size)
        grad_means = None
    grad, parts = layer_norm.backward(
        grad,
        s.identity,
        p.norm1[0],
        settings.eps[0],
        grad_middle,
        p.scale1[0],
        grad_means,
    )
    results = empty((*p.norm1, *p.scale1), parts)
    grads['norm1'], grads['scale1'] = results[:2], results[2:]
    grad, parts = conv.backward(grad, s.updated, p.conv1[0])
    grads['conv1'] = empty(p.conv1, parts)
    grad_initial, grads['prior'] = None, []
    if p.prior:
        weight, _, initial_weight, _ = p.prior
        grad_initial, parts = prior.backward(
            grad, s.z, s.initial, weight, initial_weight
        )
        # Both shifts have the same gradient, in memory of their own.
        grads['prior'] = [torch.empty_like(tensor) for tensor in p.prior]
        first, shift, second, initial_shift = grads['prior']
        jobs.append((parts, first, second, shift))
        jobs.append((parts, None, None, initial_shift))
    partial_sums.add(*jobs, make=weight_grads, operands=products)
    return (grad, grad_initial), grads


def focus_block(
    z: Tensor,
    initial: Tensor | None,
    parameters: FocusParameters,
    keeps: Sequence[Tensor | None],
    scale: float,
    eps: tuple[float, float],
    regions: int,
    group: Any = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.blocks.focus_block`."""
    partial_sums.check_device(z)
    z = channels_last(z)
    if initial is not None:
        initial = channels_last(initial)
    kernel_size = (parameters.kernels[3].shape[-1] + 1) // 2
    size = enlarged_size(z.shape[2:], kernel_size)
    settings = _Settings(scale, eps, regions, size, group)
    if parameters.mix_norm is None:
        parameters = contiguous_fields(parameters)
        return run_fused(_infer, (z, initial), parameters, settings)
    maps = z, initial
    return run_node(_forward, _backward, maps, parameters, keeps, settings)
