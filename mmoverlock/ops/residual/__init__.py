"""Layer scale, drop path and the residual sum, as one pass."""

from torch import Tensor

from ..backends import run
from . import reference


def scaled_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    backend: str = 'auto',
) -> Tensor:
    """``x * weight + bias + y * keep``.

    On GPUs the maps are read in the dtypes that they have, under autocast
    too, and in ``torch.channels_last`` (another one is copied); what is
    between is in single precision, and the weights are read as they are.

    Args:
        x (Tensor): (B, C, H, W).
        y (Tensor): (B, C, H, W), what the residual branch makes of x.
        weight (Tensor, optional): (C, 1, 1, 1).
        bias (Tensor, optional): (C, ), beside a weight.
        keep (Tensor, optional): (B, ), what drop path scales every sample
            by. It has no gradient.
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Returns:
        Tensor: (B, C, H, W), in the dtype of x.

    Raises:
        ValueError: If the backend is unknown or cannot run, if the shapes
            disagree, or if there is a bias without a weight.
        ImportError: If the backend needs what is not installed.
    """
    if weight is None and bias is not None:
        raise ValueError('a bias needs a weight')
    for name, tensor, shape in (
        ('y', y, x.shape),
        ('weight', weight, (x.shape[1], 1, 1, 1)),
        ('bias', bias, (x.shape[1],)),
        ('keep', keep, (x.shape[0],)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)}, '
                f'expected {tuple(shape)}'
            )
    operands = x, y, weight, bias, keep
    return run(backend, reference.scaled_residual, _kernels, *operands)


def _kernels(*operands) -> Tensor:
    from .triton import scaled_residual as kernels

    return kernels(*operands)


__all__ = ['scaled_residual']
