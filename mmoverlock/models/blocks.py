"""The two blocks of OverLoCK."""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import compress
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    cast_as_convolutions,
    contmix,
    convolution_dtype,
    enlarged_size,
    feed_forward,
    is_compiling,
    is_proxied,
    takes_triton,
    update_prior,
)
from ..ops.blocks import (
    FocusParameters,
    RepConvParameters,
    focus_block,
    repconv_block,
)
from .layers import (
    GRN,
    DropPath,
    DWConv,
    LayerNorm2d,
    LayerScale,
    PointwiseConv,
    ResDWConv,
    SEModule,
    add_residual,
    are_plain,
    as_operand,
    build_bn,
    computes_as,
    conv_and_norm,
    counts_batches,
    draw_paths,
    exchanges,
    group_of,
    is_plain,
    is_plain_scale,
    pair_of,
)
from .reparam import DilatedReparamConv

SMALL_KERNEL_SIZE = 5  # of the dynamic kernels
NUM_REGIONS = 7  # region centers per axis that dynamic kernels are made from


def _feed_forward_layers(
    in_channels: int, hidden_channels: int, out_channels: int
) -> tuple[nn.Module, ...]:
    return (
        PointwiseConv(in_channels, hidden_channels),
        nn.GELU(),
        ResDWConv(hidden_channels),
        GRN(hidden_channels),
        PointwiseConv(hidden_channels, out_channels),
    )


FEED_FORWARD = PointwiseConv, nn.GELU, ResDWConv, GRN, PointwiseConv
REPCONV = {  # the layers of a RepConv block, where None is a norm
    'dwconv': ResDWConv,
    'proj': (
        LayerNorm2d,
        DilatedReparamConv,
        None,
        SEModule,
        *FEED_FORWARD,
        DropPath,
    ),
}
FOCUS = {  # the same of a Focus block
    'dwconv1': ResDWConv,
    'norm1': LayerNorm2d,
    'fusion': (DWConv, None, nn.GELU, PointwiseConv, GRN),
    'gate': (PointwiseConv, None, nn.SiLU),
    'lepe': (DilatedReparamConv, None),
    'weight_query': (PointwiseConv, None),
    'weight_key': (nn.AdaptiveAvgPool2d, PointwiseConv, None),
    'weight_proj': nn.Conv2d,
    'dyconv_proj': (PointwiseConv, None),
    'se_layer': SEModule,
    'proj': (None, PointwiseConv),
    'ls1': LayerScale,
    'dwconv2': ResDWConv,
    'norm2': LayerNorm2d,
    'mlp': FEED_FORWARD,
    'ls2': LayerScale,
}


def _feed_forward(
    layers: Sequence[nn.Module],
    x: Tensor,
    identity: Tensor,
    keep: Tensor | None,
    scale: LayerScale | None,
    excite: SEModule | None = None,
) -> Tensor:
    """Run such layers and add their result to the scaled identity.

    A squeeze and excitation may come first. What this and GRN scale and shift
    is the input of a 1x1 convolution.
    """
    steps, kinds = [*layers], FEED_FORWARD
    if excite is not None:
        steps, kinds = [excite, *steps], (SEModule, *kinds)
    if not (are_plain(steps, *kinds) and is_plain_scale(scale)):
        for layer in steps:
            x = layer(x)
        return add_residual(identity, x, keep, scale)
    expand, gelu, dwconv, grn, reduce = layers
    parameters = (
        *pair_of(expand),
        *pair_of(dwconv),
        *pair_of(grn, 'gamma', 'beta'),
        *pair_of(reduce),
        dwconv.residual,
        identity,
        *((None, None) if scale is None else pair_of(scale)),
        keep,
    )
    if takes_triton('auto', x, feed_forward, x, *parameters):
        return feed_forward(x if excite is None else excite(x), *parameters)
    scales = () if excite is None else excite.scale_and_shift(x)
    x = dwconv(gelu(expand(x, *scales)))
    x = reduce(x, *grn.scale_and_shift(x))
    return add_residual(identity, x, keep, scale)


