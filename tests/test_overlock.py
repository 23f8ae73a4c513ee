"""The backbone's contract."""

import io

import pytest
import torch
from tiny import ARCH as SHORT
from tiny import DEEPER as TINY
from tiny import randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.layers import DropPath
from mmoverlock.models.reparam import DilatedReparamConv


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
    'names, channels, parameters, merged_away',
    [
        (('xt', 'extreme-tiny', 'XT'), (56, 112, 340, 420), 15657380, 515888),
        (('t', 'tiny'), (64, 128, 384, 640), 33127096, 1009408),
        (('s', 'small'), (64, 128, 448, 640), 56446524, 1639296),
        (('b', 'base'), (80, 160, 528, 720), 96091496, 2492288),
    ],
)
def test_archs(names, channels, parameters, merged_away):
    """The release's counts; its detectors merge what classifiers merge."""
    with torch.device('meta'):
        models = [OverLoCK(name, fuse_overview=True) for name in names]
        models.append(OverLoCK(names[0], fuse_overview=True, deploy=True))
    assert {model.out_channels for model in models} == {channels}
    assert models[0].out_strides == (4, 8, 16, 32)
    *counts, merged = (
        sum(parameter.numel() for parameter in model.parameters())
        for model in models
    )
    assert {*counts} == {parameters}
    assert parameters - merged == merged_away


@pytest.mark.parametrize(
    'arch, kernels, tables',
    [
        (TINY, [17, 15, 13, 7, 13, 7], [25, 13]),
        (
            TINY | dict(kernel_sizes=[5, 9, 11, 19]),
            *([5, 9, 11, 19, 11, 19], [21, 37]),
        ),
    ],
)
def test_kernel_sizes(arch, kernels, tables):
    """The Focus-Net has those of stages 3 and 4, of which ContMix has one."""
    model = OverLoCK(arch)
    blocks = [getattr(model, group)[0] for group in model.block_groups]
    assert kernels == [
        module.lk_origin.kernel_size[0]
        for block in blocks
        for module in getattr(block, 'lepe', block.proj)
        if isinstance(module, DilatedReparamConv)
    ]
    assert tables == [len(block.rpb2[0]) for block in blocks[4:]]
    outputs = model.eval()(image(1, 32, 32))
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize(
    'out_indices, height, width',
    [
        ((0, 1, 2, 3), 33, 70),
        ([0], 33, 70),
        ((0, 1), 33, 70),
        ((1, 2), 64, 96),
        ((2,), 1, 5),
        ((1, 3), 64, 96),
    ],
)
def test_outputs(out_indices, height, width):
    """Shapes as promised, in the one memory format that mmcv reads.

    A subset has the same maps, and no parameter without a gradient.
    """
    x = image(2, height, width)
    complete = randomize(tiny()).eval()
    model = tiny(out_indices=out_indices).eval()
    own, state = model.state_dict().keys(), complete.state_dict()
    model.load_state_dict({name: state[name] for name in own})
    maps, outputs = complete(x), model(x)
    assert isinstance(outputs, tuple)
    for i, output, channels, stride in zip(
        *(out_indices, outputs, model.out_channels, model.out_strides),
        strict=True,
    ):
        size = -(-height // stride), -(-width // stride)
        assert output.shape == (2, channels, *size)
        assert output.is_contiguous()
        torch.testing.assert_close(output, maps[i])
    loss_of(outputs).backward()
    assert_gradients(model)


def assert_gradients(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('out_indices', [(0, 2), (0, 1, 2, 3)])
def test_training(out_indices):
    """Every weight learns; a batch norm removes what some biases do."""
    fuse_overview = 3 in out_indices
    model = tiny(out_indices=out_indices, fuse_overview=fuse_overview)
    loss_of(randomize(model).train()(image())).backward()
    assert_gradients(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() or not name.endswith('weight'), name


def test_input_layout_and_channels():
    model = tiny(in_channels=5).eval()
    x = image(channels=5)
    expected = model(x)
    strided = x.transpose(2, 3).contiguous().mT
    for other in (x.contiguous(memory_format=torch.channels_last), strided):
        assert not other.is_contiguous()
        torch.testing.assert_close(model(other), expected)


@pytest.mark.parametrize('batch, training', [(1, False), (2, True)])
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
    torch.testing.assert_close(outputs, expected)
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
            tuple(f'{p}{i}' for p in ('patch_embed', 'blocks') for i in '123'),
        ),
        (4, ('patch_embed', 'blocks', 'high_level_proj', 'sub_blocks')),
    ],
)
def test_frozen_stages(frozen_stages, prefixes):
    model = tiny(frozen_stages=frozen_stages, fuse_overview=True)
    assert model.train() is model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    for name, module in model.named_modules():
        if name and isinstance(module, nn.BatchNorm2d):
            assert module.training != name.startswith(prefixes), name


