"""ContMixBlock, the dynamic convolution as a layer of other networks."""

import pytest
import torch
from networks import make_block
from torch import nn

from mmoverlock import ContMixBlock
from mmoverlock.models.blocks import FocusBlock


@torch.no_grad()
def test_it_is_the_dynamic_convolution_of_overlock():
    torch.manual_seed(0)
    options = dict(kernel_size=7, heads=2, first=True)
    focus = make_block(FocusBlock, 16, 8, **options).eval()
    block = ContMixBlock(16, 7, groups=4, prior_channels=8).eval()
    for table in (focus.rpb1, focus.rpb2, focus.weight_proj.weight):
        nn.init.normal_(table)
    parts = [
        *((block.query, focus.weight_query), (block.key, focus.weight_key)),
        *((block.weight, focus.weight_proj), (block.proj, focus.dyconv_proj)),
        (block.rpb, nn.ParameterList([focus.rpb1, focus.rpb2])),
    ]
    for own, other in parts:
        pairs = zip(own.parameters(), other.parameters(), strict=True)
        for weight, value in pairs:
            weight.copy_(value.view_as(weight))
    z = torch.randn(2, 24, 9, 12)
    x, prior = z.split([16, 8], dim=1)
    expected = focus.dyconv_proj(focus.dynamic_conv(z, x))
    torch.testing.assert_close(block(x, prior), expected)


@pytest.mark.parametrize(
    'size, kernel_size',
    [((3, 5), 7), ((30, 4), 7), ((11, 11), 15)],  # 15 / 11 * 11 < 15
)
@torch.no_grad()
def test_maps_smaller_than_the_kernel(size, kernel_size):
    """A mean of equal values is that value."""
    block = ContMixBlock(8, kernel_size, groups=2).eval()
    x = torch.ones(2, 8, *size)
    torch.testing.assert_close(block(x), block.proj(x))


def test_without_a_prior_the_map_is_its_own():
    """And every parameter gets a gradient."""
    torch.manual_seed(0)
    block = ContMixBlock(16, 7, groups=2)
    assert block.weight.weight.std() < 0.03
    x = torch.randn(2, 16, 9, 12)
    block(x).square().sum().backward()
    for name, weight in block.named_parameters():
        assert weight.grad.isfinite().all(), name
    block.eval()
    assert torch.equal(block(x), block(x, x))
    assert not torch.allclose(block(x), block(x, x.flip(3)), atol=1e-5)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(kernel_size=6), 'odd and at least 5, got 6'),
        (dict(kernel_size=3), 'odd and at least 5, got 3'),
        (dict(groups=3), '3 groups need a multiple of 6 channels, got 16'),
        (dict(norm_cfg=dict(type='GN')), 'GN'),
        (dict(backend='natten'), 'natten'),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        ContMixBlock(16, **{'groups': 8, **options})