def _layers_by_kind(
    block: nn.Module, names: dict[str, type | tuple]
) -> dict[type | None, list[nn.Module]] | None:
    """The layers of a block; None if one of them computes something else."""
    found = defaultdict(list)
    for name, kinds in names.items():
        # Several times as fast as attributes, for every step
        layers = (block._modules[name],)
        if isinstance(kinds, tuple):
            if not is_plain(*layers, nn.Sequential):
                return None
            layers = layers[0]._modules.values()
        else:
            kinds = (kinds,)
        if len(layers) != len(kinds):
            return None
        for layer, kind in zip(layers, kinds, strict=True):
            if kind is not None and not is_plain(layer, kind):
                return None
            found[kind].append(layer)
    return found


def _is_one_node(
    block: nn.Module, names: dict[str, type | tuple], x: Tensor
) -> bool:
    """Whether kernels may do in one node what the layers of a block do.

    The layers have to be what they are at first, but for norms in inference:
    those have to be fused. Nobody may watch the layers.
    """
    if type(x) is not Tensor or not takes_triton('auto', x):
        return False
    if is_compiling() or is_proxied():  # graphs are of operators
        return False
    layers = _layers_by_kind(block, names)
    if layers is None:
        if exchanges(block):
            warnings.warn(
                f'a {type(block).__name__} runs layer by layer, as one has '
                'hooks or has been replaced. It has to be so in all processes '
                'that share statistics of batch norms, or they wait forever',
                stacklevel=2,
            )
        return False
    norms = layers[None]
    (conv,), (excite,) = layers[DilatedReparamConv], layers[SEModule]
    if block.training:
        norms += [norm for _, norm in conv._branches()]
        groups = {*map(group_of, norms)}
        is_whole = (
            bool(conv.branches)
            and all(conv.residual for conv in layers[ResDWConv])
            and all(map(counts_batches, norms))
            and len(groups) == 1
            # Processes have to take the same way, whatever their maps are.
            and (x.numel() > x.shape[1] or groups != {None})
        )
    else:
        is_whole = (
            not torch.is_grad_enabled()
            and x.numel() > 0
            and not conv.branches
            and all(is_plain(norm, nn.Identity) for norm in norms)
            and not any(conv.residual for conv in layers[ResDWConv])
        )
    return (
        is_whole
        and conv.backend in ('auto', 'triton')
        and excite.is_as_built()
        and conv.is_as_built()
    )


