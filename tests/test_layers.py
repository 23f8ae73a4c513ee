"""The small layers against their definitions."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmoverlock.models.layers import GRN, PointwiseConv, SEModule

reference = import_module('mmoverlock.ops.grn.reference')


def randomized(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def maps(*shape):
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(shape, generator=generator, dtype=torch.float64)
    return draw.contiguous(memory_format=torch.channels_last).requires_grad_()


def assert_equal_with_gradients(actual, expected, inputs):
    torch.testing.assert_close(
        *(
            [out, *torch.autograd.grad(out.sin().sum(), inputs)]
            for out in (actual, expected)
        )
    )


@pytest.mark.parametrize(
    'batch, out_channels, bias, operands',
    [  # more positions than output channels, and fewer
        (3, 4, True, ()),
        (1, 4, True, ('scale',)),
        (3, 4, True, ('scale', 'shift')),
        (1, 4, False, ('scale', 'shift')),
        (3, 40, False, ('scale',)),
        (1, 40, True, ('scale', 'shift')),
    ],
)
def test_pointwise_conv(batch, out_channels, bias, operands):
    conv = randomized(PointwiseConv(6, out_channels, bias))
    x = maps(batch, 6, 4, 5)
    shapes = dict(scale=(batch, 6, 1, 1), shift=(1, 6, 1, 1))
    folded = {name: maps(*shapes[name]) for name in operands}
    plain = x * folded.get('scale', 1) + folded.get('shift', 0)
    assert_equal_with_gradients(
        conv(x, **folded),
        F.conv2d(plain, conv.weight, conv.bias),
        [x, *conv.parameters(), *folded.values()],
    )


@pytest.mark.parametrize('kind', [GRN, SEModule])
def test_scale_and_shift(kind):
    """A 1x1 convolution takes them in place of what the layer returns."""
    layer, conv = randomized(kind(6)), randomized(PointwiseConv(6, 4))
    x = maps(2, 6, 3, 5)
    assert_equal_with_gradients(
        conv(x, *layer.scale_and_shift(x)),
        conv(layer(x)),
        [x, *layer.parameters(), *conv.parameters()],
    )


@pytest.mark.parametrize('squares', [1, 30, 1000])  # a row, two rows, all
def test_grn(squares, monkeypatch):
    """Its definition; dead channels, or dead maps, have finite gradients."""
    monkeypatch.setattr(reference, 'SQUARES', squares)
    grn, x = randomized(GRN(5)), maps(2, 5, 4, 3)
    norm = x.square().sum((2, 3), keepdim=True).sqrt()
    ratio = norm / (norm.mean(1, keepdim=True) + 1e-6)
    expected = x * (grn.gamma * ratio + 1) + grn.beta
    assert_equal_with_gradients(grn(x), expected, [x, *grn.parameters()])
    dead = torch.zeros_like(x)
    dead[0, 0] = 1
    operands = [dead.requires_grad_(), *grn.parameters()]
    for grad in torch.autograd.grad(grn(dead).sum(), operands):
        assert grad.isfinite().all()
