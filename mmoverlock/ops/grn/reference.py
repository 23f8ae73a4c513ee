"""The definition, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..environment import apply, is_compiling

EPS = 1e-6
SQUARES = 2**18  # elements of a map that are squared at a time


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """See :func:`mmoverlock.ops.response_norm`."""
    scale = response_scale(x, gamma).to(x.dtype)
    return torch.addcmul(beta.to(x.dtype), x, scale)


def response_scale(x: Tensor, gamma: Tensor) -> Tensor:
    """The scale of x, (B, C, 1, 1), in single precision at least."""
    response = apply(_L2Norm, x)
    response = response / (response.mean(1, keepdim=True) + EPS)
    return gamma * response + 1


class _L2Norm(torch.autograd.Function):
    """Norm over H and W, in single precision at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = _l2_norm(x)
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        # No infinite gradient where a map is zero.
        scale = torch.where(norm > 0, grad / norm, 0)
        return (x * scale).to(x.dtype)


def _l2_norm(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != 'cpu':
        return torch.linalg.vector_norm(x, 2, (2, 3), True, dtype=dtype)
    # There, norms over strided dimensions are slow.
    parts = [x]
    if not is_compiling():  # whose maps may be of any size
        rows = SQUARES // max(1, x[:, :, 0].numel())
        parts = x.split(max(1, rows), dim=2)
    squares = (p.to(dtype).square().sum((2, 3), True) for p in parts)
    return sum(squares).sqrt()
