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
from torch import Tensor

from ... import partial_sums
from ...common import channels_last
from ...conv3x3 import triton as conv
from ...depthwise.triton import branches as large_conv
from ...depthwise.triton import depthwise_conv2d
from ...dynamic_conv import triton as contmix
from ...excitation import triton as excitation
from ...ffn import triton as ffn
from ...grn import triton as response_norm
from ...layernorm import triton as layer_norm
from ...pointwise import round_parameters, rows, to_map
from ...pointwise.triton import product, weight_grads
from ...prior import triton as prior
from .. import FocusParameters
from .node import columns, contiguous_fields, run_node

aten = torch.ops.aten


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
    weights = *p.mix, *p.query, *p.key, *p.value, *p.gate, p.out[0], *p.expand
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
    pooled = _pool(guide, settings.regions)
    keys = _product(pooled, key)
    normal_keys, *key_statistics = _norm(keys, p.key_norm)
    mixed = contmix._mix.function(
        normal_queries, normal_keys, *p.kernels, fused, settings.scale
    )

    values = _product(mixed[0], value)
    gates = _product(fused, gate)
    fields = columns(p.branches)
    running = large_conv._Running(*fields[3:6], fields[7])
    branches = large_conv._measure(
        fused, *fields[:3], fields[6], fields[8], running
    )
    branches_out = large_conv._forward(fused, branches)
    fields = columns([p.value_norm, p.branches_norm, p.gate_norm])
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


def _infer(z, initial, p, settings):
    """The result where norms are parts of convolutions."""
    if p.prior:
        z = prior.forward(z, initial, *p.prior)
    weights = *p.mix, *p.query, *p.key, *p.gate, *p.expand
    weights += p.value[0], p.out[0], p.reduce[0]
    *rounded, value, out, reduce = round_parameters(z.dtype, *weights)
    pairs = zip(rounded[::2], rounded[1::2], strict=True)
    mix, query, key, gate, expand = pairs
    identity, _ = conv.forward(z, *p.conv1, residual=False)
    x = layer_norm.forward(identity, *p.norm1, settings.eps[0])
    y, _ = conv.forward(x, *p.mix_conv, residual=False, activate=True)
    y = _product(y, *mix)
    fused, *_ = response_norm.forward(y, *p.response)
    features, guide = x.split([query[0].shape[1], key[0].shape[1]], 1)
    pooled = _pool(guide, settings.regions)
    queries, keys = _product(features, *query), _product(pooled, *key)
    mixed, *_ = contmix._mix.function(
        queries, keys, *p.kernels, fused, settings.scale
    )
    y = depthwise_conv2d(fused, *p.branches)
    y, _ = product(mixed, value, p.value[1], identity=y)
    y, _ = excitation.forward(y, *p.excite, _product(fused, *gate), True)
    gain, offset = p.scale1
    z, _ = product(
        y, out, p.out[1], identity=identity, gain=gain, offset=offset
    )
    identity, _ = conv.forward(z, *p.conv2, residual=False)
    x = layer_norm.forward(identity, *p.norm2, settings.eps[1])
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


def _pool(x, regions):
    """Means of regions of a map."""
    if len(x) < 16:  # a block an image in channels_last: 0.24 ms at 50 x 84
        x = x.contiguous()
    return channels_last(F.adaptive_avg_pool2d(x, regions))


def _backward(grad, s, p, keeps, settings):
    """Gradients of the two maps; of the parameters, by field."""
    mix, _, query, key, value, gate, out = s.rounded[:-3]
    expand, expand_bias, reduce = s.rounded[-3:]
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
    others = None, None, None, keeps[1]
    grad_y, *results = ffn._feed_forward_backward.function(
        grad,
        s.x2,
        *s.ffn,
        expand,
        reduce,
        expand_bias,
        *hidden,
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
    grads['gate'] = differentiate(grad_gate, s.fused, *p.gate)
    grads['value'] = differentiate(grad_value, s.mixed[0], *p.value)
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
    fields = columns(p.branches)
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
    grad, _ = product(grad, mix, transposed=True, gelu_input=normal)
    grad, *grads['mix_norm'] = _norm_grad(
        grad, neighbors, p.mix_norm, mix_statistics
    )
    grad, parts = conv.backward(grad, s.x, p.mix_conv[0], residual=False)
    grads['mix_conv'] = empty(p.mix_conv, parts)
    features = s.x[:, : query.shape[1]]
    grad_query, *grads['query_norm'] = _norm_grad(
        grad_query, s.query[0], p.query_norm, query_statistics
    )
    grads['query'] = differentiate(grad_query, features, *p.query)
    grad_features = rows(grad)[:, : query.shape[1]]
    grad_features.addmm_(rows(grad_query), query.flatten(1))
    grad_key, *grads['key_norm'] = _norm_grad(
        grad_key, s.key[1], p.key_norm, key_statistics
    )
    grads['key'] = differentiate(grad_key, s.key[0], *p.key)
    grad, parts = layer_norm.backward(
        grad,
        s.identity,
        p.norm1[0],
        settings.eps[0],
        grad_middle,
        p.scale1[0],
        channels_last(_product_grad(grad_key, key)),
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
    parts = weight_grads(*(operands for *operands, _ in products))
    for (*_, outs), sums in zip(products, parts, strict=True):
        jobs += zip(sums, outs, strict=False)
    partial_sums.add(*jobs)
    return (grad, grad_initial), grads


def focus_block(
    z: Tensor,
    initial: Tensor | None,
    parameters: FocusParameters,
    keeps: Sequence[Tensor | None],
    scale: float,
    eps: tuple[float, float],
    regions: int,
) -> Tensor:
    """See :func:`mmoverlock.ops.blocks.focus_block`."""
    partial_sums.check_device(z)
    z = channels_last(z)
    if initial is not None:
        initial = channels_last(initial)
    settings = _Settings(scale, eps, regions)
    if parameters.mix_norm is None:
        return _infer(z, initial, contiguous_fields(parameters), settings)
    maps = z, initial
    return run_node(_forward, _backward, maps, parameters, keeps, settings)
