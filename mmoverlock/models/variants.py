"""The network with a part removed or with another token mixer.

For ablations: what each part of the network brings, and how ContMix compares
with other mixers in its place. Every variant is a class that changes the block
it is mixed into; the network itself has no switches. Classes can be combined
where that makes sense; :func:`check_removals` says where it does not.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import contmix
from ..ops.dynamic_conv import tiled
from ..ops.dynamic_conv.reference import bias_starts, window_starts
from .blocks import NUM_REGIONS, SMALL_KERNEL_SIZE, FocusBlock, RepConvBlock
from .layers import PointwiseConv, SEModule, build_bn
from .overlock import OverLoCK
from .reparam import DilatedReparamConv


class Variant:
    """Changes to the block that a class is mixed into."""


class VariantFocusBlock(Variant, FocusBlock):
    """Changes to a block of the Focus-Net."""


class Constant(nn.Module):
    """In the place of a part that is removed.

    Args:
        value (int | None): What is computed instead of a map.
    """

    def __init__(self, value: int | None):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> int | None:
        return self.value


# ----------------------------------------------------------------- removals


class WithoutKernelGuidance(VariantFocusBlock):
    """No guidance at kernel weight level: keys are made from the features."""

    def __init__(self, channels: int, prior_channels: int, **kwargs):
        super().__init__(
            channels, prior_channels, key_channels=channels, **kwargs
        )

    def dynamic_conv(self, z: Tensor, value: Tensor) -> Tensor:
        x = z[:, : self.splits[0]]
        return super().dynamic_conv(torch.cat([x, x], dim=1), value)


class WithoutOverview(WithoutKernelGuidance):
    """No Deep-stage Decomposition: a plain pyramid of four stages.

    There is no Overview-Net, no context prior and no auxiliary loss. Stage 3
    is ``blocks3`` and, without downsampling, ``sub_blocks3``; stage 4 is
    ``sub_blocks4``. Keys are made from the features.
    """

    def __init__(self, channels: int, prior_channels: int, **kwargs):
        super().__init__(channels, 0, **kwargs | dict(first=True))


class WithoutFeatureGuidance(VariantFocusBlock):
    """No guidance at feature level: the prior is not concatenated.

    Blocks work on features alone and carry no prior; the keys of all are made
    from P0.
    """

    def __init__(self, channels: int, prior_channels: int, **kwargs):
        kwargs.update(first=True, key_channels=prior_channels)
        super().__init__(channels, 0, **kwargs)

    def mix_and_gate(self, z: Tensor, initial_prior: Tensor) -> Tensor:
        fused = self.fusion(z)
        guides = torch.cat([z, initial_prior], dim=1)
        y = self.dyconv_proj(self.dynamic_conv(guides, fused))
        return self.se_layer(y + self.lepe(fused), self.gate(fused))


class WithoutInitialPrior(VariantFocusBlock):
    """The prior is updated without P0: as it comes from the last block."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | dict(first=True))


class WithoutPriorUpdate(WithoutInitialPrior):
    """The prior stays P0: every block reads it instead of the updated one."""

    def read(self, z: Tensor, initial_prior: Tensor) -> Tensor:
        return torch.cat([z[:, : self.splits[0]], initial_prior], dim=1)


class WithoutGate(VariantFocusBlock):
    """No gate on what ContMix and its dilated branch give."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = Constant(None)


class WithoutLePE(VariantFocusBlock):
    """No dilated reparameterized convolution beside ContMix."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lepe = Constant(0)


class WithoutSE(Variant):
    """No squeeze and excitation, in all blocks of all three sub-networks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for module in [*self.modules()]:
            for name, child in module.named_children():
                if isinstance(child, SEModule):
                    setattr(module, name, NoExcitation())


class NoExcitation(nn.Module):
    """In the place of :class:`SEModule`; what is left is the gate."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x if gate is None else gate * x

    def scale_and_shift(self, x: Tensor) -> tuple[None, None]:
        return None, None


