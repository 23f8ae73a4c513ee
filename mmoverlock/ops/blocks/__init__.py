"""The two blocks, in training or fused, for GPUs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, distributed

from ..batch_norm import Norm
from ..depthwise import Branch

Pair = tuple[Tensor, Tensor | None]
Weights = tuple[Tensor] | Pair  # without a bias or with one


def _forms(parameters: tuple) -> Iterator[tuple | None]:
    """The number of tensors of each kind, and whether they lack a bias."""
    return (value and (len(value), value[-1] is None) for value in parameters)


class RepConvParameters(NamedTuple):
    """Operands of :func:`repconv_block` besides its map.

    C channels, of which D are hidden. What is fused for inference is as in
    :class:`FocusParameters`.
    """

    conv1: Pair  # (C, 1, 3, 3), (C, )
    norm1: Pair  # (C, ), (C, )
    branches: list[Branch] | Pair  # (C, 1, K, K), (C, )
    branches_norm: Norm | None
    excite: tuple[Tensor, Tensor, Tensor, Tensor]  # see squeeze_excite
    expand: Pair  # (D, C, 1, 1), (D, )
    conv2: Pair
    response: Pair  # (1, D, 1, 1) each
    reduce: Pair  # (C, D, 1, 1), (C, )
    scale: Pair | tuple[()]  # (C, 1, 1, 1), (C, ), of the identity

    def signature(self) -> tuple:
        """Facts that kernels are compiled for."""
        is_fused = self.branches_norm is None
        large = self.branches[0] if is_fused else self.branches[0].weight
        tensors = large, self.expand[0]
        facts = [(t.shape, t.dtype, t.requires_grad) for t in tensors]
        return is_fused, *_forms(self), *facts


class FocusParameters(NamedTuple):
    """Operands of :func:`focus_block` besides its maps.

    C channels are features and P the prior, T = C + P; D are hidden. Fused for
    inference, there is None in place of every norm, one convolution in place
    of the branches, and no convolution of 3 x 3 adds its input.
    """

    prior: tuple[Tensor, ...]  # (P, 1, 1, 1), (P, ), twice; or nothing
    conv1: Pair  # (T, 1, 3, 3), (T, )
    norm1: Pair  # (T, ), (T, )
    mix_conv: Pair  # as conv1
    mix_norm: Norm | None  # of T channels
    mix: Pair  # (C, T, 1, 1), (C, )
    response: Pair  # (1, C, 1, 1) each
    query: Weights  # (C / 2, C, 1, 1), (C / 2, )
    query_norm: Norm | None
    key: Weights  # (C / 2, P, 1, 1), (C / 2, )
    key_norm: Norm | None
    # See contmix; but the first is that of a convolution, (N, regions^2, 1, 1)
    kernels: tuple[Tensor, Tensor, Tensor, Tensor]
    value: Weights  # (C, C, 1, 1), (C, ), as the gate
    value_norm: Norm | None
    branches: list[Branch] | Pair  # (C, 1, K, K), (C, )
    branches_norm: Norm | None
    gate: Weights
    gate_norm: Norm | None
    excite: tuple[Tensor, Tensor, Tensor, Tensor]  # see squeeze_excite
    out_norm: Norm | None
    out: Pair  # (T, C, 1, 1), (T, )
    scale1: Pair  # (T, 1, 1, 1), (T, )
    conv2: Pair
    norm2: Pair
    expand: Pair  # (D, T, 1, 1), (D, )
    conv3: Pair
    response2: Pair  # (1, D, 1, 1) each
    reduce: Pair  # (T, D, 1, 1), (T, )
    scale2: Pair

    def signature(self) -> tuple:
        """Facts that kernels are compiled for."""
        tensors = self.key[0], self.expand[0], *self.kernels
        facts = [(t.shape, t.dtype, t.requires_grad) for t in tensors]
        is_fused = self.mix_norm is None
        return is_fused, *_forms(self), *facts


def focus_block(
    z: Tensor,
    initial: Tensor | None,
    parameters: FocusParameters,
    keeps: Sequence[Tensor | None],
    scale: float,
    eps: tuple[float, float],
    regions: int,
    group: 'distributed.ProcessGroup | None' = None,
) -> Tensor:
    """All that a Focus block does in training, in one node of autograd.

    It computes what the layers do one by one; in one node, gradients of a map
    are added where they are made, and the partial sums of all gradients of
    parameters in one launch. Kernels alone. Running statistics and numbers of
    batches are updated in place. Or, with fused parameters, what it does in
    inference, without a gradient.

    Args:
        z (Tensor): (B, T, H, W), not empty, in the dtype that convolutions
            take.
        initial (Tensor, optional): (B, P, H, W), if there is a ``prior``.
        parameters (FocusParameters): In single precision or half.
        keeps (Sequence[Tensor | None]): Scales of the samples of both branches
            in training, (B, ) each, in single precision.
        scale (float): Of the queries.
        eps (tuple[float, float]): Of the two layer norms.
        regions (int): Along each axis, that the keys are of.
        group (ProcessGroup, optional): The processes whose norms have
            statistics in common, as in :class:`torch.nn.SyncBatchNorm`; their
            maps may have different sizes. Defaults to None: one process.

    Returns:
        Tensor: (B, T, H, W).

    Raises:
        ValueError: If the map is not on a GPU, or in training is empty.
    """
    from .triton import focus_block as run

    return run(z, initial, parameters, keeps, scale, eps, regions, group)


def repconv_block(
    x: Tensor,
    parameters: RepConvParameters,
    keep: Tensor | None,
    eps: float,
    group: 'distributed.ProcessGroup | None' = None,
) -> Tensor:
    """All that a RepConv block does in training; see :func:`focus_block`.

    Args:
        x (Tensor): (B, C, H, W), not empty, in the dtype that convolutions
            take.
        parameters (RepConvParameters): In single precision or half.
        keep (Tensor, optional): Scales of the samples of the residual branch
            in training, (B, ), in single precision.
        eps (float): Of the layer norm.
        group (ProcessGroup, optional): As there.

    Returns:
        Tensor: (B, C, H, W).

    Raises:
        ValueError: If the map is not on a GPU, or in training is empty.
    """
    from .triton import repconv_block as run

    return run(x, parameters, keep, eps, group)


__all__ = [
    'FocusParameters',
    'RepConvParameters',
    'focus_block',
    'repconv_block',
]
