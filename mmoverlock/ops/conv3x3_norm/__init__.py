"""A 3 x 3 depthwise convolution and the layer norm behind it."""

from torch import Tensor

from ..common import cast_as_convolutions


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """Both :func:`residual_conv` and :func:`layer_norm`, which see there::

        y = x + conv(x) + bias,  z = norm(y) scale + shift

    Kernels alone, with one node of autograd: elsewhere the layers run one by
    one.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, 3, 3).
        bias (Tensor, optional): (C, ).
        scale, shift (Tensor): (C, ).
        eps (float): Added to the variance. Defaults to 1e-6.
        residual (bool): Whether x is added to its convolution. Defaults to
            True.

    Returns:
        tuple[Tensor, Tensor]: y and z, both (B, C, H, W).
    """
    from .triton import conv_norm as run

    x = cast_as_convolutions(x)
    return run(x, weight, bias, scale, shift, eps, residual)


__all__ = ['conv_norm']
