"""The definition, in plain PyTorch."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """See :func:`mmoverlock.ops.squeeze_excite`."""
    mean = x.mean((2, 3)).to(weight1.dtype)
    hidden = F.gelu(F.linear(mean, weight1.flatten(1), bias1))
    scale = F.linear(hidden, weight2.flatten(1), bias2).sigmoid()
    y = x * scale.to(x.dtype)[..., None, None]
    if gate is None:
        return y
    if silu:
        gate = F.silu(gate)
    return (gate * y).to(x.dtype)


def excite_norms(
    maps: Sequence[Tensor], norms: Sequence[Sequence], *weights: Tensor
) -> Tensor:
    """See :func:`mmoverlock.ops.excite_norms`."""
    results = []
    for x, norm in zip(maps, norms, strict=True):
        scale, shift, mean, variance, batches, momentum, eps = norm
        batches += 1
        results.append(
            F.batch_norm(x, mean, variance, scale, shift, True, momentum, eps)
        )
    if len(results) == 1:
        return squeeze_excite(*results, *weights)
    x, other, gate = results
    return squeeze_excite(x + other, *weights, gate, True)
