"""The definition, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..depthwise import depthwise_conv2d


def residual_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: bool = True,
    squares: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`mmoverlock.ops.residual_conv`."""
    if gelu:
        x = F.gelu(x)
    y = depthwise_conv2d(
        x, weight, bias, residual=residual, backend='reference'
    )
    if not squares:
        return y
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y, y.to(dtype).square().sum((2, 3))
