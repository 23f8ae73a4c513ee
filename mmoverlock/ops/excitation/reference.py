"""The definition, in plain PyTorch."""

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
