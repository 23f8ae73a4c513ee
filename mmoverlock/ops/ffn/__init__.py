"""The feed-forward network of a block, for GPUs."""

from torch import Tensor

from ..common import cast_as_convolutions, contiguous


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    weight2: Tensor,
    bias2: Tensor,
    residual: bool = True,
    identity: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Expand, mix neighbors, normalize the response, reduce::

        f = gelu(weight1 x + bias1)
        y = f + conv(f)
        out = weight2 (y (gamma r + 1) + beta) + bias2
    out = out keep + identity gain + offset

    with the response r of a channel, its norm over the map divided by the
    mean norm of all channels (GRN, ConvNeXt V2). Kernels alone: elsewhere the
    layers of a block run one by one.

    Args:
        x (Tensor): (B, C, H, W).
        weight1 (Tensor): (D, C, 1, 1).
        bias1 (Tensor): (D, ).
        conv_weight (Tensor): (D, 1, 3, 3).
        conv_bias (Tensor): (D, ).
        gamma (Tensor): (1, D, 1, 1).
        beta (Tensor, optional): (1, D, 1, 1).
        weight2 (Tensor): (C', D, 1, 1).
        bias2 (Tensor): (C', ).
        residual (bool): Whether f is added to its convolution. Defaults to
            True.
        identity (Tensor, optional): (B, C', H, W), which the result is added
            to, in its dtype.
        gain (Tensor, optional): (C', 1, 1, 1).
        offset (Tensor, optional): (C', ), where there is a gain.
        keep (Tensor, optional): (B, ), in single precision; it gets no
            gradient.

    Returns:
        Tensor: (B, C', H, W).
    """
    from .triton import feed_forward as run

    parameters = contiguous(
        weight1,
        bias1,
        conv_weight,
        conv_bias,
        gamma,
        beta,
        weight2,
        bias2,
    )
    others = identity, *contiguous(gain, offset, keep)
    return run(cast_as_convolutions(x), *parameters, *others, residual)[0]


__all__ = ['feed_forward']
