"""The backbone's contract."""

import io

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from tiny import DEEPER as TINY
from tiny import randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.layers import DropPath
from mmoverlock.models.reparam import DilatedReparamConv

NORMS = nn.BatchNorm2d


def tiny(**kwargs):
    torch.manual_seed(0)
    return OverLoCK(TINY, **kwargs)


def image(batch=2, height=64, width=96, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, height, width, generator=generator)


def loss_of(outputs):
    return sum(
        (out * (i + 1)).square().mean() for i, out in enumerate(outputs)
    )


@pytest.mark.parametrize(
    'arch, parameters, classifier, deployed_classifier',
    [
        ('xt', 15657380, 17307272, 16791384),
        ('t', 33127096, 34990472, 33981064),
        ('s', 56446524, 58309772, 56670476),
        ('b', 96091496, 98012968, 95520680),
    ],
)
def test_parameter_counts(arch, parameters, classifier, deployed_classifier):
    """The release's counts; its detectors merge what classifiers merge."""
    with torch.device('meta'):
        counts = [
            sum(
                parameter.numel()
                for parameter in OverLoCK(
                    arch, fuse_overview=True, deploy=deploy
                ).parameters()
            )
            for deploy in (False, True)
        ]
    assert counts[0] == parameters
    assert counts[0] - counts[1] == classifier - deployed_classifier


@pytest.mark.parametrize(
    'names, channels',
    [
        (('xt', 'extreme-tiny', 'XT'), (56, 112, 340, 420)),
        (('t', 'tiny'), (64, 128, 384, 640)),
        (('s', 'small'), (64, 128, 448, 640)),
        (('b', 'base'), (80, 160, 528, 720)),
    ],
)
def test_archs(names, channels):
    for name in names:
        with torch.device('meta'):
            model = OverLoCK(name)
        assert model.out_channels == channels
        assert model.out_strides == (4, 8, 16, 32)


def test_kernel_sizes():
    """The Focus-Net has those of stages 3 and 4, of which ContMix has one."""

    def sizes(arch):
        model = OverLoCK(arch)
        groups = (getattr(model, group) for group in model.block_groups)
        blocks = [group[0] for group in groups]
        convs = [getattr(b, 'lepe', b.proj) for b in blocks]
        kernels = [
            module.lk_origin.kernel_size[0]
            for conv in convs
            for module in conv
            if isinstance(module, DilatedReparamConv)
        ]
        tables = [len(b.rpb2[0]) for b in blocks[4:]]
        # It runs with them too.
        outputs = model.eval()(image(1, 32, 32))
        assert all(output.isfinite().all() for output in outputs)
        return kernels, tables

    assert sizes(TINY) == ([17, 15, 13, 7, 13, 7], [25, 13])
    arch = TINY | dict(kernel_sizes=[5, 9, 11, 19])
    assert sizes(arch) == ([5, 9, 11, 19, 11, 19], [21, 37])


@pytest.mark.parametrize(
    'out_indices, height, width',
    [((0, 1, 2, 3), 33, 70), ((1, 3), 64, 96), ((2,), 1, 5), ([0], 33, 70)],
)
def test_outputs(out_indices, height, width):
    """Shapes as promised, in the one memory format that mmcv reads."""
    model = tiny(out_indices=out_indices).eval()
    outputs = model(image(2, height, width))
    assert isinstance(outputs, tuple)
    for output, channels, stride in zip(
        outputs, model.out_channels, model.out_strides, strict=True
    ):
        size = -(-height // stride), -(-width // stride)
        assert output.shape == (2, channels, *size)
        assert output.is_contiguous()
    complete = tiny().eval()
    complete.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (1, 2), (3,)])
def test_subsets_are_the_same_maps(out_indices):
    complete = randomize(tiny()).eval()
    subset = tiny(out_indices=out_indices).eval()
    kept = subset.state_dict().keys()
    state = {k: v for k, v in complete.state_dict().items() if k in kept}
    subset.load_state_dict(state)
    expected = complete(image())
    for i, output in zip(out_indices, subset(image()), strict=True):
        torch.testing.assert_close(output, expected[i])


