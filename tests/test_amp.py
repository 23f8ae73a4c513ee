"""Mixed precision: as good as its format allows, and never NaN."""

import copy

import pytest
import tiny
import torch
from kernels import relative_error
from mmengine.config import Config
from networks import backbone, loss_of, make_block, noise

from mmoverlock.models.blocks import FocusBlock, RepConvBlock
from mmoverlock.models.layers import (
    GRN,
    LayerNorm2d,
    LayerScale,
    ResDWConv,
    SEModule,
)

LOSS_SCALE = 2.0**10
EPS = torch.finfo(torch.half).eps


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


# What follows is hard in float16, whose numbers range from 6e-8 to 65504.


LAYERS = dict(
    norm=lambda: LayerNorm2d(16),
    scale=lambda: LayerScale(16),
    small_scale=lambda: LayerScale(16, init_value=1e-5),
    grn=lambda: GRN(16),
    se=lambda: SEModule(16),
    dwconv=lambda: ResDWConv(16),
    block=lambda: make_block(
        RepConvBlock, 16, kernel_size=13, layer_scale=True
    ),
    focus=lambda: make_block(
        FocusBlock, 16, 8, kernel_size=13, heads=2, first=True
    ),
)


@pytest.mark.parametrize('scale', [1e-4, 1e4])
@pytest.mark.parametrize('name', LAYERS)
def test_large_and_small_activations(name, scale):
    """No NaN or infinity where single precision has none."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        if parameter.dim() == 4 and parameter.shape[1] > 1:
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    exact = copy.deepcopy(layer).double()
    maps = [noise(2, 16, 20, 20) * scale]
    if name == 'focus':
        maps = noise(2, 24, 20, 20) * scale, noise(2, 8, 20, 20)
    maps[0].requires_grad_()
    with torch.autocast('cpu', torch.float16):
        out = layer(*(x.half() for x in maps))
    out.float().mean().backward()
    expected = exact(*(x.detach().double() for x in maps))
    # But for what is below the format's normal numbers, which is lost.
    lost = torch.finfo(torch.half).tiny * expected.numel() ** 0.5
    error = (out.double() - expected).norm()
    assert error < 4 * EPS * expected.norm() + lost
    for tensor in (maps[0], *layer.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    'dtype, shape',
    [(torch.half, (2, 3, 1, 1)), (torch.bfloat16, (1, 3, 33, 40))],
)
def test_tiny_maps(poison, dtype, shape):
    """They have finite gradients."""
    model = backbone(fuse_overview=True).train()
    with torch.autocast('cpu', dtype):
        loss = loss_of(model(noise(*shape)))
    (loss * LOSS_SCALE).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU'
)


@pytest.mark.parametrize(
    'device, wrapper',
    [
        ('cpu', 'CPUAmpOptimWrapper'),
        pytest.param('cuda', 'AmpOptimWrapper', marks=NEEDS_GPU),
    ],
)
def test_train(tmp_path, monkeypatch, device, wrapper):
    """--amp trains, detectors with mmcv's operators included."""
    tiny.need_openmmlab()
    config, work_dir = tiny.detector(tmp_path), tmp_path / 'work'
    monkeypatch.setattr('mmengine.device.utils.DEVICE', device)
    argv = config, '--work-dir', work_dir, '--seed', 1, '--amp'
    log = tiny.run_tool('train', *argv)
    assert f"type='{wrapper}'" in log and 'nan' not in log
    checkpoint = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    for name, weight in checkpoint['state_dict'].items():
        assert weight.isfinite().all(), name
        assert weight.dtype != torch.bfloat16


@pytest.mark.parametrize(
    'settings, device, message',
    [
        (dict(), 'cuda', None),  # which is float16 unless told otherwise
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