class WithoutDilated(Variant):
    """No dilated branches: one plain large kernel and its batch norm.

    In all blocks of all three sub-networks.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, DilatedReparamConv):
                module.drop_dilated()


class WithoutSmallKernel(VariantFocusBlock):
    """ContMix with the K x K kernel only, for all channels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        regions = self.weight_proj.in_channels
        self.weight_proj = nn.Conv2d(regions, self.kernel_size**2, 1)
        del self.rpb1

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # ContMix has two kernels: here the small one is of a single tap, which
        # softmax makes 1, and mixes zeros.
        weight = F.pad(self.weight_proj.weight.flatten(1), (0, 0, 1, 0))
        mixed = contmix(
            query,
            key,
            torch.cat([torch.zeros_like(value), value], dim=1),
            weight,
            F.pad(self.weight_proj.bias, (1, 0)),
            (self.rpb2.new_zeros(len(self.rpb2), 1, 1), self.rpb2),
            self.contmix_backend,
            self.scale,
        )
        return mixed[:, value.shape[1] :]


class WithoutAuxiliaryLoss(Variant):
    """No loss on the Overview-Net: a classifier has the last map only.

    No block changes.
    """


# ------------------------------------------------------------------- mixers


class ContMix(VariantFocusBlock):
    """ContMix (section 3.3) with another kernel size or number of regions.

    Args:
        mixer (dict): ``kernel_size`` K, odd, by default that of the stage, and
            ``num_regions`` S, per axis, by default 7.
    """

    sizes = {'kernel_size': SMALL_KERNEL_SIZE, 'num_regions': 1}

    def __init__(self, *args, mixer: dict, **kwargs):
        super().__init__(*args, **kwargs)
        size = mixer.get('kernel_size', self.kernel_size)
        regions = mixer.get('num_regions', NUM_REGIONS)
        self.kernel_size = size
        self.weight_key[0] = nn.AdaptiveAvgPool2d(regions)
        taps = SMALL_KERNEL_SIZE**2 + size**2
        self.weight_proj = nn.Conv2d(regions**2, taps, 1)
        shape = len(self.rpb2), 2 * size - 1, 2 * size - 1
        self.rpb2 = nn.Parameter(torch.zeros(shape))


class NeighborhoodAttention(ContMix):
    """Neighborhood attention (Hassani et al., CVPR 2023) in ContMix's windows.

    Logits are products of a position's query with the keys of the positions in
    its window, in place of a linear map of its affinities to regions. All else
    is ContMix's: what queries and keys are made from, groups, position biases,
    and two sizes of windows, each for half of the channels.

    Args:
        mixer (dict): ``kernel_size``, odd, by default that of the stage.
    """

    sizes = {'kernel_size': SMALL_KERNEL_SIZE}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight_key[0] = nn.Identity()
        del self.weight_proj

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        exact = self.contmix_backend == 'reference'
        small, large = value.chunk(2, dim=1)
        query = query * self.scale
        mixed = (
            attend(query, key, small, self.rpb1, exact),
            attend(query, key, large, self.rpb2, exact),
        )
        return torch.cat(mixed, dim=1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, exact: bool
) -> Tensor:
    """Attention of every position to its window.

    Args:
        query (Tensor): (B, G * c, H, W).
        key (Tensor): (B, G * c, H, W).
        value (Tensor): (B, C, H, W), C a multiple of G.
        table (Tensor): Relative position biases, (G, 2K - 1, 2K - 1).
        exact (bool): Whether windows are gathered, which takes K^2 copies of
            keys and values, or attention is that of tiles, masked.

    Returns:
        Tensor: (B, C, H, W).
    """
    groups = len(table)
    size = (table.shape[-1] + 1) // 2
    height, width = value.shape[-2:]
    plan = tiled._plan(height, width, size, value.device, False)
    if exact:
        plan = _each_window(plan, height, width, size)

    def by_tile(maps: Tensor, index: Tensor) -> Tensor:
        # to (B, G * tiles, positions of each, C / G)
        maps = maps.flatten(2).unflatten(1, (groups, -1)).mT
        return maps[:, :, index].flatten(1, 2)

    bias = table.flatten(1)[:, plan.windows][:, plan.bias]
    bias = bias.unflatten(1, (len(plan.regions), -1))
    if plan.taps is not None:  # what a tile sees and a window does not
        shape = *bias.shape[:3], plan.regions.shape[1]
        masked = bias.new_full(shape, -torch.inf)
        bias = masked.scatter(-1, plan.taps.expand_as(bias), bias)
    mixed = F.scaled_dot_product_attention(
        by_tile(query, plan.positions.view(bias.shape[1:3])),
        by_tile(key, plan.regions),
        by_tile(value, plan.regions),
        bias.flatten(0, 1),
        scale=1.0,
    )
    mixed = mixed.unflatten(1, bias.shape[:2]).flatten(2, 3)
    return mixed[:, :, plan.order].mT.reshape(value.shape)


