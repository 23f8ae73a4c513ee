"""Whether a fused model computes what it has computed before."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from mmoverlock.models.fuse import fuse


def far(model):
    """With batch norms far from the identity, in float64 and eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, _BatchNorm):
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.2, 4)
    return model.double().eval()


def assert_fuses(model, *inputs, call=None):
    """The outputs stay; return how many convolutions are fused copies.

    Their strides do, too: mmcv's RoIAlign takes maps as contiguous.
    """
    call = call or model
    with torch.no_grad():
        expected = tree_leaves(call(*inputs))
        assert any(map(torch.is_tensor, expected))
        assert fuse(model) is model
        actual = tree_leaves(call(*inputs))
    close = dict(rtol=1e-9, atol=1e-9, check_stride=True)
    torch.testing.assert_close(actual, expected, **close)
    return sum(hasattr(module, 'fused') for module in model.modules())
