"""ContMix as a layer of other networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_backend, contmix, enlarged_size
from ..ops.dynamic_conv import BACKENDS
from .blocks import NUM_REGIONS, SMALL_KERNEL_SIZE
from .layers import PointwiseConv, build_bn


class ContMixBlock(nn.Module):
    """A dynamic convolution in place of a large or an attention layer.

    Every position makes a 5 x 5 and a K x K kernel from its affinity to
    7 x 7 regions, of a context prior or of the map itself, and mixes its
    neighborhood with them (section 3.3 of the paper); a 1x1 convolution and a
    batch norm follow. Norms and residuals around it are the network's.

    Args:
        channels (int): Channels C of the map.
        kernel_size (int): Size K of the large kernels, odd. Defaults to 13.
        groups (int): Groups of channels, which have kernels of their own; C
            is a multiple of twice as many. Defaults to 8.
        prior_channels (int, optional): Channels P of a context prior.
            Defaults to None: the map is its own.
        norm_cfg (dict, optional): See
            :func:`mmoverlock.models.layers.build_bn`. Defaults to
            ``dict(type='BN')``.
        backend (str): See :func:`mmoverlock.ops.contmix`. Defaults to
            'auto'.

    Raises:
        ValueError: If the kernel size is even, the channels are no such
            multiple, or there is no such norm or backend.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 13,
        groups: int = 8,
        prior_channels: int | None = None,
        norm_cfg: dict | None = None,
        backend: str = 'auto',
    ):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < SMALL_KERNEL_SIZE:
            raise ValueError(
                f'kernel_size must be odd and at least {SMALL_KERNEL_SIZE}, '
                f'got {kernel_size}'
            )
        if channels % (2 * groups):
            raise ValueError(
                f'{groups} groups need a multiple of {2 * groups} channels, '
                f'got {channels}'
            )
        check_backend(backend, ('auto', *BACKENDS))
        self.kernel_size = kernel_size
        self.backend = backend
        self.scale = (channels / groups) ** -0.5

        def conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(
                PointwiseConv(in_channels, out_channels, bias=False),
                build_bn(out_channels, **(norm_cfg or {})),
            )

        self.query = conv_bn(channels, channels // 2)
        self.key = conv_bn(prior_channels or channels, channels // 2)
        # The logits of both kernels, from the affinities to the regions.
        taps = SMALL_KERNEL_SIZE**2 + kernel_size**2
        self.weight = nn.Linear(NUM_REGIONS**2, taps)
        self.rpb = nn.ParameterList(
            torch.zeros(groups, 2 * size - 1, 2 * size - 1)
            for size in (SMALL_KERNEL_SIZE, kernel_size)
        )
        self.proj = conv_bn(channels, channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.weight.bias)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """Mix a map with kernels made from it and from the prior.

        A map with a side shorter than the kernel is enlarged for it.

        Args:
            x (Tensor): (B, C, H, W).
            prior (Tensor, optional): (B, P, H', W'). Defaults to None: ``x``.

        Returns:
            Tensor: (B, C, H, W).
        """
        size = x.shape[2:]
        prior = x if prior is None else prior
        enlarged = enlarged_size(size, self.kernel_size)
        if enlarged:
            x = F.interpolate(x, enlarged, mode='bilinear')
        mixed = contmix(
            self.query(x),
            self.key(F.adaptive_avg_pool2d(prior, NUM_REGIONS)),
            x,
            self.weight.weight,
            self.weight.bias,
            tuple(self.rpb),
            self.backend,
            self.scale,
        )
        if enlarged:
            mixed = F.adaptive_avg_pool2d(mixed, size)
        return self.proj(mixed)