class RepConvBlock(nn.Module):
    """The block of the Base-Net and the Overview-Net.

    Args:
        channels (int): Channels C of the map.
        kernel_size (int): Size of the large kernel.
        layer_scale (bool): Whether the identity is scaled.
        drop_path (float): Probability to drop the residual branch.
        norm_cfg (dict): See :func:`mmoverlock.models.layers.build_bn`.
        deploy (bool): Whether to build the merged form.
        depthwise_backend (str): See
            :func:`mmoverlock.ops.backends.check_backend`. Defaults to
            'auto'.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int,
        layer_scale: bool,
        drop_path: float,
        norm_cfg: dict,
        deploy: bool,
        depthwise_backend: str = 'auto',
    ):
        super().__init__()
        self.dwconv = ResDWConv(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels),
            DilatedReparamConv(
                channels, kernel_size, norm_cfg, deploy, depthwise_backend
            ),
            build_bn(channels, **norm_cfg),
            SEModule(channels),
            *_feed_forward_layers(channels, 4 * channels, channels),
            DropPath(drop_path),
        )
        self.ls = LayerScale(channels) if layer_scale else None

    @property
    def path(self) -> DropPath:
        return self.proj[-1]

    def forward(
        self, x: Tensor, keeps: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """(B, C, H, W) to (B, C, H, W), with what may have been drawn."""
        (keep,) = keeps or draw_paths([self.path], x)[0]
        if self._is_one_node(x):
            x = cast_as_convolutions(x)
            operands = x, self._operands(), keep, self.proj[0].eps
            if takes_triton('auto', x, repconv_block, *operands):
                return repconv_block(*operands, group_of(self.proj[2]))
        norm, conv, bn, excite, *layers, _ = self.proj
        x, y = conv_and_norm(self.dwconv, norm, x)
        y = bn(conv(y))
        return _feed_forward(layers, y, x, keep, self.ls, excite)

    def _is_one_node(self, x: Tensor) -> bool:
        """Whether it is :func:`mmoverlock.ops.blocks.repconv_block`."""
        return (
            type(self) is RepConvBlock
            and _is_one_node(self, REPCONV, x)
            and is_plain_scale(self.ls)
        )

    def _operands(self) -> RepConvParameters:
        own = self._modules
        norm, conv, bn, excite, expand, _, conv2, response, reduce, _ = own[
            'proj'
        ]._modules.values()
        scale = self.ls
        return RepConvParameters(
            pair_of(own['dwconv']),
            pair_of(norm),
            conv.as_operands() or pair_of(conv.lk_origin),
            as_operand(bn),
            excite.weights(),
            pair_of(expand),
            pair_of(conv2),
            pair_of(response, 'gamma', 'beta'),
            pair_of(reduce),
            () if scale is None else pair_of(scale),
        )


class FocusBlock(nn.Module):
    """The block of the Focus-Net: ContMix, guided by the context prior.

    It works on features and prior as one map of C + P channels.

    Args:
        channels (int): Channels C of the features.
        prior_channels (int): Channels P of the context prior.
        kernel_size (int): Size of the large dynamic kernel.
        heads (int): Half the number of groups of dynamic kernels.
        first (bool): Whether this is the first block of the Focus-Net, which
            takes the prior as it comes.
        drop_path (float): Probability to drop a residual branch.
        norm_cfg (dict): See :func:`mmoverlock.models.layers.build_bn`.
        deploy (bool): Whether to build the merged form.
        depthwise_backend (str): See
            :func:`mmoverlock.ops.backends.check_backend`. Defaults to
            'auto'.
        contmix_backend (str): See :func:`mmoverlock.ops.contmix`. Defaults to
            'auto'.
        key_channels (int, optional): Channels, the last of those that
            :meth:`dynamic_conv` is given, that keys are made from. Defaults
            to those of the prior.
    """

    def __init__(
        self,
        channels: int,
        prior_channels: int,
        *,
        kernel_size: int,
        heads: int,
        first: bool,
        drop_path: float,
        norm_cfg: dict,
        deploy: bool,
        depthwise_backend: str = 'auto',
        contmix_backend: str = 'auto',
        key_channels: int | None = None,
    ):
        super().__init__()
        if key_channels is None:
            key_channels = prior_channels
        self.splits = (channels, key_channels)
        self.first = first
        self.kernel_size = kernel_size
        self.contmix_backend = contmix_backend
        total = channels + prior_channels
        groups = 2 * heads
        self.scale = (channels / groups) ** -0.5

        def conv_bn(
            in_channels: int, out_channels: int
        ) -> tuple[nn.Module, nn.Module]:
            return (
                PointwiseConv(in_channels, out_channels, bias=False),
                build_bn(out_channels, **norm_cfg),
            )

        if not first:
            self.x_scale = LayerScale(prior_channels)
            self.h_scale = LayerScale(prior_channels)
        self.dwconv1 = ResDWConv(total)
        self.norm1 = LayerNorm2d(total)
        self.fusion = nn.Sequential(
            DWConv(total),
            build_bn(total, **norm_cfg),
            nn.GELU(),
            PointwiseConv(total, channels),
            GRN(channels),
        )
        self.gate = nn.Sequential(*conv_bn(channels, channels), nn.SiLU())
        self.lepe = nn.Sequential(
            DilatedReparamConv(
                channels, kernel_size, norm_cfg, deploy, depthwise_backend
            ),
            build_bn(channels, **norm_cfg),
        )
        self.weight_query = nn.Sequential(*conv_bn(channels, channels // 2))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(NUM_REGIONS),
            *conv_bn(key_channels, channels // 2),
        )
        # The logits of both kernels, from the affinities to the regions.
        self.weight_proj = nn.Conv2d(
            NUM_REGIONS**2, SMALL_KERNEL_SIZE**2 + kernel_size**2, 1
        )
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.zeros(groups, 2 * size - 1, 2 * size - 1))
            for size in (SMALL_KERNEL_SIZE, kernel_size)
        )
        self.dyconv_proj = nn.Sequential(*conv_bn(channels, channels))
        self.se_layer = SEModule(channels)
        self.proj = nn.Sequential(
            build_bn(channels, **norm_cfg), PointwiseConv(channels, total)
        )
        self.ls1 = LayerScale(total)
        self.dwconv2 = ResDWConv(total)
        self.norm2 = LayerNorm2d(total)
        self.mlp = nn.Sequential(
            *_feed_forward_layers(total, 3 * channels, total)
        )
        self.ls2 = LayerScale(total)
        self.drop_path = DropPath(drop_path, branches=2)

    @property
    def path(self) -> DropPath:
        return self.drop_path

    def forward(
        self,
        z: Tensor,
        initial_prior: Tensor,
        keeps: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Refine features and prior.

        Args:
            z (Tensor): Features and prior, (B, C + P, H, W).
            initial_prior (Tensor): What the Overview-Net said, (B, P, H, W).
            keeps (Sequence[Tensor | None], optional): See
                :func:`mmoverlock.models.layers.draw_paths`. Defaults to None:
                they are drawn here.

        Returns:
            Tensor: Of the shape of ``z``.
        """
        keeps = keeps or draw_paths([self.path], z)[0]
        if self._is_one_node(z):
            operands = (
                cast_as_convolutions(z),
                None if self.first else initial_prior,
                self._operands(),
                keeps,
                self.scale,
                (self.norm1.eps, self.norm2.eps),
                NUM_REGIONS,
            )
            if takes_triton('auto', operands[0], focus_block, *operands):
                return focus_block(*operands, group_of(self.lepe[1]))
        z = self.read(z, initial_prior)
        identity, z = conv_and_norm(self.dwconv1, self.norm1, z)
        y = self.proj(self.mix_and_gate(z, initial_prior))
        z = add_residual(identity, y, keeps[0], self.ls1)
        z, y = conv_and_norm(self.dwconv2, self.norm2, z)
        return _feed_forward(self.mlp, y, z, keeps[1], self.ls2)

    def mix_and_gate(self, z: Tensor, initial_prior: Tensor | None) -> Tensor:
        """ContMix and the large convolution of the fused features, gated.

        Args:
            z (Tensor): Normalized features and prior, (B, C + P, H, W).
            initial_prior (Tensor, optional): (B, P, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        fused = self.fusion(z)
        y = self.dyconv_proj(self.dynamic_conv(z, fused)) + self.lepe(fused)
        return self.se_layer(y, self.gate(fused))

    def read(self, z: Tensor, initial_prior: Tensor | None) -> Tensor:
        """The map that the block works on, of its inputs."""
        if self.first:
            return z
        if self._has_plain_scales():
            scales = *pair_of(self.x_scale), *pair_of(self.h_scale)
            return update_prior(z, initial_prior, *scales)
        priors = initial_prior.shape[1]
        x, prior = z.split((z.shape[1] - priors, priors), dim=1)
        prior = self.x_scale(prior, self.h_scale(initial_prior))
        return torch.cat([x, prior], dim=1)

    def _has_plain_scales(self) -> bool:
        scales = self.x_scale, self.h_scale
        return are_plain(scales, LayerScale, LayerScale)

    def _is_one_node(self, z: Tensor) -> bool:
        """Whether it is :func:`mmoverlock.ops.blocks.focus_block`."""
        return (
            type(self) is FocusBlock
            and _is_one_node(self, FOCUS, z)
            and self.contmix_backend in ('auto', 'triton')
            and (self.first or z.dtype == convolution_dtype(z))
            and (self.first or self._has_plain_scales())
        )

    def _operands(self) -> FocusParameters:
        def weights(layer: nn.Module) -> tuple[Tensor, ...]:
            weight, bias = pair_of(layer)
            return (weight,) if bias is None else (weight, bias)

        # Several times as fast as attributes of a module, for every step
        own = SimpleNamespace(**self._modules)
        mix_conv, mix_norm, _, mix, response = own.fusion
        expand, _, conv3, response2, reduce = own.mlp
        out_norm, out = own.proj
        conv, branches_norm = own.lepe
        _, key, key_norm = own.weight_key
        prior = ()
        if not self.first:
            prior = *pair_of(own.x_scale), *pair_of(own.h_scale)
        return FocusParameters(
            prior,
            pair_of(own.dwconv1),
            pair_of(own.norm1),
            pair_of(mix_conv),
            as_operand(mix_norm),
            pair_of(mix),
            pair_of(response, 'gamma', 'beta'),
            weights(own.weight_query[0]),
            as_operand(own.weight_query[1]),
            weights(key),
            as_operand(key_norm),
            (*pair_of(own.weight_proj), *pair_of(self, 'rpb1', 'rpb2')),
            weights(own.dyconv_proj[0]),
            as_operand(own.dyconv_proj[1]),
            conv.as_operands() or pair_of(conv.lk_origin),
            as_operand(branches_norm),
            weights(own.gate[0]),
            as_operand(own.gate[1]),
            own.se_layer.weights(),
            as_operand(out_norm),
            pair_of(out),
            pair_of(own.ls1),
            pair_of(own.dwconv2),
            pair_of(own.norm2),
            pair_of(expand),
            pair_of(conv3),
            pair_of(response2, 'gamma', 'beta'),
            pair_of(reduce),
            pair_of(own.ls2),
        )

    def dynamic_conv(self, z: Tensor, value: Tensor) -> Tensor:
        """Mix ``value`` with kernels made from ``z``.

        A map with a side shorter than the kernel is enlarged for it.

        Args:
            z (Tensor): Normalized features and prior, (B, C + P, H, W).
            value (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        size = value.shape[-2:]
        enlarged = enlarged_size(size, self.kernel_size)
        if enlarged:
            z, value = (
                F.interpolate(maps, enlarged, mode='bilinear')
                for maps in (z, value)
            )
        x, prior = z.split(self.splits, dim=1)
        mixed = self.mix(self.weight_query(x), self.weight_key(prior), value)
        if enlarged:
            mixed = F.adaptive_avg_pool2d(mixed, size)
        return mixed

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """ContMix with the weights of this block.

        Args:
            query (Tensor): The output of ``weight_query``, (B, C / 2, H, W),
                no side shorter than the kernel.
            key (Tensor): The output of ``weight_key``, (B, C / 2, 7, 7).
            value (Tensor): (B, C', H, W), C' a multiple of twice the groups.

        Returns:
            Tensor: Of the shape of ``value``.
        """
        if not computes_as(self.weight_proj, nn.Conv2d):
            raise TypeError(
                'weight_proj is a part of ContMix and takes nothing in its '
                f'place, got {type(self.weight_proj).__name__}'
            )
        return contmix(
            query,
            key,
            value,
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            (self.rpb1, self.rpb2),
            self.contmix_backend,
            self.scale,
        )


def draw_drops(blocks: Sequence[nn.Module], x: Tensor) -> list[tuple]:
    """Last arguments of blocks: what they drop, drawn at once.

    Args:
        blocks (Sequence[nn.Module]): One after the other. What has hooks, or
            a forward method of its own, gets no more arguments than a caller
            of its gives, and draws for itself.
        x (Tensor): Images, or a map of them, (B, C, H, W).

    Returns:
        list[tuple]: For each block.
    """
    kinds = RepConvBlock, FocusBlock
    takes = [any(is_plain(block, kind) for kind in kinds) for block in blocks]
    paths = [block.path for block in compress(blocks, takes)]
    drawn = iter(draw_paths(paths, x))
    return [(next(drawn),) if takes_it else () for takes_it in takes]
