"""Small layers that OverLoCK is made of, all on (B, C, H, W) maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of every position.

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A learned scale and shift per channel.

    Args:
        channels (int): Channels of the map.
        init_value (float): Initial scale. Defaults to 1.
    """

    def __init__(self, channels: int, init_value: float = 1.0):
        super().__init__()
        # The shape of a 1x1 depthwise kernel: what it could be fused into.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, 0] + self.bias[:, None, None]


class GRN(nn.Module):
    """Global response normalization (ConvNeXt V2).

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        response = response / (response.mean(1, keepdim=True) + 1e-6)
        return x * (self.gamma * response + 1) + self.beta


class SEModule(nn.Module):
    """Squeeze and excitation.

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(16, channels // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


class ResDWConv(nn.Conv2d):
    """A 3x3 depthwise convolution added to its input.

    Args:
        channels (int): Channels of the map.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch, sample by sample.

    Args:
        drop_prob (float): Probability of a drop, in [0, 1).
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = torch.ones_like(x[:, :1, :1, :1])
        return x * F.dropout(keep, self.drop_prob)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob}'


def build_bn(
    channels: int,
    type: str = 'BN',
    eps: float = 1e-5,
    momentum: float = 0.1,
    requires_grad: bool = True,
) -> nn.Module:
    """Build a batch norm; all but ``channels`` is OpenMMLab's ``norm_cfg``.

    Args:
        channels (int): Channels of the map.
        type (str): 'BN' or 'SyncBN'. Defaults to 'BN'.
        eps (float): Added to the variance. Defaults to 1e-5.
        momentum (float): Of the running statistics. Defaults to 0.1.
        requires_grad (bool): Whether scale and shift are trained. Defaults to
            True.

    Raises:
        ValueError: If the type is no batch norm. Merging branches takes
            running statistics, which other norms do not have.
    """
    types = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}
    if type not in types:
        raise ValueError(
            f'unsupported norm type {type!r}, expected one of {list(types)}'
        )
    norm = types[type](channels, eps=eps, momentum=momentum)
    return norm.requires_grad_(requires_grad)
