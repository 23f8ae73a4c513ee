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
) -> Tensor:
    """See :func:`mmoverlock.ops.squeeze_excite`."""
    mean = x.mean((2, 3)).to(weight1.dtype)
    hidden = F.gelu(F.linear(mean, weight1.flatten(1), bias1))
    scale = F.linear(hidden, weight2.flatten(1), bias2).sigmoid()
    y = x * scale.to(x.dtype)[..., None, None]
    return y if gate is None else (gate * y).to(x.dtype)


def excite_norm(x: Tensor, norm: Sequence, *weights: Tensor) -> Tensor:
    """See :func:`mmoverlock.ops.excite_norm`."""
    scale, shift, mean, variance, batches, momentum, eps = norm
    batches += 1
    x = F.batch_norm(x, mean, variance, scale, shift, True, momentum, eps)
    return squeeze_excite(x, *weights)
