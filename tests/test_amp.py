"""Mixed precision: as good as its format allows, and never NaN."""

import copy
from functools import partial

import pytest
import tiny
import torch
from kernels import relative_error
from mmengine.config import Config
from networks import backbone, loss_of, make_block, noise

from mmoverlock.models.blocks import RepConvBlock
from mmoverlock.models.layers import (
    GRN,
    LayerNorm2d,
    LayerScale,
    ResDWConv,
    SEModule,
)

train = tiny.load_tool('train')


def assert_within(actual, expected, dtype, roundings):
    """Errors of relative size eps grow in every layer."""
    for out, wanted in zip(actual, expected, strict=True):
        assert out.dtype == dtype
        error = relative_error(out, wanted)
        assert error < roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_outputs_and_gradients(dtype):
    """Within a few roundings of double precision; converted models too."""
    model = backbone(fuse_overview=True).train()
    exact = copy.deepcopy(model).double()
    x = noise(2, 3, 64, 96)
    expected = exact(x.double())
    loss_of(expected).backward()
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    assert_within(outputs, expected, dtype, 4)
    loss_of(outputs).backward()
    gradients = [
        torch.cat([p.grad.double().flatten() for p in m.parameters()])
        for m in (model, exact)
    ]
    assert relative_error(*gradients) < 16 * torch.finfo(dtype).eps
    converted = model.eval().to(dtype)
    with torch.no_grad():
        outputs, expected = converted(x.to(dtype)), exact.eval()(x.double())
    assert_within(outputs, expected, dtype, 16)


@pytest.mark.parametrize('scale', [1e-4, 1e4])
@pytest.mark.parametrize(
    'make',
    [
        LayerNorm2d,
        partial(LayerScale, init_value=1e-5),
        GRN,
        SEModule,
        ResDWConv,
        partial(make_block, RepConvBlock, layer_scale=True),
    ],
)
def test_large_and_small_activations(make, scale):
    """No NaN or infinity in float16 where single precision has none."""
    torch.manual_seed(0)
    layer = make(16)
    for parameter in layer.parameters():
        if parameter.dim() == 4 and parameter.shape[1] > 1:
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    exact = copy.deepcopy(layer).double()
    x = (noise(2, 16, 20, 20) * scale).requires_grad_()
    with torch.autocast('cpu', torch.float16):
        out = layer(x.half())
    out.float().mean().backward()
    expected = exact(x.detach().double())
    # But for what is below the format's normal numbers, which is lost.
    lost = torch.finfo(torch.half).tiny * expected.numel() ** 0.5
    error = (out.double() - expected).norm()
    assert error < 4 * torch.finfo(torch.half).eps * expected.norm() + lost
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


def test_train(tmp_path):
    """--amp trains, detectors with mmcv's operators included."""
    tiny.need_openmmlab()
    config, work_dir = tiny.detector(tmp_path), tmp_path / 'work'
    log = tiny.run_tool('train', config, '--work-dir', work_dir, '--amp')
    on_gpu = torch.cuda.is_available()
    assert f"type='{'CPU' * (not on_gpu)}AmpOptimWrapper'" in log
    checkpoint = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    for name, weight in checkpoint['state_dict'].items():
        assert weight.isfinite().all(), name
        assert weight.dtype != torch.bfloat16


@pytest.mark.parametrize(
    'settings, device, expected',
    [
        (dict(dtype='float16'), 'cpu', 'dtype float16'),
        (dict(type='OptimWrapperDict'), 'cpu', 'OptimWrapperDict'),
        ({}, 'mps', 'mps'),
        ({}, 'cuda', dict(type='AmpOptimWrapper', loss_scale='dynamic')),
    ],
)
def test_wrappers(monkeypatch, settings, device, expected):
    monkeypatch.setattr(train, 'get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=settings))
    if isinstance(expected, str):
        with pytest.raises(train.cli.UserError, match=expected):
            train.mix_precision(cfg)
    else:
        train.mix_precision(cfg)
        assert cfg.optim_wrapper == expected
