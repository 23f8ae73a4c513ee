"""OverLoCK: An Overview-first-Look-Closely-next ConvNet.

Lou and Yu, CVPR 2025, https://arxiv.org/abs/2502.20087. Names of attributes
are those of the released weights; names in prose are the paper's.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import check_backend, is_compiling, takes_triton, why_not_triton
from ..ops.dynamic_conv import BACKENDS
from .blocks import FocusBlock, RepConvBlock, draw_drops
from .compilation import Regions
from .graphs import Graphs
from .layers import (
    LayerNorm2d,
    LayerScale,
    StridedConv,
    build_bn,
    convolve,
    enlarge,
    run_layers,
)
from .recomputation import recompute
from .reparam import DilatedReparamConv
from .weights import load_pretrained


@MODELS.register_module(force=True)
class OverLoCK(BaseModule):
    """The OverLoCK backbone.

    Three sub-networks (Deep-stage Decomposition): the **Base-Net** encodes
    the image to stride 16; the **Overview-Net** is one cheap further stage
    whose output, the *context prior*, says what is there; the **Focus-Net**
    looks again at strides 16 and 32, with dynamic convolutions made from that
    prior.

    ========================  ======  =======================================
    stage                     stride  modules
    ========================  ======  =======================================
    1, Base-Net               4       patch_embed1 (the stem), blocks1
    2, Base-Net               8       patch_embed2, blocks2
    3, Base-Net               16      patch_embed3, blocks3
    4, Overview-Net           32      patch_embed4, blocks4, high_level_proj
    Focus-Net                 16      sub_blocks3
    Focus-Net                 32      patch_embedx, sub_blocks4
    ========================  ======  =======================================

    Only what ``out_indices`` asks for is built and computed, so that every
    parameter gets a gradient.

    Args:
        arch (str | dict): 'xt', 't', 's' or 'b', or 'extreme-tiny', 'tiny',
            'small' or 'base', or a dict of

            - **depths** (Sequence[int]): Blocks of stages 1 to 4.
            - **channels** (Sequence[int]): Channels of stages 1 to 4.
            - **focus_depths** (Sequence[int]): Blocks of the Focus-Net.
            - **focus_heads** (Sequence[int]): Heads of the Focus-Net; each
              makes two groups of dynamic kernels.
            - **kernel_sizes** (Sequence[int], optional): Sizes of the large
              kernels of stages 1 to 4, keys of
              :data:`mmoverlock.models.reparam.BRANCHES`; the Focus-Net has
              those of stages 3 and 4. Defaults to (17, 15, 13, 7).
        in_channels (int): Channels of the input. Defaults to 3.
        out_indices (Sequence[int]): Which maps to return, increasing: 0 and 1
            are those of stages 1 and 2, 2 and 3 those of the Focus-Net at
            strides 16 and 32. Defaults to (0, 1, 2, 3).
        drop_path_rate (float): Stochastic depth rate of the last block; it
            grows linearly from 0. Defaults to 0.
        fuse_overview (bool): Add the Overview-Net's output to the last map,
            as the released detectors do. Defaults to False.
        classifier (bool): Build the released classifiers' form, for
            :class:`mmoverlock.models.classification.OverLoCKClsHead`: there
            are no output norms, and the outputs are two maps at stride 32,
            the Overview-Net's and, last, the Focus-Net's. ``out_indices`` and
            ``fuse_overview`` keep their defaults. Defaults to False.
        frozen_stages (int): What is kept in eval mode and without gradients:
            -1 nothing; 0 the stem; k up to 3 the stem and stages 1 to k of
            the Base-Net; 4 all of it, the Overview-Net and the Focus-Net. The
            layers after these, which make the outputs (``extra_norm`` and
            ``h_proj``), are always trained. Defaults to -1.
        norm_cfg (dict, optional): See
            :func:`mmoverlock.models.layers.build_bn`. Defaults to
            ``dict(type='BN')``.
        norm_eval (bool): Keep batch norms in eval mode during training.
            Defaults to False.
        with_cp (bool | Sequence[int]): Recompute blocks in the backward pass
            instead of keeping their activations: all of them, or the first so
            many of blocks1 to blocks4, sub_blocks3 and sub_blocks4. Defaults
            to False.
        deploy (bool): Build the form with merged branches, which is what
            :meth:`switch_to_deploy` leads to. Defaults to False.
        contmix_backend (str): See :func:`mmoverlock.ops.contmix`. Defaults to
            'auto'.
        depthwise_backend (str): Of the large depthwise convolutions, see
            :func:`mmoverlock.ops.backends.check_backend`. Defaults to 'auto'.
        compile (bool | dict): Whether the blocks run compiled, for images of
            any size, or arguments of ``torch.compile`` to compile them with;
            see :mod:`mmoverlock.models.compilation`. Defaults to False.
        cuda_graphs (bool | int): Whether GPUs replay what they have run for
            images of the same size before, or for how many sizes and modes
            they do; see :mod:`mmoverlock.models.graphs`. Goes with neither
            ``compile`` nor ``with_cp``. Defaults to False; True is 16.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`.

    Raises:
        ValueError: If an argument is out of its range; the message says what
            is valid.
    """

    arch_zoo = {
        ('xt', 'extreme-tiny'): dict(
            depths=(2, 2, 3, 2),
            channels=(56, 112, 256, 336),
            focus_depths=(6, 2),
            focus_heads=(4, 6),
        ),
        ('t', 'tiny'): dict(
            depths=(4, 4, 6, 2),
            channels=(64, 128, 256, 512),
            focus_depths=(12, 2),
            focus_heads=(4, 8),
        ),
        ('s', 'small'): dict(
            depths=(6, 6, 8, 3),
            channels=(64, 128, 320, 512),
            focus_depths=(16, 3),
            focus_heads=(8, 16),
        ),
        ('b', 'base'): dict(
            depths=(8, 8, 10, 4),
            channels=(80, 160, 384, 576),
            focus_depths=(20, 4),
            focus_heads=(6, 9),
        ),
    }
    kernel_sizes = (17, 15, 13, 7)  # where the arch has none
    block_groups = (
        'blocks1',
        'blocks2',
        'blocks3',
        'blocks4',
        'sub_blocks3',
        'sub_blocks4',
    )
    block_type = RepConvBlock
    focus_block_type = FocusBlock
    optional_weights = ()  # may be missing from what `init_cfg` loads
    # Modules that each step of `frozen_stages` adds, from 0 to 4.
    freezing_steps = (
        ('patch_embed1',),
        ('blocks1',),
        ('patch_embed2', 'blocks2'),
        ('patch_embed3', 'blocks3'),
        (
            'patch_embed4',
            'blocks4',
            'high_level_proj',
            'sub_blocks3',
            'patch_embedx',
            'sub_blocks4',
        ),
    )

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        fuse_overview: bool = False,
        classifier: bool = False,
        frozen_stages: int = -1,
        norm_cfg: dict | None = None,
        norm_eval: bool = False,
        with_cp: bool | Sequence[int] = False,
        deploy: bool = False,
        contmix_backend: str = 'auto',
        depthwise_backend: str = 'auto',
        compile: bool | dict = False,
        cuda_graphs: bool | int = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        arch = self._parse_arch(arch)
        norm_cfg = norm_cfg or dict(type='BN')
        self._check_arguments(
            in_channels=in_channels,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            norm_cfg=norm_cfg,
            init_cfg=init_cfg,
            fuse_overview=fuse_overview,
            classifier=classifier,
            norm_eval=norm_eval,
            deploy=deploy,
        )
        check_backend(contmix_backend, ('auto', *BACKENDS))
        check_backend(depthwise_backend)
        self.regions = Regions(compile)
        self.graphs = Graphs(cuda_graphs)
        self.in_channels = in_channels
        self.channels = tuple(arch['channels'])
        self.prior_channels = self.channels[3] // 4
        self.depths = (*arch['depths'], *arch['focus_depths'])
        self.focus_heads = tuple(arch['focus_heads'])
        self.kernel_sizes = tuple(arch.get('kernel_sizes', self.kernel_sizes))
        self.fuse_overview = fuse_overview
        self.classifier = classifier
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.checkpointed = self._parse_with_cp(with_cp)
        if self.graphs and (
            compile is not False or any(self.checkpointed.values())
        ):
            raise ValueError(
                'cuda_graphs goes with neither compile nor with_cp, got '
                f'{compile!r} and {with_cp!r}'
            )
        self.out_indices = tuple(out_indices)

        settings = dict(
            drop_path=self._drop_path_rates(drop_path_rate),
            norm_cfg=norm_cfg,
            deploy=deploy,
            depthwise_backend=depthwise_backend,
        )
        blocks = partial(self._blocks, **settings)
        focus_blocks = partial(
            self._focus_blocks, contmix_backend=contmix_backend, **settings
        )
        downsample = partial(self._downsample, norm_cfg=norm_cfg)
        channels, last = self.channels, self.out_indices[-1]
        self.patch_embed1 = self._stem(in_channels, channels[0], norm_cfg)
        self.blocks1 = blocks(0)
        if last >= 1:
            self.patch_embed2 = downsample(*channels[0:2])
            self.blocks2 = blocks(1)
        if last >= 2:
            self.patch_embed3 = downsample(*channels[1:3])
            self.blocks3 = blocks(2)
            self.patch_embed4 = downsample(*channels[2:4])
            self.blocks4 = blocks(3)
            prior_channels = self.prior_channels
            self.high_level_proj = nn.Conv2d(channels[3], prior_channels, 1)
            self.sub_blocks3 = focus_blocks(2)
        if last >= 3:
            self.patch_embedx = nn.ModuleDict(
                dict(
                    x_proj=downsample(*channels[2:4]),
                    h_proj=downsample(prior_channels, prior_channels),
                )
            )
            self.sub_blocks4 = focus_blocks(3)
        if not classifier:
            self.extra_norm = self._output_norms()
        if fuse_overview:
            self.h_proj = nn.Sequential(
                nn.Conv2d(channels[3], self.out_channels[-1], 1),
                LayerScale(self.out_channels[-1], init_value=1e-5),
            )
        self.apply(self._init_weights)
        self._freeze()

    @staticmethod
    def _stem(
        in_channels: int, out_channels: int, norm_cfg: dict
    ) -> nn.Sequential:
        """The image to the map of stage 1, at stride 4."""
        hidden = out_channels // 2
        return nn.Sequential(
            *_conv_bn(in_channels, hidden, norm_cfg),
            nn.GELU(),
            *_conv_bn(hidden, hidden, norm_cfg, stride=1),
            nn.GELU(),
            *_conv_bn(hidden, out_channels, norm_cfg),
            nn.GELU(),
            *_conv_bn(out_channels, out_channels, norm_cfg, stride=1),
        )

    @staticmethod
    def _downsample(
        in_channels: int, out_channels: int, norm_cfg: dict
    ) -> nn.Sequential:
        """A map to one of half its height and width."""
        return nn.Sequential(*_conv_bn(in_channels, out_channels, norm_cfg))

    def _drop_path_rates(self, last_rate: float) -> Iterator[float]:
        """The rate of every block, in the order of computation."""
        last = sum(self.depths) - 1
        return iter([last_rate * i / last for i in range(last + 1)])

    def _blocks(
        self, stage: int, drop_path: Iterator[float], **settings: Any
    ) -> nn.ModuleList:
        """Stage 0 to 2 of the Base-Net, or 3, the Overview-Net."""
        return nn.ModuleList(
            self.block_type(
                self.channels[stage],
                kernel_size=self.kernel_sizes[stage],
                layer_scale=stage >= 2,
                drop_path=next(drop_path),
                **settings,
            )
            for _ in range(self.depths[stage])
        )

    def _focus_blocks(
        self, stage: int, drop_path: Iterator[float], **settings: Any
    ) -> nn.ModuleList:
        """Stage 2 or 3 of the Focus-Net, as wide as that of the Base-Net."""
        return nn.ModuleList(
            self.focus_block_type(
                self.channels[stage],
                self.prior_channels,
                kernel_size=self.kernel_sizes[stage],
                heads=self.focus_heads[stage - 2],
                first=stage == 2 and i == 0,
                drop_path=next(drop_path),
                **settings,
            )
            for i in range(self.depths[stage + 2])
        )

    def _output_norms(self) -> nn.ModuleDict:
        """Those of ``out_indices``, and of the maps that others read.

        They make an output contiguous, unless the network reads it further.
        """
        normed, read = set(self.out_indices), {1}
        if self.out_indices[-1] >= 2:  # stage 3 reads the norm of output 1
            normed.add(1)
        if self.fuse_overview:
            read.add(self.out_indices[-1])
        norms = {
            str(i): LayerNorm2d(self._widths[i], contiguous=i not in read)
            for i in sorted(normed)
        }
        if self.fuse_overview:
            norms['4'] = LayerNorm2d(self.channels[3])
        return nn.ModuleDict(norms)

    @staticmethod
    def _check_arguments(
        *,
        in_channels: int,
        out_indices: Sequence[int],
        drop_path_rate: float,
        frozen_stages: int,
        norm_cfg: dict,
        init_cfg: dict | list | None,
        fuse_overview: bool,
        classifier: bool,
        **flags: bool,
    ) -> None:
        flags.update(fuse_overview=fuse_overview, classifier=classifier)
        if not _are_ints(out_indices, range(1, 5), 0, 3) or (
            sorted({*out_indices}) != [*out_indices]
        ):
            raise ValueError(
                'out_indices must be increasing whole numbers from 0 to 3, '
                f'got {out_indices!r}'
            )
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f'{name} must be True or False, got {flag!r}')
        if not _are_ints([in_channels], [1], 1):
            raise ValueError(
                'in_channels must be a positive whole number, got '
                f'{in_channels!r}'
            )
        if fuse_overview and 3 not in out_indices:
            raise ValueError(
                'fuse_overview adds to output 3, which is not in '
                f'out_indices {tuple(out_indices)}'
            )
        if classifier and (fuse_overview or len(out_indices) < 4):
            raise ValueError(
                'classifier=True has outputs of its own; it takes no '
                'out_indices but (0, 1, 2, 3) and no fuse_overview, got '
                f'{tuple(out_indices)} and {fuse_overview}'
            )
        if not _are_ints([frozen_stages], [1], -1, 4):
            raise ValueError(
                'frozen_stages must be a whole number from -1 to 4, '
                f'got {frozen_stages!r}'
            )
        if not (
            isinstance(drop_path_rate, int | float) and 0 <= drop_path_rate < 1
        ):
            raise ValueError(
                'drop_path_rate must be a number in [0, 1), '
                f'got {drop_path_rate!r}'
            )
        if not isinstance(norm_cfg, dict):
            raise ValueError(
                "norm_cfg must be a dict such as dict(type='BN'), "
                f'got {norm_cfg!r}'
            )
        cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg]
        if init_cfg is not None and not all(
            isinstance(cfg, dict) and 'type' in cfg for cfg in cfgs
        ):
            raise ValueError(
                "init_cfg must be a dict such as dict(type='Pretrained', "
                f'checkpoint=FILE), or a list of such, got {init_cfg!r}'
            )

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> dict:
        if isinstance(arch, str):
            for names, settings in cls.arch_zoo.items():
                if arch.lower() in names:
                    return settings
        if not isinstance(arch, dict):
            raise ValueError(
                f'unknown arch {arch!r}, '
                f'expected a dict or one of {sum(cls.arch_zoo, ())}'
            )
        lengths = dict(depths=4, channels=4, focus_depths=2, focus_heads=2)
        optional = dict(kernel_sizes=4)
        if set(arch) - set(optional) != set(lengths):
            raise ValueError(
                f'arch has the keys {sorted(arch)}, expected {sorted(lengths)}'
                f' and optionally {sorted(optional)}'
            )
        for key, length in (lengths | optional).items():
            if key in arch and not _are_ints(arch[key], [length], 1):
                raise ValueError(
                    f'arch[{key!r}] must be {length} positive whole numbers, '
                    f'got {arch[key]!r}'
                )
        channels, heads = arch['channels'], arch['focus_heads']
        if channels[0] % 2 or channels[3] % 4:
            raise ValueError(
                "arch['channels'] must start with an even number and end "
                f'with a multiple of 4, got {channels}'
            )
        for width, head in zip(channels[2:], heads, strict=True):
            if width % (4 * head):
                raise ValueError(
                    f'{head} Focus-Net heads need a multiple of {4 * head} '
                    f"channels, got {width} in arch['channels'] {channels}"
                )
        return arch

    def _parse_with_cp(self, with_cp: bool | Sequence[int]) -> dict:
        """Number of recomputed blocks in each group of blocks."""
        if isinstance(with_cp, bool):
            with_cp = [with_cp * depth for depth in self.depths]
        if not _are_ints(with_cp, [len(self.block_groups)], 0):
            raise ValueError(
                'with_cp must be a bool or a number for each of '
                f'{self.block_groups}, got {with_cp!r}'
            )
        return dict(zip(self.block_groups, with_cp, strict=True))

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says.

        What it names as ``Pretrained`` is loaded by
        :func:`mmoverlock.models.weights.load_pretrained`.
        """
        init_cfg, done = self.init_cfg, self.is_init
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        files = [cfg for cfg in cfgs if 'Pretrained' in str(cfg['type'])]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in files]
        super().init_weights()
        self.init_cfg = init_cfg
        for cfg in [] if done else files:
            load_pretrained(self, cfg['checkpoint'], cfg.get('prefix'))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        """Channels of the four maps; the Focus-Net's carry the prior."""
        first, second, third, fourth = self.channels
        prior = self.prior_channels
        return first, second, third + prior, fourth + prior

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output, as a neck's ``in_channels``."""
        if self.classifier:
            return self.channels[3], self._widths[3]
        return tuple(self._widths[i] for i in self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride of each output in pixels of the input."""
        if self.classifier:
            return 32, 32
        return tuple(4 * 2**i for i in self.out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature pyramid.

        Args:
            x (Tensor): Images, (B, in_channels, H, W).

        Returns:
            tuple[Tensor]: A contiguous (B, C, H / stride, W / stride) map,
            rounded up, for each of ``out_indices``; as a classifier, the
            Overview-Net's and the Focus-Net's last maps.

        Raises:
            ValueError: If the input is of another shape or no floating-point
                numbers, or too small for batch norms to be trained on.
        """
        self._check_input(x)
        if not is_compiling():
            _say_backend(x.device)
        return self.graphs(self, self._pyramid, x)

    def _pyramid(self, x: Tensor) -> tuple[Tensor, ...]:
        drops = self._draw_drops(x)
        maps = self.base_net(x, drops)
        if self.out_indices[-1] >= 2:
            overview = self.overview_net(maps[2], drops)
            maps[2:] = self.focus_net(maps[2], overview, drops)
        if self.classifier:
            outs = [overview, maps[3]]
        else:
            outs = [
                # The Base-Net has normalized output 1 for itself.
                maps[i] if i == 1 else self.extra_norm[str(i)](maps[i])
                for i in self.out_indices
            ]
        if self.fuse_overview:
            overview = self.extra_norm['4'](overview)
            outs[-1] = outs[-1] + self.h_proj(overview)
        # Other memory formats are misread by mmcv's operators, in silence.
        return tuple(out.contiguous() for out in outs)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(
                f'expected images of shape (B, {self.in_channels}, H, W), H '
                f'and W at least 1, got {tuple(x.shape)}'
            )
        if not x.is_floating_point():
            raise ValueError(f'expected floating-point images, got {x.dtype}')
        if not self.training:
            return
        stride = (4, 8, 32, 32)[self.out_indices[-1]]  # of the smallest map
        rows, columns = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
        values = len(x) * rows * columns
        if values < 2 and any(
            isinstance(module, nn.BatchNorm2d) and module.training
            for module in self.modules()
        ):
            raise ValueError(
                'batch norms need more than one value per channel to train, '
                f'and {tuple(x.shape)} is {values} at stride {stride}: use '
                'larger images, more of them or norm_eval=True'
            )

    def _draw_drops(self, x: Tensor) -> dict[str, list[tuple]]:
        """See :func:`draw_drops`, of the blocks of each group."""
        groups = [name for name in self.block_groups if hasattr(self, name)]
        stages = [getattr(self, name) for name in groups]
        drawn = iter(draw_drops([*chain(*stages)], x))
        return {
            name: [*islice(drawn, len(stage))]
            for name, stage in zip(groups, stages, strict=True)
        }

    def base_net(self, x: Tensor, drops: dict | None = None) -> list[Tensor]:
        """Images to the maps of stages 1 to 3, as far as they are needed.

        The map of stage 2 is normalized, unless for a classifier: in the
        released dense predictors, stage 3 reads it after its output norm.

        Args:
            x (Tensor): Images, (B, in_channels, H, W).
            drops (dict, optional): Last arguments of the blocks of each group,
                see :func:`mmoverlock.models.blocks.draw_drops`, as of the
                other nets. Defaults to None: every block draws for itself.
        """
        if not takes_triton('auto', x):  # whose convolutions lay it out
            # The layout in which depthwise convolutions and norms are fast.
            x = x.contiguous(memory_format=torch.channels_last)
        x = run_layers(self.patch_embed1, x)
        maps = [self._run('blocks1', drops, x)]
        if self.out_indices[-1] >= 1:
            x = run_layers(self.patch_embed2, maps[0])
            x = self._run('blocks2', drops, x)
            maps.append(x if self.classifier else self.extra_norm['1'](x))
        if self.out_indices[-1] >= 2:
            x = run_layers(self.patch_embed3, maps[1])
            maps.append(self._run('blocks3', drops, x))
        return maps

    def overview_net(self, x: Tensor, drops: dict | None = None) -> Tensor:
        """The stride 16 map of the Base-Net to the overview at stride 32."""
        return self._run('blocks4', drops, run_layers(self.patch_embed4, x))

    def focus_net(
        self, x: Tensor, overview: Tensor, drops: dict | None = None
    ) -> list[Tensor]:
        """Look again, knowing what is there.

        Args:
            x (Tensor): The map of stage 3 of the Base-Net, at stride 16.
            overview (Tensor): The output of the Overview-Net, at stride 32.
            drops (dict, optional): See :meth:`base_net`.

        Returns:
            list[Tensor]: Maps at strides 16 and 32 (if needed), features and
            context prior in one.
        """
        prior = convolve(self.high_level_proj, overview)
        upsampled = enlarge(prior, x.shape[-2:])
        z = torch.cat([x, upsampled], dim=1)
        maps = [self._run('sub_blocks3', drops, z, upsampled)]
        if self.out_indices[-1] >= 3:
            x, updated = maps[0].split([x.shape[1], prior.shape[1]], dim=1)
            x = run_layers(self.patch_embedx['x_proj'], x)
            updated = run_layers(self.patch_embedx['h_proj'], updated)
            z = torch.cat([x, updated], dim=1)
            maps.append(self._run('sub_blocks4', drops, z, prior))
        return maps

    def _run(
        self, group: str, drops: dict | None, x: Tensor, *args: Tensor
    ) -> Tensor:
        with self.regions.settings():
            for i, block in enumerate(getattr(self, group)):
                drawn = drops[group][i] if drops else ()
                operands = block, x, *args, *drawn
                if i < self.checkpointed[group] and torch.is_grad_enabled():
                    x = recompute(block, self.regions, *operands)
                else:
                    x = self.regions(*operands)
        return x

    def train(self, mode: bool = True) -> 'OverLoCK':
        """Set the mode; frozen stages stay in eval mode."""
        super().train(mode)
        if mode:
            self._freeze()
        return self

    def _freeze(self) -> None:
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        for step in self.freezing_steps[: self.frozen_stages + 1]:
            for name in step:
                if hasattr(self, name):
                    getattr(self, name).eval().requires_grad_(False)

    def switch_to_deploy(self) -> 'OverLoCK':
        """Merge the reparameterized branches in place, for inference.

        Raises:
            TypeError: If a layer of a branch has hooks or has been replaced.
        """
        for module in self.modules():
            if isinstance(module, DilatedReparamConv):
                module.switch_to_deploy()
        return self

    def get_layer_depth(
        self, param_name: str, prefix: str = ''
    ) -> tuple[int, int]:
        """Depth of a parameter, for layer-wise learning rate decay.

        The stem is layer 0, then every block is a layer, in the order of
        computation; a downsampling layer goes with the block behind it. What
        comes after the blocks, in this backbone or behind it, is last.

        Args:
            param_name (str): Name of a parameter.
            prefix (str): Name of the backbone in it, such as 'backbone.'.
                Defaults to ''.

        Returns:
            tuple[int, int]: Its layer and the number of layers.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        name, _, rest = param_name[len(prefix) :].partition('.')
        if name == 'patch_embed1':
            return 0, num_layers
        group = {
            'patch_embed2': 'blocks2',
            'patch_embed3': 'blocks3',
            'patch_embed4': 'blocks4',
            'high_level_proj': 'sub_blocks3',
            'patch_embedx': 'sub_blocks4',
        }.get(name, name)
        if group not in self.block_groups:
            return num_layers - 1, num_layers
        before = sum(self.depths[: self.block_groups.index(group)])
        index = int(rest.partition('.')[0]) if group == name else 0
        return 1 + before + index, num_layers


def _conv_bn(
    in_channels: int, out_channels: int, norm_cfg: dict, stride: int = 2
) -> tuple[nn.Module, nn.Module]:
    conv = StridedConv if stride > 1 else nn.Conv2d
    return (
        conv(in_channels, out_channels, 3, stride, 1, bias=False),
        build_bn(out_channels, **norm_cfg),
    )


@lru_cache
def _say_backend(device: torch.device) -> None:
    reason = why_not_triton(device)
    form = 'kernels of Triton' if reason is None else 'plain PyTorch'
    why = '' if reason is None else f': {reason}'
    print_log(f'OverLoCK on {device} runs {form}{why}', logger='current')


def _are_ints(
    values: Any, lengths: Sequence[int], low: int, high: float = math.inf
) -> bool:
    """Whether values are so many whole numbers from low to high."""
    return (
        isinstance(values, Sequence)
        and len(values) in lengths
        and all(isinstance(v, int) and low <= v <= high for v in values)
    )
