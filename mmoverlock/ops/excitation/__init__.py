"""Squeeze and excitation of a map, and the gate behind it."""

from torch import Tensor

from ..backends import run
from . import reference


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
    backend: str = 'auto',
) -> Tensor:
    """``gate * x * s``, ``s = sigmoid(W2 gelu(W1 mean(x) + b1) + b2)``.

    The mean is over H and W. On GPUs the maps are read in the dtypes that
    they have, under autocast too, and in ``torch.channels_last`` (another one
    is copied); what is between is in single precision, and the weights are
    read as they are.

    Args:
        x (Tensor): (B, C, H, W).
        weight1 (Tensor): (D, C, 1, 1).
        bias1 (Tensor): (D, ).
        weight2 (Tensor): (C, D, 1, 1).
        bias2 (Tensor): (C, ).
        gate (Tensor, optional): (B, C, H, W).
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Returns:
        Tensor: (B, C, H, W), in the dtype of x.

    Raises:
        ValueError: If the backend is unknown or cannot run, or the shapes
            disagree.
        ImportError: If the backend needs what is not installed.
    """
    _check_shapes(x, weight1, weight2, gate)
    operands = x, weight1, bias1, weight2, bias2, gate
    return run(backend, reference.squeeze_excite, _kernels, *operands)


def _check_shapes(
    x: Tensor, weight1: Tensor, weight2: Tensor, gate: Tensor | None
) -> None:
    channels, hidden = x.shape[1], len(weight1)
    for name, tensor, shape in (
        ('weight1', weight1, (hidden, channels, 1, 1)),
        ('weight2', weight2, (channels, hidden, 1, 1)),
        ('gate', gate, x.shape),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(tensor.shape)}, '
                f'expected {tuple(shape)}'
            )


def _kernels(*operands) -> Tensor:
    from .triton import squeeze_excite as kernels

    return kernels(*operands)


__all__ = ['squeeze_excite']
