"""ContMixBlock, the dynamic convolution as a layer of other networks."""

import pytest
import torch

from mmoverlock import ContMixBlock
from mmoverlock.models.blocks import FocusBlock


@pytest.fixture
def pair():
    """A block of OverLoCK, and one of its own with the same weights."""
    torch.manual_seed(0)
    options = dict(first=True, drop_path=0.0, norm_cfg={}, deploy=False)
    focus = FocusBlock(16, 8, kernel_size=7, heads=2, **options)
    block = ContMixBlock(16, 7, groups=4, prior_channels=8)
    for table in (focus.rpb1, focus.rpb2, focus.weight_proj.weight):
        torch.nn.init.normal_(table)
    block.query.load_state_dict(focus.weight_query.state_dict())
    block.key[0].load_state_dict(focus.weight_key[1].state_dict())
    block.key[1].load_state_dict(focus.weight_key[2].state_dict())
    block.proj.load_state_dict(focus.dyconv_proj.state_dict())
    with torch.no_grad():
        block.weight.weight.copy_(focus.weight_proj.weight.flatten(1))
        block.weight.bias.copy_(focus.weight_proj.bias)
        block.rpb[0].copy_(focus.rpb1)
        block.rpb[1].copy_(focus.rpb2)
    return focus.eval(), block.eval()


def test_it_is_the_dynamic_convolution_of_overlock(pair):
    focus, block = pair
    z = torch.randn(2, 24, 9, 12)
    x, prior = z.split([16, 8], dim=1)
    with torch.no_grad():
        expected = focus.dyconv_proj(focus.dynamic_conv(z, x))
        torch.testing.assert_close(block(x, prior), expected)


def test_without_a_prior_the_map_is_its_own():
    torch.manual_seed(0)
    block = ContMixBlock(16, 7, groups=2).eval()
    x = torch.randn(2, 16, 9, 12)
    assert torch.equal(block(x), block(x, x))
    assert not torch.allclose(block(x), block(x, x.flip(3)), atol=1e-5)


@pytest.mark.parametrize('size', [(3, 5), (5, 3), (1, 1), (6, 6), (4, 30)])
def test_maps_smaller_than_the_kernel(size):
    block = ContMixBlock(8, 7, groups=2).eval()
    assert block(torch.randn(2, 8, *size)).shape == (2, 8, *size)
    # A mean of equal values is that value.
    x = torch.ones(1, 8, *size)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block.proj(x))


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    block = ContMixBlock(8, 5, groups=2)
    (block(torch.randn(2, 8, 9, 9)) ** 2).sum().backward()
    for name, weight in block.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    assert block.weight.weight.std() < 0.03


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
