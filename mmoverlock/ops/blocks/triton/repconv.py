"""A RepConv block as one node; see the Focus block's beside it.

Both maps that the block adds to are read once backward: the gradient of the
scaled identity is made in the pass of the norm behind it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import partial_sums
from ...batch_norm import triton as batch_norm
from ...common import channels_last
from ...conv3x3 import triton as conv
from ...conv3x3_norm import triton as conv_norm
from ...depthwise.triton import branches as large_conv
from ...depthwise.triton.conv2d import convolve_merged
from ...excitation import triton as excitation
from ...ffn import triton as ffn
from ...layernorm import triton as layer_norm
from .. import RepConvParameters
from .node import contiguous_fields, run_fused, run_node


class _Saved(NamedTuple):
    """Maps that are kept, and what else the backward pass needs."""

    x: Tensor
    identity: Tensor
    y: Tensor
    branches: tuple  # statistics, taps, the first one's output
    branches_out: Tensor
    norms: Tensor
    state: Tensor
    excited: Tensor
    ffn: tuple
    rounded: tuple


def _forward(
    x: Tensor,
    p: RepConvParameters,
    keep: Tensor | None,
    eps: float,
    group: Any,
) -> tuple[Tensor, _Saved]:
    """The result, and what to keep."""
    others = *p.expand, p.reduce[0]
    taps, rounded = large_conv.pack(x.dtype, p.branches, others)
    identity, y = conv_norm.forward(x, *p.conv1, *p.norm1, eps)
    branches_out, branches = large_conv.forward(y, p.branches, taps, group)
    measured = batch_norm.measure([branches_out], [p.branches_norm], group)
    excited, state = excitation.forward(
        branches_out, *p.excite, measured=measured
    )
    result, *kept = _feed_forward(excited, p, rounded, identity, keep, True)
    saved = _Saved(
        x,
        identity,
        y,
        branches,
        branches_out,
        measured[1],
        state,
        excited,
        tuple(kept[:4]),
        tuple(rounded),
    )
    return result, saved


def _feed_forward(
    x: Tensor,
    p: RepConvParameters,
    weights: Sequence[Tensor],
    identity: Tensor,
    keep: Tensor | None,
    residual: bool,
) -> tuple[Tensor, ...]:
    expand, expand_bias, reduce = weights
    return ffn.feed_forward.function(
        x,
        expand,
        expand_bias,
        *p.conv2,
        *p.response,
        reduce,
        p.reduce[1],
        identity,
        *(p.scale or (None, None)),
        keep,
        residual,
    )


def _infer(x: Tensor, p: RepConvParameters, eps: float) -> Tensor:
    """The result where norms are parts of convolutions."""
    others = *p.expand, p.reduce[0]
    taps, weights = large_conv.pack(x.dtype, p.branches, others)
    identity, x = conv_norm.forward(x, *p.conv1, *p.norm1, eps, False)
    x = convolve_merged(x, taps, p.branches)
    x, _ = excitation.forward(x, *p.excite)
    return _feed_forward(x, p, weights, identity, None, False)[0]


def _backward(
    grad: Tensor,
    s: _Saved,
    p: RepConvParameters,
    keep: Tensor | None,
    eps: float,
    group: Any,
) -> tuple[tuple[Tensor], dict[str, list]]:
    """Gradients of the map; of the parameters, by field."""
    grads = {}
    hidden = *p.expand, *p.conv2, *p.response, *p.reduce
    others = None, None, None, keep
    expand, expand_bias, reduce = s.rounded
    weights = expand, reduce, expand_bias
    grad_y, *results = ffn._feed_forward_backward.function(
        grad, s.excited, *s.ffn, *weights, *hidden, *others, True
    )
    for i, name in enumerate(('expand', 'conv2', 'response', 'reduce')):
        grads[name] = results[2 * i : 2 * i + 2]
    grad_y, *grads['excite'], grads['branches_norm'] = excitation.backward(
        grad_y,
        s.branches_out,
        *p.excite,
        None,
        s.state,
        norms=s.norms,
        group=group,
    )
    grad_y, grads['branches'] = large_conv.backward(
        grad_y, s.y, s.branches, p.branches, group
    )
    gain = p.scale[0] if p.scale else None
    grad, parts = layer_norm.backward(
        grad_y, s.identity, p.norm1[0], eps, grad, gain
    )
    results = [torch.empty_like(t) for t in (*p.norm1, *p.scale)]
    partial_sums.add((parts, *results))
    grads['norm1'], grads['scale'] = results[:2], results[2:]
    grad, parts = conv.backward(grad, s.x, p.conv1[0])
    grads['conv1'] = [torch.empty_like(t) for t in p.conv1]
    partial_sums.add((parts, *grads['conv1']))
    return (grad,), grads


def repconv_block(
    x: Tensor,
    parameters: RepConvParameters,
    keep: Tensor | None,
    eps: float,
    group: Any = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.blocks.repconv_block`."""
    partial_sums.check_device(x)
    x = channels_last(x)
    if parameters.branches_norm is None:
        return run_fused(_infer, (x,), contiguous_fields(parameters), eps)
    return run_node(_forward, _backward, (x,), parameters, keep, eps, group)