def test_norm_eval():
    """Statistics stay, weights learn; nothing else is in eval mode."""
    model = tiny(norm_eval=True).train()
    assert all(block.training for block in model.blocks1)
    before = [buffer.clone() for buffer in model.buffers()]
    loss_of(model(image())).backward()
    torch.testing.assert_close([*model.buffers()], before, rtol=0, atol=0)
    assert model.patch_embed1[1].weight.grad.any()


def test_norm_cfg():
    cfg = dict(type='BN', eps=0.5, momentum=0.25, requires_grad=False)
    norms = [
        module
        for module in tiny(norm_cfg=cfg).modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.5, 0.25)}
    assert not any(norm.weight.requires_grad for norm in norms)
    synchronized = tiny(norm_cfg=dict(type='SyncBN'))
    assert isinstance(synchronized.patch_embed1[1], nn.SyncBatchNorm)


def test_checkpointing():
    """Equal outputs, gradients and statistics, with drop path on."""
    results, calls = [], []
    for option in (False, (0, 1, 1, 1, 1, 1)):
        model = randomize(tiny(with_cp=option, drop_path_rate=0.3)).train()
        if option:
            for block in (*model.blocks1, *model.blocks2):
                block.register_forward_pre_hook(lambda m, _: calls.append(m))
        x = image().requires_grad_()
        torch.manual_seed(1)
        outputs = model(x)
        loss_of(outputs).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([*outputs, x.grad, *gradients, *model.buffers()])
    torch.testing.assert_close(*results)
    # Only the blocks that it names run again.
    assert [calls.count(block) for block in model.blocks1] == [1]
    assert [calls.count(block) for block in model.blocks2] == [2, 1]
    with torch.no_grad():
        model(image())
    assert [*tiny(with_cp=True).checkpointed.values()] == [1, 2, 1, 1, 2, 1]


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


@torch.no_grad()
def test_deploy():
    model = randomize(tiny(fuse_overview=True)).double().eval()
    x = image().double()
    expected = model(x)
    assert model.switch_to_deploy() is model
    deployed = tiny(deploy=True, fuse_overview=True).double().eval()
    deployed.load_state_dict(model.state_dict())
    for merged in (model, deployed, model.switch_to_deploy()):
        torch.testing.assert_close(merged(x), expected)
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
    model = tiny(contmix_backend='reference')
    blocks = [m for m in model.modules() if isinstance(m, FocusBlock)]
    assert [block.contmix_backend for block in blocks] == ['reference'] * 3


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
        (dict(depthwise_backend='cudnn'), "'cudnn'.*'auto', .*'triton'"),
        (dict(fuse_overview=True, out_indices=(0, 1)), 'output 3'),
        (dict(classifier=True, out_indices=(1, 3)), r'=True .*got \(1, 3\)'),
        (dict(classifier=True, fuse_overview=True), '=True .* and True'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OverLoCK(**{'arch': TINY, **kwargs})


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_jit_trace():
    """It computes the same for another image of the size; it can be saved."""
    model = randomize(OverLoCK(SHORT, deploy=True)).eval()
    x, other = image(2, 32, 48).split(1)
    model(x)  # what it keeps of it must not show in the trace
    traced = torch.jit.trace(model, x, check_trace=False)
    with torch.jit.optimized_execution(False):
        torch.testing.assert_close(traced(other), model(other))
    torch.jit.save(traced, io.BytesIO())
