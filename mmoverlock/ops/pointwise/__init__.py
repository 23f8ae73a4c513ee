"""Products of the channels of every pixel with a matrix, in plain PyTorch."""

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last as (B * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def to_map(values: Tensor, like: Tensor) -> Tensor:
    """The opposite of :func:`rows`, with the size of another map."""
    batch, _, height, width = like.shape
    return values.view(batch, height, width, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def round_parameters(dtype: torch.dtype, *parameters: Tensor) -> list[Tensor]:
    """Parameters in the dtype of a map, in one launch; without gradients."""
    if all(parameter.dtype == dtype for parameter in parameters):
        return [parameter.detach() for parameter in parameters]
    rounded = [torch.empty_like(p, dtype=dtype) for p in parameters]
    torch._foreach_copy_(rounded, parameters)
    return rounded


def product_weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a weight (O, I, 1, 1) of a product of maps."""
    grad, x = rows(grad).mT, rows(x)
    if grad.is_cuda and weight.dtype == torch.float32 != grad.dtype:
        out = torch.mm(grad, x, out_dtype=torch.float32)
    else:
        out = torch.mm(grad.to(weight.dtype), x.to(weight.dtype))
    return out.view(weight.shape)
