"""Layer normalization over the channels of a map."""

from torch import Tensor

from ..backends import run
from . import reference


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    backend: str = 'auto',
    contiguous: bool = False,
) -> Tensor:
    """Normalize every position of a map over its channels.

    On GPUs the map is read and written once, in ``torch.channels_last``
    (another one is copied), in the dtype that it has, under autocast too;
    what is between is in single precision, and the weights are read as they
    are. A contiguous result costs no copy there, nor does a contiguous
    gradient of it.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, ).
        bias (Tensor): (C, ).
        eps (float): Added to the variance. Defaults to 1e-6.
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.
        contiguous (bool): Whether the result is contiguous, in place of
            channels_last. Defaults to False.

    Returns:
        Tensor: (B, C, H, W).

    Raises:
        ValueError: If the backend is unknown or cannot run.
        ImportError: If the backend needs what is not installed.
    """
    operands = x, weight, bias, eps, contiguous
    return run(backend, reference.layer_norm, _kernels, *operands)


def _kernels(*operands) -> Tensor:
    from .triton import layer_norm as kernels

    return kernels(*operands)


__all__ = ['layer_norm']
