"""Mixed precision: as good as its format allows, and never NaN."""

import copy

import pytest
import tiny
import torch
from kernels import relative_error
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper

from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock, RepConvBlock
from mmoverlock.models.layers import (
    GRN,
    LayerNorm2d,
    LayerScale,
    ResDWConv,
    SEModule,
)
from mmoverlock.ops import contmix

LOSS_SCALE = 2.0**10
EPS = torch.finfo(torch.half).eps
BN = dict(type='BN')
BLOCK = dict(kernel_size=13, drop_path=0.0, norm_cfg=BN, deploy=False)


def draw(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator) * scale


def loss_of(outputs):
    return sum(out.float().square().mean() for out in outputs)


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
def test_outputs_and_gradients(dtype):
    """Within a few roundings of double precision."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER, fuse_overview=True)).train()
    exact = copy.deepcopy(model).double()
    x = draw(2, 3, 64, 96)
    expected = exact(x.double())
    loss_of(expected).backward()
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    # What grows in every layer: roundings of relative size eps.
    eps = torch.finfo(dtype).eps
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < 4 * eps
    loss_of(outputs).backward()
    gradients = [
        torch.cat([p.grad.double().flatten() for p in m.parameters()])
        for m in (model, exact)
    ]
    assert relative_error(*gradients) < 16 * eps


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
@torch.no_grad()
def test_converted_models(dtype):
    """Inference without autocast, of a model converted with .to()."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER)).eval()
    x = draw(1, 3, 64, 64)
    expected = [out.double() for out in model(x)]
    outputs = model.to(dtype)(x.to(dtype))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < 16 * torch.finfo(dtype).eps


# What follows is hard in float16, whose numbers range from 6e-8 to 65504.


LAYERS = dict(
    norm=lambda: LayerNorm2d(16),
    scale=lambda: LayerScale(16),
    small_scale=lambda: LayerScale(16, init_value=1e-5),
    grn=lambda: GRN(16),
    se=lambda: SEModule(16),
    dwconv=lambda: ResDWConv(16),
    block=lambda: RepConvBlock(16, layer_scale=True, **BLOCK),
    focus=lambda: FocusBlock(16, 8, heads=2, first=True, **BLOCK),
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
    channels = 16
    rest = []
    if name == 'focus':
        channels, rest = 24, [draw(2, 8, 20, 20)]
    x = draw(2, channels, 20, 20, scale=scale).requires_grad_()
    with torch.autocast('cpu', torch.float16):
        out = layer(x.half(), *rest)
    out.float().mean().backward()
    assert_near(out, exact(x.detach().double(), *(r.double() for r in rest)))
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


def assert_near(actual, expected):
    """But for what is below the format's normal numbers, which is lost."""
    lost = torch.finfo(torch.half).tiny * expected.numel() ** 0.5
    error = (actual.double() - expected).norm()
    assert error < 4 * EPS * expected.norm() + lost


def test_small_layer_scale():
    """The initial 1e-5 reaches its output, and gets its gradient."""
    torch.manual_seed(0)
    model = OverLoCK(tiny.DEEPER, fuse_overview=True).train()
    exact = copy.deepcopy(model).double()
    outputs = []
    for m in (model, exact):
        m.h_proj[1].register_forward_hook(
            lambda _, __, out: outputs.append(out)
        )
    x = draw(2, 3, 64, 96)
    loss_of(exact(x.double())).backward()
    with torch.autocast('cpu', torch.float16):
        maps = model(x)
    (loss_of(maps) * LOSS_SCALE).backward()
    expected, actual = outputs
    assert 0 < expected.abs().max() < 1e-4
    assert_near(actual, expected)
    for parameter, other in zip(
        model.h_proj.parameters(), exact.h_proj.parameters(), strict=True
    ):
        gradient = parameter.grad / LOSS_SCALE
        assert relative_error(gradient, other.grad) < 16 * EPS


@pytest.mark.parametrize(
    'backend, dtype', [('reference', torch.bfloat16), ('tiled', torch.half)]
)
def test_kernels_are_made_in_single_precision(backend, dtype):
    """Logits of hundreds, whose differences of 1 such formats round off."""
    torch.manual_seed(0)
    groups, k = 2, 5
    query = torch.randn(1, groups * 3, 9, 8) * 20
    key = torch.randn(1, groups * 3, 2, 2) * 20
    value = torch.randn(1, groups * 4, 9, 8).to(dtype)
    weight, bias = torch.randn(9 + k**2, 4), torch.randn(9 + k**2)
    rpb = torch.randn(groups, 5, 5), torch.randn(groups, 9, 9)
    operands = query, key, value, weight, bias
    expected = contmix(
        *(tensor.double() for tensor in operands),
        tuple(table.double() for table in rpb),
        backend,
    )
    with torch.autocast('cpu', dtype):
        actual = contmix(*operands, rpb, backend)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    'dtype, size', [(torch.half, (2, 1, 1)), (torch.bfloat16, (1, 33, 40))]
)
def test_tiny_maps(poison, dtype, size):
    """They have finite gradients."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER, fuse_overview=True)).train()
    with torch.autocast('cpu', dtype):
        loss = loss_of(model(draw(size[0], 3, *size[1:])))
    (loss * LOSS_SCALE).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


# ---------------------------------------------------------- tools/train.py


@pytest.mark.parametrize(
    'device, wrapper',
    [
        ('cpu', 'CPUAmpOptimWrapper'),
        pytest.param(
            *('cuda', 'AmpOptimWrapper'),
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason='needs a GPU'
            ),
        ),
    ],
)
def test_train(tmp_path, monkeypatch, device, wrapper):
    """--amp trains, detectors with mmcv's operators included."""
    tiny.need_openmmlab()
    config = tiny.detector(tmp_path)
    monkeypatch.setattr('mmengine.device.utils.DEVICE', device)
    log = tiny.run_tool(
        *('train', config, '--work-dir', tmp_path / 'work', '--seed', 1),
        '--amp',
    )
    assert f"type='{wrapper}'" in log
    checkpoint = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    for name, weight in checkpoint['state_dict'].items():
        assert weight.isfinite().all(), name
        assert weight.dtype != torch.bfloat16
    assert 'nan' not in log


@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_wrapper_on_gpus(monkeypatch, dtype):
    """mmengine's, which is for float16 unless told otherwise."""
    train = tiny.load_tool('train')
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(
        amp_optimizer_wrapper, 'is_cuda_available', lambda: True
    )
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=1))))
    if dtype:
        cfg.optim_wrapper.dtype = dtype
    train.mix_precision(cfg)
    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), cfg.optim_wrapper)
    assert type(wrapper.loss_scaler).__name__ == 'GradScaler'
    assert wrapper.cast_dtype == (torch.bfloat16 if dtype else None)


@pytest.mark.parametrize(
    'settings, device, message',
    [
        (dict(dtype='float16'), 'cpu', 'dtype float16'),
        (dict(type='OptimWrapperDict'), 'cpu', 'OptimWrapperDict'),
        (dict(), 'mps', 'mps'),
    ],
)
def test_refused(monkeypatch, settings, device, message):
    train = tiny.load_tool('train')
    monkeypatch.setattr(train, 'get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=settings))
    with pytest.raises(train.cli.UserError, match=message):
        train.mix_precision(cfg)