@pytest.mark.parametrize(
    'kwargs',
    [dict(out_indices=indices) for indices in [(0,), (1,), (0, 2), (3,)]]
    + [dict(fuse_overview=True), dict(with_cp=True)],
)
def test_every_parameter_gets_a_gradient(kwargs):
    model = randomize(tiny(**kwargs)).train()
    loss_of(model(image())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    # A shift that a batch norm removes has a zero gradient; no weight has.
    assert all(
        parameter.grad.any()
        for name, parameter in model.named_parameters()
        if name.endswith('weight')
    )


def test_input_layout_and_channels():
    model = tiny(in_channels=5).eval()
    x = image(channels=5)
    expected = model(x)
    strided = x.transpose(2, 3).contiguous().mT
    for other in (x.contiguous(memory_format=torch.channels_last), strided):
        assert not other.is_contiguous()
        for actual, wanted in zip(model(other), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('training', [False, True])
@torch.no_grad()
def test_convolutions_get_channels_last(batch, training):
    """On CPUs others are slow; one image in NCHW has ambiguous strides."""
    strides = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                x, last = args[0], torch.channels_last
                like = torch.empty(x.shape, memory_format=last)
                if x.is_contiguous() or x.is_contiguous(memory_format=last):
                    strides.append((x.stride(), like.stride()))
            return function(*args, **kwargs or {})

    model = tiny().train(training)
    with Record():
        model(image(batch))
    assert len(strides) > 30
    for actual, expected in strides:
        assert actual == expected


def test_fuse_overview():
    """It adds to the last map only, very little at first."""
    plain, fused = tiny().eval(), tiny(fuse_overview=True).eval()
    fused.load_state_dict(plain.state_dict(), strict=False)
    *expected, last = plain(image())
    *outputs, fused_last = fused(image())
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    difference = (fused_last - last).abs().max()
    assert 0 < difference < 1e-3


@pytest.mark.parametrize(
    'frozen_stages, prefixes',
    [
        (-1, ()),
        (0, ('patch_embed1',)),
        (1, ('patch_embed1', 'blocks1')),
        (2, ('patch_embed1', 'blocks1', 'patch_embed2', 'blocks2')),
        (
            3,
            (
                *('patch_embed1', 'blocks1', 'patch_embed2', 'blocks2'),
                *('patch_embed3', 'blocks3'),
            ),
        ),
        (4, ('patch_embed', 'blocks', 'high_level_proj', 'sub_blocks')),
    ],
)
def test_frozen_stages(frozen_stages, prefixes):
    model = randomize(tiny(frozen_stages=frozen_stages, fuse_overview=True))
    assert model.train() is model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    loss_of(model(image())).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    for name, buffer in model.named_buffers():
        changed = not torch.equal(buffer, before[name])
        assert changed != name.startswith(prefixes), name


def test_norm_eval():
    model = tiny(norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    assert norms and not any(norm.training for norm in norms)
    assert all(block.training for block in model.blocks1)
    before = [norm.running_mean.clone() for norm in norms]
    loss_of(model(image())).backward()
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.grad is not None


def test_norm_cfg():
    cfg = dict(type='BN', eps=0.5, momentum=0.25, requires_grad=False)
    norms = [m for m in tiny(norm_cfg=cfg).modules() if isinstance(m, NORMS)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.5, 0.25)}
    assert not any(norm.weight.requires_grad for norm in norms)
    synchronized = tiny(norm_cfg=dict(type='SyncBN'))
    assert isinstance(synchronized.patch_embed1[1], nn.SyncBatchNorm)


@pytest.mark.parametrize('with_cp', [True, (1, 0, 1, 0, 1, 1)])
def test_checkpointing(with_cp):
    """Equal outputs, gradients and statistics, with drop path on."""
    results = []
    for option in (False, with_cp):
        model = randomize(tiny(with_cp=option, drop_path_rate=0.3)).train()
        x = image().requires_grad_()
        torch.manual_seed(1)
        outputs = model(x)
        loss_of(outputs).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([*outputs, x.grad, *gradients, *model.buffers()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_checkpointing_recomputes():
    model = tiny(with_cp=(0, 1, 0, 0, 0, 0)).train()
    calls = []
    for block in (*model.blocks1, *model.blocks2):
        block.register_forward_pre_hook(lambda m, *_: calls.append(m))
    loss_of(model(image())).backward()
    assert [calls.count(b) for b in model.blocks1] == [1]
    assert [calls.count(b) for b in model.blocks2] == [2, 1]
    with torch.no_grad():
        model(image())


def test_drop_path_rates():
    """They grow linearly with depth, over all blocks."""
    model = tiny(drop_path_rate=0.7)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([i / 10 for i in range(8)])


def test_drop_path():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 1, 1)
    assert torch.equal(drop.eval()(x), x)
    torch.manual_seed(0)
    dropped = drop.train()(x)
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('kwargs', [dict(), dict(fuse_overview=True)])
def test_deploy(kwargs):
    model = randomize(tiny(**kwargs)).double().eval()
    x = image().double()
    with torch.no_grad():
        expected = model(x)
        assert model.switch_to_deploy() is model
        deployed = tiny(deploy=True, **kwargs).double().eval()
        deployed.load_state_dict(model.state_dict())
        for merged in (model, deployed, model.switch_to_deploy()):
            for actual, wanted in zip(merged(x), expected, strict=True):
                torch.testing.assert_close(actual, wanted)
    assert not any('dil_' in name for name in deployed.state_dict())


def test_initialization():
    model = OverLoCK('xt', fuse_overview=True)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name == 'h_proj.1.weight':
            assert (values == 1e-5).all()
        elif 'rpb' in name or name.endswith(('bias', 'gamma', 'beta')):
            assert not values.any(), name
        elif values.ndim == 1 or values.shape[1:] == (1, 1, 1):
            assert (values == 1).all(), name
        elif values.numel() > 10000:
            assert values.std().item() == pytest.approx(0.02, rel=0.1), name


def test_contmix_backend():
    for backend in ('reference', 'tiled', 'auto'):
        model = tiny(contmix_backend=backend)
        blocks = [m for m in model.modules() if isinstance(m, FocusBlock)]
        assert [block.contmix_backend for block in blocks] == [backend] * 3


def test_arguments_are_left_alone():
    out_indices, arch = [1, 3], dict(TINY)
    norm_cfg = dict(type='BN', requires_grad=True)
    OverLoCK(arch, out_indices=out_indices, norm_cfg=norm_cfg)
    assert out_indices == [1, 3]
    assert arch == TINY
    assert norm_cfg == dict(type='BN', requires_grad=True)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='huge'), "unknown arch 'huge'.*'xt'.*'base'"),
        (dict(arch=dict(depths=(1, 1, 1, 1))), "expected.*'focus_heads'"),
        (dict(arch=dict(TINY, heads=1)), "'heads'"),
        (dict(arch=dict(TINY, depths=(1, 1, 1))), r"'depths'.*\(1, 1, 1\)"),
        (dict(arch=dict(TINY, depths=(1, 1, 1, 0))), "'depths'"),
        (dict(arch=dict(TINY, channels=(7, 8, 16, 32))), 'even.*7, 8'),
        (dict(arch=dict(TINY, channels=(8, 8, 12, 32))), '2 .*of 8 .*got 12'),
        (dict(arch=dict(TINY, kernel_sizes=[7])), r"'kernel_sizes'.*\[7\]"),
        (dict(arch=dict(TINY, kernel_sizes=(17, 15, 4, 7))), 'size 4.*17'),
        (dict(out_indices=(0, 4)), r'from 0 to 3, got \(0, 4\)'),
        (dict(out_indices=(1, 0)), r'increasing.*\(1, 0\)'),
        (dict(out_indices=()), r'increasing.*\(\)'),
        (dict(frozen_stages=5), 'from -1 to 4, got 5'),
        (dict(drop_path_rate=1.0), r'\[0, 1\), got 1.0'),
        (dict(norm_cfg=dict(type='LN')), "'LN'.*'BN', 'SyncBN'"),
        (dict(with_cp=(1, 1)), r'with_cp.*\(1, 1\)'),
        (dict(contmix_backend='natten'), "'natten'"),
        (
            dict(depthwise_backend='cudnn'),
            "'cudnn'.*'auto', 'reference', 'triton'",
        ),
        (dict(fuse_overview=True, out_indices=(0, 1)), 'output 3'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OverLoCK(**{'arch': TINY, **kwargs})


# The fewest blocks, for tracing takes long.
SHORT = TINY | dict(depths=(1, 1, 1, 1), focus_depths=(1, 1))


@pytest.mark.parametrize(
    'dtype',
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_jit_trace(dtype):
    """It computes the same for another image of the size; it can be saved."""
    model = randomize(OverLoCK(SHORT, deploy=True)).eval().to(dtype)
    x, other = image(2, 32, 48).to(dtype).split(1)
    model(x)  # what it keeps of it must not show in the trace
    traced = torch.jit.trace(model, x, check_trace=False)
    with torch.jit.optimized_execution(False):
        torch.testing.assert_close(traced(other), model(other))
    torch.jit.save(traced, io.BytesIO())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_complexity_info():
    """mmengine's count, which traces the model, is near that of PyTorch."""
    model = OverLoCK(SHORT, deploy=True).eval()
    found = get_model_complexity_info(
        model, (3, 32, 48), show_table=False, show_arch=False
    )
    assert found['params'] == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(image(1, 32, 48))
    products = counter.get_total_flops() / 2
    assert 0.8 * products < found['flops'] < 1.2 * products
