"""Mixed precision: as good as its format allows, and never NaN."""

import copy

import pytest
import tiny
import torch
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

LAST_NORMS = (  # of the layers that make the maps of a stage
    *('patch_embed1.10', 'patch_embed2.1', 'patch_embed3.1'),
    *('patch_embed4.1', 'patch_embedx.x_proj.1', 'patch_embedx.h_proj.1'),
)
LOSS_SCALE = 2.0**10
BN = dict(type='BN')
BLOCK = dict(kernel_size=13, drop_path=0.0, norm_cfg=BN, deploy=False)


def draw(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator) * scale


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def loss_of(outputs):
    return sum(out.float().square().mean() for out in outputs)


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
@pytest.mark.parametrize('training', [True, False])
def test_outputs_and_gradients(dtype, training):
    """Within a few roundings of double precision."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER, fuse_overview=True)).train(
        training
    )
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


def layers():
    block = RepConvBlock(16, layer_scale=True, **BLOCK)
    focus = FocusBlock(
        16, 8, heads=2, first=True, contmix_backend='auto', **BLOCK
    )
    return dict(
        norm=(LayerNorm2d(16), 16),
        scale=(LayerScale(16), 16),
        small_scale=(LayerScale(16, init_value=1e-5), 16),
        grn=(GRN(16), 16),
        se=(SEModule(16), 16),
        dwconv=(ResDWConv(16), 16),
        block=(block, 16),
        focus=(focus, 24),
    )


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
@pytest.mark.parametrize('scale', [1e-4, 1e4])
@pytest.mark.parametrize('name', layers())
def test_large_and_small_activations(name, scale, dtype):
    """No NaN or infinity where single precision has none."""
    torch.manual_seed(0)
    layer, channels = layers()[name]
    for parameter in layer.parameters():
        if parameter.dim() == 4 and parameter.shape[1] > 1:
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    layer.train()
    exact = copy.deepcopy(layer).double()
    x = draw(2, channels, 20, 20, scale=scale)
    rest = (draw(2, 8, 20, 20),) if name == 'focus' else ()
    x.requires_grad_()
    with torch.autocast('cpu', dtype):
        out = layer(x.to(dtype), *rest)
    out.float().mean().backward()
    expected = exact(x.detach().double(), *(r.double() for r in rest))
    # Of half precision, what is below its normal numbers is lost.
    lost = torch.finfo(dtype).tiny * expected.numel() ** 0.5
    error = (out.double() - expected).norm()
    assert error < 4 * torch.finfo(dtype).eps * expected.norm() + lost
    assert x.grad.isfinite().all()
    for parameter in layer.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
def test_large_activations_of_all_stages(dtype):
    """What stems and downsampling layers emit, scaled until it is 1e4."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER, fuse_overview=True)).train()
    peaks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name in LAST_NORMS:
            module.weight.data *= 1e3
            module.bias.data *= 1e3
        if isinstance(module, RepConvBlock | FocusBlock):
            module.register_forward_hook(
                lambda _, __, out: peaks.append(out.detach().abs().max())
            )
    exact = copy.deepcopy(model).double()
    x = draw(2, 3, 64, 96)
    expected = exact(x.double())
    assert max(peaks) > 1e4 and min(peaks) > 1e3
    with torch.autocast('cpu', dtype):
        outputs = model(x)
    eps = torch.finfo(dtype).eps
    for actual, wanted in zip(outputs, expected, strict=True):
        assert relative_error(actual, wanted) < 4 * eps
    (loss_of(outputs) * LOSS_SCALE).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
