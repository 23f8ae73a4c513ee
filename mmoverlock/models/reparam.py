"""The dilated reparameterized convolution (UniRepLKNet, CVPR 2024)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops import Branch, depthwise_conv2d, sum_of_branches, takes_triton
from ..ops.depthwise import sum_by_kernels
from .layers import NORMS, as_operand, build_bn, group_of, is_plain

# Kernel size: (size, dilation) of the branches beside the large kernel.
BRANCHES = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def _depthwise(
    channels: int,
    size: int,
    dilation: int = 1,
    bias: bool = False,
    device: str | None = None,
) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        channels,
        size,
        padding=size // 2 * dilation,
        dilation=dilation,
        groups=channels,
        bias=bias,
        device=device,
    )


class DilatedReparamConv(nn.Module):
    """A large depthwise convolution trained with small dilated companions.

    Every branch is a depthwise convolution and a batch norm; their sum is
    the output. With the running statistics this is one depthwise convolution
    with bias, which is what the deploy form holds.

    Args:
        channels (int): Channels of the map.
        kernel_size (int): A key of ``BRANCHES``.
        norm_cfg (dict): Batch norm of the branches.
        deploy (bool): Build the merged form. Defaults to False.
        backend (str): See :func:`mmoverlock.ops.backends.check_backend`.
            Defaults to 'auto'.

    Raises:
        ValueError: If there are no branches for ``kernel_size``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        norm_cfg: dict,
        deploy: bool = False,
        backend: str = 'auto',
    ):
        super().__init__()
        self.backend = backend
        if kernel_size not in BRANCHES:
            raise ValueError(
                f'no dilated branches for kernel size {kernel_size}, '
                f'expected one of {list(BRANCHES)}'
            )

        self.lk_origin = _depthwise(channels, kernel_size, bias=deploy)
        # Names of every branch's convolution and batch norm.
        self.branches = []
        if deploy:
            return
        self.origin_bn = build_bn(channels, **norm_cfg)
        self.branches.append(('lk_origin', 'origin_bn'))
        for size, dilation in BRANCHES[kernel_size]:
            names = (
                f'dil_conv_k{size}_{dilation}',
                f'dil_bn_k{size}_{dilation}',
            )
            self.add_module(names[0], _depthwise(channels, size, dilation))
            self.add_module(names[1], build_bn(channels, **norm_cfg))
            self.branches.append(names)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        if not self.is_as_built():
            if not self.branches:
                return self.lk_origin(x)
            return sum(norm(conv(x)) for conv, norm in self._branches())
        if not self.branches:
            return self._convolve(
                x, self.lk_origin.weight, self.lk_origin.bias
            )
        norms = [norm for _, norm in self._branches()]
        if not any(norm.training for norm in norms):
            return self._convolve(x, *self.merge())
        groups = {*map(group_of, norms)}
        branches, backend = self._summable_branches(x, norms, groups)
        if backend:
            return sum_of_branches(x, branches, backend, *groups)
        return sum(
            norm(self._convolve(x, conv.weight, None, conv.dilation[0]))
            for conv, norm in self._branches()
        )

    def is_as_built(self) -> bool:
        """See :func:`mmoverlock.models.layers.is_plain`, of the layers."""
        if not self.branches:
            return is_plain(self.lk_origin, nn.Conv2d)
        return all(
            is_plain(conv, nn.Conv2d)
            and conv.bias is None
            and any(is_plain(norm, kind) for kind in NORMS)
            and norm.affine
            and norm.track_running_stats
            for conv, norm in self._branches()
        )

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1
    ) -> Tensor:
        return depthwise_conv2d(
            x, weight, bias, dilation, backend=self.backend
        )

    def _branches(self) -> Iterator[tuple[nn.Conv2d, nn.Module]]:
        for conv, norm in self.branches:
            # Twice as fast as attributes, for every step
            yield self._modules[conv], self._modules[norm]

    def _summable_branches(
        self, x: Tensor, norms: list[nn.Module], groups: set
    ) -> tuple[list[Branch] | None, str | None]:
        """Branches that one operator sums up, and its backend; or None."""
        if not all(type(norm) in NORMS and norm.training for norm in norms):
            return None, None
        branches = self.as_operands()
        if takes_triton(self.backend, x, sum_by_kernels, x, branches):
            possible, backend = len(groups) == 1, 'triton'
        else:
            possible, backend = groups == {None}, 'reference'
            possible &= x.device.type == 'cpu'
            possible &= all(norm.momentum is not None for norm in norms)
        return branches, backend if possible else None

    def as_operands(self) -> list[Branch]:
        """The branches as operators take them."""
        branches = []
        for conv, norm in self._branches():
            *tensors, momentum, eps = as_operand(norm)
            branches.append(
                Branch(conv.weight, *tensors, conv.dilation[0], momentum, eps)
            )
        return branches

    def merge(self) -> tuple[Tensor, Tensor]:
        """The one convolution that the branches add up to in eval mode.

        Returns:
            tuple[Tensor, Tensor]: Weight (C, 1, K, K) and bias (C, ).
        """
        convs, norms = zip(*self._branches(), strict=True)
        scales, shifts, means, variances = (
            torch.stack([getattr(norm, name) for norm in norms])
            for name in ('weight', 'bias', 'running_mean', 'running_var')
        )
        eps = [norm.eps for norm in norms]
        same = len({*eps}) == 1
        variances = variances + (
            eps[0] if same else variances.new_tensor(eps)[:, None]
        )
        scales = scales * variances.rsqrt()
        # Shifts as they are would get gradients that share their memory
        bias = (means * scales - shifts).sum(0).neg()
        merged = torch.zeros_like(self.lk_origin.weight)
        center = merged.shape[-1] // 2
        for conv, scale in zip(convs, scales, strict=True):
            # A dilated kernel is a large one with zeros between its taps.
            reach = conv.padding[0]
            taps = slice(center - reach, center + reach + 1, conv.dilation[0])
            part = conv.weight * scale[:, None, None, None]
            merged[..., taps, taps].add_(part)
        return merged, bias.to(merged.dtype)

    def drop_dilated(self) -> None:
        """Leave the large kernel and its batch norm alone."""
        for name in sum(self.branches[1:], ()):
            delattr(self, name)
        del self.branches[1:]

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Replace the branches by the convolution they add up to.

        Raises:
            TypeError: If a layer of them has hooks or is of another kind.
        """
        if not self.branches:
            return
        if not self.is_as_built():
            raise TypeError(
                'branches of which a layer has hooks or has been replaced '
                'cannot be merged'
            )
        weight, bias = self.merge()
        is_trained = any(p.requires_grad for p in self.parameters())
        if is_parametrized(self.lk_origin):
            # Copies are of the same class, which removing would change
            self.lk_origin = _depthwise(*weight.shape[::2], device='meta')
        for conv, bn in self.branches:
            delattr(self, bn)
            if conv != 'lk_origin':
                delattr(self, conv)
        self.branches.clear()
        self.lk_origin.weight = nn.Parameter(weight, is_trained)
        self.lk_origin.bias = nn.Parameter(bias, is_trained)
