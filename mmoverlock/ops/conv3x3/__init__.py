"""A 3 x 3 depthwise convolution and what stands around it, as one pass."""

from torch import Tensor

from ..backends import run
from . import reference


def residual_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: bool = True,
    squares: bool = False,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, Tensor]:
    """``f(x) + conv(f(x)) + bias``: 3 x 3, depthwise, padding 1, stride 1.

    On GPUs the map is read and written once, in ``torch.channels_last``
    (another one is copied), and sums are in single precision. Under autocast
    the map is cast as before a convolution; the weights are read as they are.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, 3, 3).
        bias (Tensor, optional): (C, ).
        gelu (bool): Whether f is the exact GELU. Defaults to False, the
            identity.
        residual (bool): Whether f(x) is added. Defaults to True.
        squares (bool): Whether to return the sums of squares, too. Defaults
            to False.
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Returns:
        Tensor | tuple[Tensor, Tensor]: (B, C, H, W), and the sums of its
        squares over H and W, (B, C), in single precision at least.

    Raises:
        ValueError: If the backend is unknown or cannot run, or the shapes
            disagree.
        ImportError: If the backend needs what is not installed.
    """
    if weight.shape != (x.shape[1], 1, 3, 3):
        raise ValueError(
            f'weight has shape {tuple(weight.shape)}, '
            f'expected {(x.shape[1], 1, 3, 3)}'
        )
    operands = x, weight, bias, gelu, residual, squares
    return run(backend, reference.residual_conv, _kernels, *operands)


def _kernels(*operands) -> Tensor | tuple[Tensor, Tensor]:
    from .triton import residual_conv as kernels

    return kernels(*operands)


__all__ = ['residual_conv']
