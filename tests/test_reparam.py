"""The dilated reparameterized convolution."""

import copy

import pytest
import torch
from torch import nn

from mmoverlock.models.reparam import BRANCHES, DilatedReparamConv

BN = dict(type='BN')


def randomized(kernel_size):
    torch.manual_seed(0)
    conv = DilatedReparamConv(3, kernel_size, BN).double()
    for module in conv.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    conv.origin_bn.eps = 0.1
    return conv.eval()


@pytest.mark.parametrize('kernel_size', BRANCHES)
def test_merging(kernel_size):
    conv = randomized(kernel_size)
    x = torch.randn(2, 3, 21, 24, dtype=torch.double)
    with torch.no_grad():
        expected = sum(
            bn(branch(x))
            for branch, bn in (
                (conv.lk_origin, conv.origin_bn),
                *(
                    (
                        conv.get_submodule(f'dil_conv_k{size}_{dilation}'),
                        conv.get_submodule(f'dil_bn_k{size}_{dilation}'),
                    )
                    for size, dilation in BRANCHES[kernel_size]
                ),
            )
        )
        torch.testing.assert_close(conv(x), expected)
        for _ in range(2):  # the second time, there is nothing to merge
            conv.switch_to_deploy()
            torch.testing.assert_close(conv(x), expected)
    assert set(conv.state_dict()) == {'lk_origin.weight', 'lk_origin.bias'}
    deployed = DilatedReparamConv(3, kernel_size, BN, deploy=True)
    assert set(deployed.state_dict()) == set(conv.state_dict())


def test_fixed_statistics_train_the_branches():
    """In eval mode one merged convolution has every branch's gradients."""
    conv = randomized(13)
    x = torch.randn(2, 3, 9, 7, dtype=torch.double, requires_grad=True)
    operands = [x, *conv.parameters()]
    names = [('lk_origin', 'origin_bn')] + [
        (f'dil_conv_k{size}_{dilation}', f'dil_bn_k{size}_{dilation}')
        for size, dilation in BRANCHES[13]
    ]
    plain = sum(
        conv.get_submodule(bn)(conv.get_submodule(name)(x))
        for name, bn in names
    )
    for actual, expected in zip(
        torch.autograd.grad(conv(x).sin().sum(), operands),
        torch.autograd.grad(plain.sin().sum(), operands),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('change', ['momentum', 'one in eval mode', 'type'])
def test_other_batch_norms(change):
    """What the fast path does not cover is computed plainly."""
    conv = randomized(5).train()
    if change == 'momentum':  # an average over all batches
        conv.origin_bn.momentum = None
    elif change == 'type':
        conv.origin_bn = nn.InstanceNorm2d(3, affine=True).double()
    else:
        conv.origin_bn.eval()
    x = torch.randn(2, 3, 6, 7, dtype=torch.double)
    other = copy.deepcopy(conv)
    plain = sum(
        other.get_submodule(bn)(other.get_submodule(name)(x))
        for name, bn in other.branches
    )
    torch.testing.assert_close(conv(x), plain)
    for key, expected in other.state_dict().items():
        torch.testing.assert_close(conv.state_dict()[key], expected)
