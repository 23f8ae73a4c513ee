"""Global response normalization (GRN, ConvNeXt V2)."""

from torch import Tensor

from ..backends import run
from . import reference
from .reference import response_scale


def response_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, backend: str = 'auto'
) -> Tensor:
    """Scale channels by how strongly they respond to an image::

        n = norm of x over H and W,  r = n / (mean of n over C + 1e-6)
        out = x (gamma r + 1) + beta

    On GPUs the map is read in ``torch.channels_last`` (another one is
    copied), in the dtype that it has, under autocast too; what is between is
    in single precision.

    Args:
        x (Tensor): (B, C, H, W).
        gamma (Tensor): (1, C, 1, 1).
        beta (Tensor): (1, C, 1, 1).
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Returns:
        Tensor: (B, C, H, W), in the dtype of x.

    Raises:
        ValueError: If the backend is unknown or cannot run, or the shapes
            disagree.
        ImportError: If the backend needs what is not installed.
    """
    shape = (1, x.shape[1], 1, 1)
    for name, tensor in (('gamma', gamma), ('beta', beta)):
        if tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)}, expected {shape}'
            )
    return run(backend, reference.response_norm, _kernels, x, gamma, beta)


def _kernels(*operands) -> Tensor:
    from .triton import response_norm as kernels

    return kernels(*operands)


__all__ = ['response_norm', 'response_scale']
