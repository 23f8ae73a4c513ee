"""The definition, in plain PyTorch."""

import torch
from torch import Tensor


def scaled_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """See :func:`mmoverlock.ops.scaled_residual`."""
    if keep is not None:
        y = y * keep.detach().to(y.dtype)[:, None, None, None]
    if weight is None:
        return (x + y).to(x.dtype)
    dtype = x.dtype
    weight = weight[:, 0].to(dtype)
    if bias is None:
        return torch.addcmul(y, x, weight).to(dtype)
    x = torch.addcmul(bias[:, None, None].to(dtype), x, weight)
    return (x + y).to(dtype)
