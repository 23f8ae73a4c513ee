"""What golden figures do not tell of small layers: see test_parity.py."""

from importlib import import_module

import pytest
import torch
from torch import nn

from mmoverlock.models.layers import GRN

reference = import_module('mmoverlock.ops.grn.reference')


@pytest.mark.parametrize('squares', [1, 30, 1000])  # a row, two rows, all
def test_grn(squares, monkeypatch):
    """Its definition; dead channels, or dead maps, have finite gradients."""
    monkeypatch.setattr(reference, 'SQUARES', squares)
    torch.manual_seed(0)
    grn, x = GRN(5).double(), torch.randn(2, 5, 4, 3).double().requires_grad_()
    operands = [x, *map(nn.init.normal_, grn.parameters())]
    norm = x.square().sum((2, 3), keepdim=True).sqrt()
    ratio = norm / (norm.mean(1, keepdim=True) + 1e-6)
    outs = grn(x), x * (grn.gamma * ratio + 1) + grn.beta
    pairs = [(y, *torch.autograd.grad(y.sin().sum(), operands)) for y in outs]
    torch.testing.assert_close(*pairs)
    dead = torch.zeros_like(x)
    dead[0, 0] = 1
    operands[0] = dead.requires_grad_()
    for grad in torch.autograd.grad(grn(dead).sum(), operands):
        assert grad.isfinite().all()
