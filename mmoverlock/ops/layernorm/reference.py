"""The definition, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """See :func:`mmoverlock.ops.layer_norm`."""
    x = x.permute(0, 2, 3, 1)
    x = F.layer_norm(x, weight.shape, weight, bias, eps)
    return x.permute(0, 3, 1, 2)