def test_small_layer_scale(dtype):
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
    with torch.autocast('cpu', dtype):
        maps = model(x)
    (loss_of(maps) * LOSS_SCALE).backward()
    expected, actual = outputs
    eps = torch.finfo(dtype).eps
    assert 0 < expected.abs().max() < 1e-4
    lost = torch.finfo(dtype).smallest_normal * expected.numel() ** 0.5
    assert (actual - expected).norm() < 4 * eps * expected.norm() + lost
    for parameter, other in zip(
        model.h_proj.parameters(), exact.h_proj.parameters(), strict=True
    ):
        gradient = parameter.grad / LOSS_SCALE
        assert relative_error(gradient, other.grad) < 16 * eps


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
@pytest.mark.parametrize('backend', ['reference', 'tiled'])
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


@pytest.fixture
def poisoned_memory():
    """What is left uninitialized is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
@pytest.mark.parametrize('size', [(2, 33, 32), (2, 1, 1), (1, 33, 40)])
def test_gradient_scaler(poisoned_memory, dtype, size):
    """Finite gradients from a scaled loss, of tiny maps too."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER, fuse_overview=True)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', init_scale=LOSS_SCALE)
    with torch.autocast('cpu', dtype):
        loss = loss_of(model(draw(size[0], 3, *size[1:])))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == before


def test_gradient_scaler_finds_its_scale():
    """Steps whose gradients overflow are left out, and soon there is none."""
    torch.manual_seed(0)
    model = OverLoCK(tiny.DEEPER).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first = scale = 2.0**24
    scaler = torch.amp.GradScaler('cpu', init_scale=first, backoff_factor=0.1)
    for _ in range(8):
        with torch.autocast('cpu', torch.float16):
            loss = loss_of(model(draw(2, 3, 33, 32)))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
        scale = scaler.get_scale()
    assert 1 <= scale < first
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('dtype', tiny.HALF_FORMATS)
def test_converted_models(dtype):
    """Inference without autocast, of a model converted with .to()."""
    torch.manual_seed(0)
    model = tiny.randomize(OverLoCK(tiny.DEEPER)).eval()
    x = draw(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        outputs = model.to(dtype)(x.to(dtype))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < 16 * torch.finfo(dtype).eps


@pytest.mark.slow
def test_training_tracks_single_precision():
    """The losses of 200 steps of xt that learns images by heart."""
    curves = {}
    x = draw(4, 3, 32, 32)
    labels = torch.arange(4)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = OverLoCK('xt', out_indices=(3,)).train()
        head = torch.nn.Linear(model.out_channels[-1], 4)
        optimizer = torch.optim.AdamW(
            [*model.parameters(), *head.parameters()], lr=1e-4
        )
        losses = curves[dtype] = []
        for _ in range(200):
            mixed = dtype != torch.float32
            with torch.autocast('cpu', torch.bfloat16, enabled=mixed):
                logits = head(model(x)[-1].mean((2, 3)))
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    exact, mixed = (torch.tensor(losses) for losses in curves.values())
    # Averages of 20 steps.
    averages = [losses.view(10, 20).mean(1) for losses in (exact, mixed)]
    print(exact[0], mixed[0], *averages)
    assert averages[0][-1] < 0.1 * exact[0]
    difference = (averages[0] - averages[1]).abs()
    assert (difference < 0.1 * exact[0]).all(), averages


# ---------------------------------------------------------- tools/train.py


@pytest.mark.parametrize(
    'wrapper',
    [
        'CPUAmpOptimWrapper',
        pytest.param(
            'AmpOptimWrapper',
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason='needs a GPU'
            ),
        ),
    ],
)
@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain'])
def test_train(tmp_path, monkeypatch, scope, wrapper):
    """--amp trains, detectors with mmcv's operators included."""
    pytest.importorskip('mmcv._ext', reason='needs compiled ops')
    pytest.importorskip(scope)
    write = tiny.classifier if scope == 'mmpretrain' else tiny.detector
    config = write(tmp_path)
    if wrapper == 'CPUAmpOptimWrapper':
        monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cpu')
    log = tiny.run_tool(
        *('train', config, '--work-dir', tmp_path / 'work', '--seed', 1),
        *('--amp', '--cfg-options', 'train_cfg.max_epochs=1'),
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
