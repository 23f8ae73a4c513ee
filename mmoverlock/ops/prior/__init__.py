"""The first step of a Focus block, on the context prior, in one pass."""

from torch import Tensor

from ..backends import run
from . import reference


def update_prior(
    z: Tensor,
    initial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_weight: Tensor,
    initial_bias: Tensor,
    backend: str = 'auto',
) -> Tensor:
    """Add the scaled initial prior to the scaled prior.

    The last P channels of z are the prior; the others stay as they are. On
    GPUs the maps are read in the dtypes that they have, under autocast too,
    and in ``torch.channels_last`` (another one is copied); what is between is
    in single precision, and the weights are read as they are.

    Args:
        z (Tensor): Features and prior, (B, C + P, H, W).
        initial (Tensor): (B, P, H, W).
        weight (Tensor): (P, 1, 1, 1), of the prior.
        bias (Tensor, optional): (P, ).
        initial_weight (Tensor): (P, 1, 1, 1), of the initial prior.
        initial_bias (Tensor): (P, ).
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Returns:
        Tensor: (B, C + P, H, W), in the dtype of z.

    Raises:
        ValueError: If the backend is unknown or cannot run, or the shapes
            disagree.
        ImportError: If the backend needs what is not installed.
    """
    batch, total, height, width = z.shape
    priors = initial.shape[1]
    if initial.shape != (batch, min(priors, total), height, width):
        raise ValueError(
            f'initial has shape {tuple(initial.shape)}, '
            f'which is no part of {tuple(z.shape)}'
        )
    for name, tensor, shape in (
        ('weight', weight, (priors, 1, 1, 1)),
        ('bias', bias, (priors,)),
        ('initial_weight', initial_weight, (priors, 1, 1, 1)),
        ('initial_bias', initial_bias, (priors,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)}, expected {shape}'
            )
    operands = z, initial, weight, bias, initial_weight, initial_bias
    return run(backend, reference.update_prior, _kernels, *operands)


def _kernels(*operands) -> Tensor:
    from .triton import update_prior as kernels

    return kernels(*operands)


__all__ = ['update_prior']