def _each_window(
    plan: tiled._Plan, height: int, width: int, size: int
) -> tiled._Plan:
    """A plan by which every position is a tile, and its window the region."""
    axes = [(length, torch.arange(size)) for length in (height, width)]
    rows, cols = (window_starts(n, size)[:, None] + tap for n, tap in axes)
    shifts = [bias_starts(n, size)[:, None] for n, _ in axes]
    device = plan.order.device
    positions = torch.arange(height * width, device=device)
    return plan._replace(
        positions=positions,
        order=positions,
        regions=tiled._grid(rows, cols, width).to(device),
        taps=None,
        bias=tiled._grid(*shifts, size).flatten().to(device),
    )


class Mixer(VariantFocusBlock):
    """A block whose mixer is a module on what ContMix would mix.

    It has no queries, keys and dynamic kernels; the prior guides it at feature
    level only.
    """

    sizes = {'kernel_size': 1}  # that may be set, and the least of each
    defaults = {}  # of these, where they are not those of the stage

    def __init__(self, channels: int, *args, mixer: dict, **kwargs):
        super().__init__(channels, *args, **kwargs)
        groups = len(self.rpb2)
        del self.weight_query, self.weight_key, self.weight_proj
        del self.rpb1, self.rpb2
        settings = kwargs | self.defaults | mixer
        self.mixer = self.build(channels, groups, settings)

    def build(self, channels: int, groups: int, settings: dict) -> nn.Module:
        """A module from and to (B, channels, H, W).

        Args:
            channels (int): Channels of the map.
            groups (int): Groups that ContMix has.
            settings (dict): Of the block and of the mixer.
        """
        raise NotImplementedError

    def dynamic_conv(self, z: Tensor, value: Tensor) -> Tensor:
        return self.mixer(value)


class StaticConv(Mixer):
    """A static depthwise convolution, K x K, zero-padded.

    Args:
        mixer (dict): ``kernel_size``, odd, by default that of the stage.
    """

    deploy = True

    def build(self, channels: int, groups: int, settings: dict) -> nn.Module:
        return DilatedReparamConv(
            channels,
            settings['kernel_size'],
            settings['norm_cfg'],
            self.deploy or settings['deploy'],
            settings['depthwise_backend'],
        )


class DilatedReparam(StaticConv):
    """The dilated reparameterized convolution (Ding et al., CVPR 2024).

    Args:
        mixer (dict): ``kernel_size``, by default that of the stage.
    """

    deploy = False


class WindowAttention(Mixer):
    """Attention in windows, shifted in every other block (Swin Transformer).

    It is MMPretrain's, on what ContMix would mix, with half as many heads as
    ContMix has groups.

    Args:
        mixer (dict): ``window_size``, by default 7.
    """

    sizes = {'window_size': 1}
    defaults = {'window_size': 7}

    def build(self, channels: int, groups: int, settings: dict) -> nn.Module:
        module = import_module('mmpretrain.models.utils.attention')
        return module.ShiftWindowMSA(
            channels, groups // 2, settings['window_size']
        )

    def shift(self) -> None:
        """Shift the windows by half."""
        self.mixer.shift_size = self.mixer.window_size // 2

    def dynamic_conv(self, z: Tensor, value: Tensor) -> Tensor:
        size = value.shape[-2:]
        # As in Swin Transformer, windows as large as the map are not shifted.
        self.mixer.pad_small_map = min(size) < self.mixer.window_size
        tokens = value.flatten(2).mT.contiguous()
        return self.mixer(tokens, size).mT.unflatten(2, size)


