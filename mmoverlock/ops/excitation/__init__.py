"""Squeeze and excitation of a map, and the gate behind it."""

from torch import Tensor

from ..backends import run
from .reference import squeeze_excite as reference


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gate: Tensor | None = None,
    silu: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """``f(gate) * x * s``, ``s = sigmoid(W2 gelu(W1 mean(x) + b1) + b2)``.

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
        silu (bool): Whether f is SiLU. Defaults to False, the identity.
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Returns:
        Tensor: (B, C, H, W), in the dtype of x.

    Raises:
        ValueError: If the backend is unknown or cannot run, or the shapes
            disagree.
        ImportError: If the backend needs what is not installed.
    """
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
    return run(
        backend,
        reference,
        _kernels,
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        gate,
        silu,
    )


def _kernels(*operands) -> Tensor:
    from .triton import squeeze_excite as kernels

    return kernels(*operands)


__all__ = ['squeeze_excite']
