"""The definition, in plain PyTorch."""

import torch
from torch import Tensor

from ..residual.reference import scaled_residual


def update_prior(
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
) -> Tensor:
    """See :func:`mmoverlock.ops.update_prior`."""
    channels = z.shape[1] - initial.shape[1]
    x, prior = z.split((channels, initial.shape[1]), dim=1)
    dtype = initial.dtype
    initial = torch.addcmul(
        initial_bias[:, None, None].to(dtype),
        initial,
        initial_weight[:, 0].to(dtype),
    )
    return torch.cat([x, scaled_residual(prior, initial, weight, bias)], 1)
