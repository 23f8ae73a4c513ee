"""Mixed precision: as good as its format allows, and never NaN."""

import copy

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
    'layer',
    [
        LayerNorm2d(16),
        LayerScale(16, init_value=1e-5),
        GRN(16),
        SEModule(16),
        ResDWConv(16),
        make_block(RepConvBlock, 16, layer_scale=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_large_and_small_activations(layer, scale):
    """No NaN or infinity in float16 where single precision has none."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    for conv in layer.modules():  # drawn when tests were collected
        if isinstance(conv, torch.nn.Conv2d):
            conv.reset_parameters()
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


@pytest.mark.parametrize(
    'dtype, shape',
    [(torch.half, (2, 3, 1, 1)), (torch.bfloat16, (1, 3, 33, 40))],
)
def test_tiny_maps(poison, dtype, shape):
    """They have finite gradients, of a scaled loss."""
    model = backbone(fuse_overview=True).train()
    with torch.autocast('cpu', dtype):
        loss = loss_of(model(noise(*shape)))
    (loss * 2.0**10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_train(tmp_path, monkeypatch):
    """--amp trains, detectors with mmcv's operators included."""
    tiny.need_openmmlab()
    config, work_dir = tiny.detector(tmp_path), tmp_path / 'work'
    kind = 'AmpOptimWrapper'
    if not torch.cuda.is_available():
        kind = 'CPUAmpOptimWrapper'
    log = tiny.run_tool('train', config, '--work-dir', work_dir, '--amp')
    assert f"type='{kind}'" in log and 'nan' not in log
    checkpoint = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    for name, weight in checkpoint['state_dict'].items():
        assert weight.isfinite().all(), name
        assert weight.dtype != torch.bfloat16


@pytest.mark.parametrize(
    'settings, device, message',
    [
        (dict(dtype='bfloat16'), 'cuda', None),
        (dict(dtype='float16'), 'cpu', 'dtype float16'),
        (dict(type='OptimWrapperDict'), 'cpu', 'OptimWrapperDict'),
        (dict(), 'mps', 'mps'),
    ],
)
def test_wrappers(monkeypatch, settings, device, message):
    train = tiny.load_tool('train')
    monkeypatch.setattr(train, 'get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=dict(settings)))
    if message is None:
        train.mix_precision(cfg)
        amp = dict(type='AmpOptimWrapper', loss_scale='dynamic')
        assert cfg.optim_wrapper == amp | settings
        return
    with pytest.raises(train.cli.UserError, match=message):
        train.mix_precision(cfg)
