"""The definition, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    contiguous: bool = False,
) -> Tensor:
    """See :func:`mmoverlock.ops.layer_norm`."""
    x = x.permute(0, 2, 3, 1)
    x = F.layer_norm(x, weight.shape, weight, bias, eps)
    x = x.permute(0, 3, 1, 2)
    return x.contiguous() if contiguous else x
