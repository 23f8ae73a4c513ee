"""Tiny backbones, blocks and images, the same every time."""

import torch
from tiny import DEEPER, randomize

from mmoverlock.models import OverLoCK


def backbone(arch=DEEPER, **options):
    """A backbone, none of whose layers is the identity."""
    torch.manual_seed(0)
    return randomize(OverLoCK(arch, **options))


def make_block(kind, *channels, **options):
    """A block, by default with kernels of size 5, that drops no paths."""
    settings = dict(kernel_size=5, drop_path=0.0, norm_cfg=dict(type='BN'))
    settings.update(deploy=False, **options)
    return kind(*channels, **settings)


def noise(*shape, seed=1):  # other numbers than weights have
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def loss_of(maps):
    """A number that every map has a share in, each a different one."""
    return sum(i * x.float().square().mean() for i, x in enumerate(maps, 1))


IMAGES = noise(2, 3, 64, 96)


def step(model, x):
    """Maps, gradients and buffers of a step; it drops the same every time."""
    torch.manual_seed(1)
    model.zero_grad()
    maps = model(x)
    loss_of(maps).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return maps, grads, dict(model.named_buffers())
