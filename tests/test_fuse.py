"""Fusion for inference: the same outputs from fewer operations."""

import golden
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmoverlock.models import OverLoCK
from mmoverlock.models.fuse import fuse
from mmoverlock.models.layers import GRN, ResDWConv

SMALL = dict(
    depths=(1, 1, 2, 1),
    channels=(16, 16, 16, 32),
    focus_depths=(2, 1),
    focus_heads=(2, 2),
)


def randomized(model):
    """With drawn weights and statistics, in float64 and eval mode."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(golden.state_dict(shapes))
    return model.double().eval()


def assert_fuses(model, inputs):
    with torch.no_grad():
        expected = model(inputs)
        assert fuse(model) is model
        actual = model(inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('fuse_overview', [False, True])
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('size', [(96, 64), (224, 192)])
def test_backbone(fuse_overview, deploy, size):
    model = randomized(
        OverLoCK(SMALL, fuse_overview=fuse_overview, deploy=deploy)
    )
    assert_fuses(model, golden.image((2, 3, *size)).double())
    left = [type(m) for m in model.modules() if isinstance(m, _BatchNorm)]
    assert not left
    assert not any(p.requires_grad for p in model.parameters())
    assert all(
        m.residual is False
        for m in model.modules()
        if isinstance(m, ResDWConv)
    )


def test_released_weights():
    """What the release computes, after fusion."""
    figures = golden.load('det_xt_2x96x160')
    model = OverLoCK('xt', fuse_overview=True).double()
    model.load_state_dict(golden.state_dict(golden.load('keys_det_xt')))
    fuse(model)
    with torch.no_grad():
        outputs = model(golden.image(figures['input']))
    for i, output in enumerate(outputs):
        golden.assert_agrees(f'out{i}', output, figures['outputs'][f'out{i}'])


def test_classifier_form():
    model = randomized(OverLoCK(SMALL, classifier=True))
    assert_fuses(model, golden.image((1, 3, 64, 64)).double())


def test_other_sequences():
    """Norms without a convolution beside them stay."""
    model = randomized(
        nn.Sequential(
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            GRN(4),
        )
    )
    assert_fuses(model, golden.image((2, 3, 8, 8)).double())
    assert isinstance(model[0], nn.BatchNorm2d)
    assert isinstance(model[3], nn.Identity)


def test_conv_module():
    cnn = pytest.importorskip('mmcv.cnn')
    model = randomized(
        nn.ModuleList(
            [
                cnn.ConvModule(3, 4, 3, norm_cfg=dict(type='BN')),
                cnn.ConvModule(
                    4,
                    4,
                    3,
                    norm_cfg=dict(type='BN'),
                    order=('norm', 'conv', 'act'),
                ),
                cnn.ConvModule(
                    4, 4, 3, norm_cfg=dict(type='GN', num_groups=2)
                ),
            ]
        )
    )
    model.forward = lambda x: model[2](model[1](model[0](x)))
    assert_fuses(model, golden.image((2, 3, 9, 9)).double())
    assert isinstance(model[0].norm, nn.Identity)
    assert isinstance(model[1].norm, nn.BatchNorm2d)