class Involution(Mixer):
    """Involution (Li et al., CVPR 2021), in as many groups as ContMix.

    Kernels are made for every position, from the position alone.

    Args:
        mixer (dict): ``kernel_size``, odd, by default 7 as in its paper.
    """

    defaults = {'kernel_size': 7}

    def build(self, channels: int, groups: int, settings: dict) -> nn.Module:
        self.groups, self.window = groups, settings['kernel_size']
        kernel = nn.Sequential(
            PointwiseConv(channels, channels // 4, bias=False),
            build_bn(channels // 4, **settings['norm_cfg']),
            nn.ReLU(),
            PointwiseConv(channels // 4, groups * self.window**2),
        )
        return nn.ModuleDict(dict(kernel=kernel))

    def dynamic_conv(self, z: Tensor, value: Tensor) -> Tensor:
        kernels = self.mixer['kernel'](value).flatten(2)
        kernels = kernels.unflatten(1, (self.groups, -1))
        windows = F.unfold(value, self.window, padding=self.window // 2)
        windows = windows.unflatten(1, (self.groups, -1, self.window**2))
        mixed = torch.einsum('bgkn,bgckn->bgcn', kernels, windows)
        return mixed.reshape(value.shape)


class DeformableConv(Mixer):
    """Modulated deformable convolution (Zhu et al., CVPR 2019).

    It is MMCV's, in the groups of ContMix, with offsets for all channels in
    one. It cannot be exported.

    Args:
        mixer (dict): ``kernel_size``, odd, by default 3.
    """

    defaults = {'kernel_size': 3}

    def build(self, channels: int, groups: int, settings: dict) -> nn.Module:
        module = import_module('mmcv.ops')
        size = settings['kernel_size']
        return module.ModulatedDeformConv2dPack(
            channels, channels, size, padding=size // 2, groups=groups
        )

    def dynamic_conv(self, z: Tensor, value: Tensor) -> Tensor:
        if value.is_meta:
            # MMCV's operator does not run there; a plain convolution has the
            # same shape and, sampling apart, the same cost.
            conv = self.mixer
            conv.conv_offset(value)
            sizes = conv.stride, conv.padding, conv.dilation, conv.groups
            return F.conv2d(value, conv.weight, conv.bias, *sizes)
        # Other memory formats are misread.
        return self.mixer(value.contiguous())


# ------------------------------------------------------------------ network

REMOVALS = {
    'overview': WithoutOverview,
    'feature_guidance': WithoutFeatureGuidance,
    'kernel_guidance': WithoutKernelGuidance,
    'initial_prior': WithoutInitialPrior,
    'prior_update': WithoutPriorUpdate,
    'gate': WithoutGate,
    'se': WithoutSE,
    'lepe': WithoutLePE,
    'dilated': WithoutDilated,
    'small_kernel': WithoutSmallKernel,
    'auxiliary_loss': WithoutAuxiliaryLoss,
}
MIXERS = {
    'contmix': ContMix,
    'static': StaticConv,
    'dilated_reparam': DilatedReparam,
    'neighborhood_attention': NeighborhoodAttention,
    'window_attention': WindowAttention,
    'involution': Involution,
    'deformable': DeformableConv,
}

PRIORS = 'initial_prior', 'prior_update'
GUIDANCE = 'feature_guidance', 'kernel_guidance'
OTHERS = [name for name, kind in MIXERS.items() if issubclass(kind, Mixer)]
# A removal, other removals and mixers that it does not go with, and why.
CLASHES = [
    ('overview', [*GUIDANCE, *PRIORS], 'there is no prior without it'),
    ('overview', ['auxiliary_loss'], 'there is no such loss without it'),
    ('feature_guidance', PRIORS, 'the prior is not updated without it'),
    ('feature_guidance', GUIDANCE[1:], 'remove the overview instead'),
    ('initial_prior', ['prior_update'], 'without updates the prior is P0'),
    *((name, OTHERS, 'it makes nothing from the prior') for name in GUIDANCE),
    ('small_kernel', ['neighborhood_attention', *OTHERS], 'it has none'),
    ('dilated', ['dilated_reparam'], "what remains is the mixer 'static'"),
]


@MODELS.register_module(force=True)
class OverLoCKVariant(OverLoCK):
    """OverLoCK with parts removed, or with another mixer in the Focus-Net.

    With nothing removed and the mixer 'contmix' it is :class:`OverLoCK`. The
    weights of that load into every variant by ``init_cfg``, as far as they
    fit; the log says what is left over and what keeps its initial values.

    Args:
        arch (str | dict): See :class:`OverLoCK`.
        remove (Sequence[str]): Any of ``REMOVALS``, whose classes say what is
            removed; 'auxiliary_loss' is for classifiers, which then have the
            Focus-Net's map only, for
            :class:`mmoverlock.models.classification.OverLoCKFocusClsHead`.
            Defaults to ().
        mixer (str | dict): One of ``MIXERS``, or a dict of it as ``type`` and
            of what its class takes. Defaults to 'contmix'.
        kwargs (dict): See :class:`OverLoCK`.

    Raises:
        ValueError: If a name or setting is unknown, or the combination makes
            no sense; the message says why.
        ImportError: If the mixer needs a package that is not there.
    """

    def __init__(
        self,
        arch: str | dict,
        remove: Sequence[str] = (),
        mixer: str | dict = 'contmix',
        **kwargs,
    ):
        self.remove = remove
        self.mixer = mixer if isinstance(mixer, dict) else dict(type=mixer)
        self.settings = dict(kwargs, arch=arch)
        super().__init__(arch, **kwargs)
        # Nothing would read these
        if 'overview' in remove:
            for name in ('patch_embed4', 'high_level_proj'):
                self._modules.pop(name, None)
        if not self._carries_prior and hasattr(self, 'patch_embedx'):
            del self.patch_embedx['h_proj']

    def _check_arguments(
        self, *, classifier: bool, fuse_overview: bool, **kwargs
    ) -> None:
        kwargs.update(classifier=classifier, fuse_overview=fuse_overview)
        super()._check_arguments(**kwargs)
        check_mixer(self.mixer)
        check_removals(self.remove, self.mixer['type'])
        if fuse_overview and 'overview' in self.remove:
            raise ValueError('fuse_overview=True: there is no overview to add')
        if not classifier and 'auxiliary_loss' in self.remove:
            raise ValueError(
                "remove=['auxiliary_loss'] is for classifier=True; other "
                'losses are those of the heads, so leave out a head instead'
            )

    @property
    def block_type(self) -> type[RepConvBlock]:
        """The class of the blocks of the Base-Net and the Overview-Net."""
        kinds = [k for k in self._removed if not issubclass(k, FocusBlock)]
        return _compose(*kinds, RepConvBlock)

    @property
    def focus_block_type(self) -> Callable[..., FocusBlock]:
        """The class of the blocks of the Focus-Net."""
        if self.mixer == dict(type='contmix'):
            return _compose(*self._removed, FocusBlock)
        mixer = MIXERS[self.mixer['type']]
        kind = _compose(*self._removed, mixer, FocusBlock)
        return partial(kind, mixer=self.mixer)

    @property
    def _removed(self) -> list[type]:
        return [REMOVALS[name] for name in sorted({*self.remove})]

    @property
    def _carries_prior(self) -> bool:
        """Whether a prior goes from one block to the next."""
        removals = {'overview', 'feature_guidance', 'prior_update'}
        return removals.isdisjoint(self.remove)

    @property
    def _is_alone(self) -> bool:
        """Whether there is only the Focus-Net's map for a classifier."""
        removals = {'overview', 'auxiliary_loss'}
        return self.classifier and not removals.isdisjoint(self.remove)

    def _parse_arch(self, arch: str | dict) -> dict:
        arch = super()._parse_arch(arch)
        if 'overview' in self.remove:
            arch = dict(arch, depths=(*arch['depths'][:3], 0))
        return arch

    def _focus_blocks(
        self, stage: int, drop_path: Iterator[float], **settings
    ) -> nn.ModuleList:
        blocks = super()._focus_blocks(stage, drop_path, **settings)
        for block in blocks[1::2]:
            if isinstance(block, WindowAttention):
                block.shift()
        return blocks

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        OverLoCK._init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif hasattr(module, 'conv_offset'):
            nn.init.zeros_(module.conv_offset.weight)

    @property
    def optional_weights(self) -> tuple[str, ...]:
        """Names of what the full network has not, or in another shape."""
        with torch.device('meta'):
            full = OverLoCK(**self.settings).state_dict()
        return tuple(
            name
            for name, weight in self.state_dict().items()
            if name not in full or full[name].shape != weight.shape
        )

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        if not {'overview', 'feature_guidance'}.isdisjoint(self.remove):
            return self.channels
        return super()._widths

    @property
    def out_channels(self) -> tuple[int, ...]:
        return super().out_channels[self._is_alone :]

    @property
    def out_strides(self) -> tuple[int, ...]:
        return super().out_strides[self._is_alone :]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :class:`OverLoCK`."""
        return super().forward(x)[self._is_alone :]

    def overview_net(self, x: Tensor, drops: dict | None = None) -> Tensor:
        """See :class:`OverLoCK`; without it, the map goes on as it is."""
        if 'overview' in self.remove:
            return x
        return super().overview_net(x, drops)

    def focus_net(
        self, x: Tensor, overview: Tensor, drops: dict | None = None
    ) -> list[Tensor]:
        """See :class:`OverLoCK`."""
        if self._carries_prior:
            return super().focus_net(x, overview, drops)
        prior = upsampled = None
        if 'overview' not in self.remove:
            prior = self.high_level_proj(overview)
            upsampled = F.interpolate(prior, x.shape[-2:], mode='bilinear')
        maps = [self._run('sub_blocks3', drops, x, upsampled)]
        if self.out_indices[-1] >= 3:
            x = self.patch_embedx['x_proj'](maps[0][:, : x.shape[1]])
            maps.append(self._run('sub_blocks4', drops, x, prior))
        return maps


@cache
def _compose(*kinds: type) -> type:
    """One class of several, with the name of the last."""
    if len(kinds) == 1:
        return kinds[0]
    return type(kinds[-1].__name__, kinds, {'__module__': __name__})


def check_mixer(mixer: dict) -> None:
    """Check a mixer and its settings.

    Raises:
        ValueError: If one is unknown or out of its range.
    """
    kind = MIXERS.get(mixer.get('type'))
    if kind is None:
        raise ValueError(
            f'mixer must be one of {[*MIXERS]}, or a dict with one as type, '
            f'got {mixer!r}'
        )
    for name, value in mixer.items():
        if name == 'type':
            continue
        if name not in kind.sizes:
            raise ValueError(
                f'the mixer {mixer["type"]!r} takes {[*kind.sizes]}, '
                f'not {name!r}'
            )
        least, odd = kind.sizes[name], name == 'kernel_size'
        if not isinstance(value, int) or value < least or odd > value % 2:
            raise ValueError(
                f'{name} of the mixer {mixer["type"]!r} must be '
                f'{"odd and " * odd}at least {least}, got {value!r}'
            )


def check_removals(remove: Sequence[str], mixer: str) -> None:
    """Check that a combination of removals and a mixer makes sense.

    Raises:
        ValueError: If it does not; the message says why.
    """
    if isinstance(remove, str) or not {*remove} <= REMOVALS.keys():
        raise ValueError(
            f'remove must be a list of any of {[*REMOVALS]}, got {remove!r}'
        )
    for name, others, reason in CLASHES:
        clashing = [other for other in others if other in (*remove, mixer)]
        if name in remove and clashing:
            raise ValueError(
                f'removing {name!r} does not go with {clashing}: {reason}'
            )
