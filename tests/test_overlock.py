"""The backbone's contract; test_robustness.py has odd inputs and layouts."""

import math

import pytest
import torch
from networks import IMAGES, backbone, loss_of, noise
from tiny import DEEPER as TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock, RepConvBlock
from mmoverlock.models.layers import DropPath


def test_initialization():
    model = OverLoCK('Extreme-Tiny', fuse_overview=True)
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


def test_settings():
    """They reach all parts, and what the caller has stays as it is."""
    cfg = dict(type='BN', eps=0.5, momentum=0.25, requires_grad=False)
    given = dict(arch=dict(TINY), out_indices=[1, 3], norm_cfg=dict(cfg))
    model = OverLoCK(**given, contmix_backend='reference')
    assert given == dict(arch=TINY, out_indices=[1, 3], norm_cfg=cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (0.5, 0.25)
            assert not module.weight.requires_grad
        elif isinstance(module, FocusBlock):
            assert module.contmix_backend == 'reference'
    synchronized = backbone(norm_cfg=dict(type='SyncBN'))
    assert isinstance(synchronized.patch_embed1[1], nn.SyncBatchNorm)


class OwnForward(RepConvBlock):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize('other', ['class', 'hook'])
def test_block_that_is_something_else(other):
    """It gets its map alone, and the others drop as they do beside it."""
    model, seen = backbone(drop_path_rate=0.9).train(), []
    if other == 'class':
        model.blocks2[0].__class__ = OwnForward
    else:
        hook = model.blocks2[0].register_forward_pre_hook
        hook(lambda block, args: seen.append(len(args)))
    with torch.no_grad():
        outs = model(IMAGES)
    assert all(out.isfinite().all() for out in outs)
    assert seen == [1] * (other == 'hook')


def test_drop_path_rates():
    """They grow linearly with depth, over all blocks."""
    model = backbone(drop_path_rate=0.7)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([i / 10 for i in range(8)])


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='huge'), "unknown arch 'huge'.*'xt'.*'base'"),
        (dict(arch=dict(TINY, heads=1)), "'heads'"),
        (dict(arch=dict(TINY, depths=(1, 1, 1, 1.5))), "'depths'.*1.5"),
        (dict(arch=dict(TINY, channels=(7, 8, 16, 32))), 'even.*7, 8'),
        (dict(arch=dict(TINY, channels=(8, 8, 12, 32))), '2 .*of 8 .*got 12'),
        (dict(arch=dict(TINY, kernel_sizes=(17, 15, 4, 7))), 'size 4.*17'),
        (dict(in_channels=0), 'in_channels.*got 0'),
        (dict(out_indices=(1, 0)), r'increasing.*\(1, 0\)'),
        (dict(out_indices=3), 'out_indices.*got 3'),
        (dict(frozen_stages=5), 'from -1 to 4, got 5'),
        (dict(drop_path_rate=math.nan), 'drop_path_rate.*got nan'),
        (dict(norm_cfg=dict(type='LN')), "'LN'.*'BN', 'SyncBN'"),
        (dict(norm_eval=None), 'norm_eval.*got None'),
        (dict(with_cp=(1, 1)), r'with_cp.*\(1, 1\)'),
        (dict(contmix_backend='natten'), "'natten'"),
        (dict(depthwise_backend='cudnn'), "'cudnn'.*'auto', .*'triton'"),
        (dict(fuse_overview=True, out_indices=(0, 1)), 'output 3'),
        (dict(classifier=True, out_indices=(1, 3)), r'=True .*got \(1, 3\)'),
        (dict(classifier=True, fuse_overview=True), '=True .* and True'),
        (dict(init_cfg=[dict(checkpoint='a.pth')]), 'init_cfg.*a.pth'),
        (dict(compile='yes'), "compile must be.*'yes'"),
        (dict(cuda_graphs=-1), 'cuda_graphs must be True'),
        (dict(cuda_graphs=True, with_cp=True), 'neither compile nor with_cp'),
        (dict(cuda_graphs=True, compile={}), 'neither compile nor with_cp'),
        (dict(norm_cfg='BN'), "norm_cfg.*got 'BN'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OverLoCK(**{'arch': TINY, **kwargs})


def test_outputs():
    """Any subset has the same maps; test_robustness.py has their shapes."""
    x = noise(2, 3, 33, 70)
    complete = backbone().eval()
    maps, state = complete(x), complete.state_dict()
    for out_indices in ([0], (1, 2), (2,), (1, 3)):
        model = OverLoCK(TINY, out_indices=out_indices).eval()
        model.load_state_dict(
            {name: state[name] for name in model.state_dict()}
        )
        expected = tuple(maps[i] for i in out_indices)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('batch, training', [(1, False), (2, True)])
@torch.no_grad()
def test_convolutions_get_channels_last(batch, training):
    """On CPUs others are slow; one image in NCHW has ambiguous strides."""
    last = torch.channels_last
    found = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                x = args[0]
                if x.is_contiguous() or x.is_contiguous(memory_format=last):
                    like = torch.empty(x.shape, memory_format=last)
                    found.append(x.stride() == like.stride())
            return function(*args, **kwargs or {})

    model = backbone().train(training)
    with Record():
        model(IMAGES[:batch])
    assert len(found) > 30 and all(found)


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    """Parameters do not learn, and batch norms are in eval mode."""
    steps = (
        ['patch_embed1'],
        ['blocks1'],
        ['patch_embed2', 'blocks2'],
        ['patch_embed3', 'blocks3'],
        ['patch_embed', 'blocks4', 'high_level_proj', 'sub_blocks'],
    )
    prefixes = tuple(sum(steps[: frozen_stages + 1], []))
    model = backbone(frozen_stages=frozen_stages, fuse_overview=True)
    assert model.train() is model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    for name, module in model.named_modules():
        if name and isinstance(module, nn.BatchNorm2d):
            assert module.training != name.startswith(prefixes), name


def test_norm_eval():
    """Statistics stay, weights learn; nothing else is in eval mode."""
    model = backbone(norm_eval=True)
    assert all(block.training for block in model.blocks1)
    before = [buffer.clone() for buffer in model.buffers()]
    loss_of(model(IMAGES)).backward()
    torch.testing.assert_close([*model.buffers()], before, rtol=0, atol=0)
    assert model.patch_embed1[1].weight.grad.any()


def test_recomputation():
    """Of the named blocks only; with drop path on, results are equal.

    So they are where a graph is retained for a second backward pass.
    """
    results, calls = [], []
    for option in (False, (0, 1, 1, 1, 1, 1)):
        model = backbone(with_cp=option, drop_path_rate=0.3).train()
        calls.clear()
        for block in (*model.blocks1, *model.blocks2):
            block.register_forward_pre_hook(lambda m, _: calls.append(m))
        x = IMAGES.clone().requires_grad_()
        torch.manual_seed(1)
        outputs = model(x)
        loss_of(outputs).backward(retain_graph=True)
        loss_of(outputs[:1]).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([*outputs, x.grad, *gradients, *model.buffers()])
    torch.testing.assert_close(*results)
    blocks = *model.blocks1, *model.blocks2
    assert [calls.count(block) for block in blocks] == [1, 2, 1]
    with torch.no_grad():
        model(IMAGES)
    counts = backbone(with_cp=True).checkpointed
    assert [*counts.values()] == [1, 2, 1, 1, 2, 1]
