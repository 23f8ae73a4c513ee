"""The dilated reparameterized convolution."""

import copy

import pytest
import torch
from fusion import far
from torch import nn

from mmoverlock.models.reparam import BRANCHES, DilatedReparamConv

BN = dict(type='BN')


def make_conv(kernel_size):
    conv = far(DilatedReparamConv(3, kernel_size, BN))
    conv.origin_bn.eps = 0.1
    return conv


def draw():
    return torch.randn(2, 3, 21, 24).double().requires_grad_()


def sum_of_branches(conv, x):
    """By the names of the release."""
    names = [('lk_origin', 'origin_bn')] + [
        (f'dil_conv_k{size}_{dilation}', f'dil_bn_k{size}_{dilation}')
        for size, dilation in BRANCHES[conv.lk_origin.kernel_size[0]]
    ]
    return sum(
        conv.get_submodule(norm)(conv.get_submodule(name)(x))
        for name, norm in names
    )


@pytest.mark.parametrize('kernel_size', BRANCHES)
def test_merging(kernel_size):
    """One convolution in eval mode, with the gradients of every branch."""
    conv, x = make_conv(kernel_size), draw()
    operands = [x, *conv.parameters()]
    expected = sum_of_branches(conv, x)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(out.sin().sum(), operands)
            for out in (conv(x), sum_of_branches(conv, x))
        )
    )
    for _ in range(2):  # the second time, there is nothing to merge
        conv.switch_to_deploy()
        torch.testing.assert_close(conv(x), expected)
    deployed = DilatedReparamConv(3, kernel_size, BN, deploy=True)
    assert set(deployed.state_dict()) == set(conv.state_dict())


@pytest.mark.parametrize('change', ['momentum', 'one in eval mode', 'type'])
def test_other_batch_norms(change):
    """What the fast path does not cover is computed plainly."""
    conv, x = make_conv(5).train(), draw()
    if change == 'momentum':  # an average over all batches
        conv.origin_bn.momentum = None
    elif change == 'type':
        conv.origin_bn = nn.InstanceNorm2d(3, affine=True).double()
    else:
        conv.origin_bn.eval()
    other = copy.deepcopy(conv)
    torch.testing.assert_close(conv(x), sum_of_branches(other, x))
    torch.testing.assert_close(
        dict(conv.state_dict()), dict(other.state_dict())
    )
