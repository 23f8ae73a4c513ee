"""Layers of blocks that run one by one, with kernels, as on a GPU."""

import copy
from functools import partial

import pytest
import torch
from kernels import DEVICE, NHWC, draw, exact, relative_error
from networks import backbone, make_block
from tiny import ARCH
from torch import nn

from benchmarks import count
from mmoverlock.models.blocks import FocusBlock, RepConvBlock

pytest.importorskip('triton', '3.6')
BLOCKS = {
    'rep': partial(make_block, RepConvBlock, 16, layer_scale=True),
    'focus': partial(make_block, FocusBlock, 16, 8, heads=2, first=False),
}


def draw_block(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().to(DEVICE)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    if name == 'rep':
        return block, [draw(2, 16, 6, 7)]
    return block, [draw(1, 24, 6, 7), draw(1, 8, 6, 7)]


@pytest.mark.parametrize('fuse_overview', [False, True])
def test_network(fuse_overview, auto_is_triton):
    """Every map is in channels_last on the way, and contiguous at the end.

    What the last norm of a map makes is, unless something else reads it.
    """
    arch = ARCH | dict(channels=(8, 8, 16, 32), kernel_sizes=(5, 7, 7, 5))
    model = backbone(arch, fuse_overview=fuse_overview).to(DEVICE).eval()
    other = copy.deepcopy(model).double()
    x = draw(1, 3, 32, 64)
    kept, final = [], []
    for module in model.modules():
        if isinstance(module, RepConvBlock | FocusBlock):
            module.register_forward_hook(lambda *args: kept.append(args[-1]))
    for norm in model.extra_norm.values():
        norm.register_forward_hook(lambda *args: final.append(args[-1]))
    with torch.no_grad():
        outs, expected = model(x), other(x.double())
    assert len(kept) == 6
    assert all(x.is_contiguous(memory_format=NHWC) for x in kept)
    last = [False, False] if fuse_overview else [True]
    # Output 1 comes first
    assert [x.is_contiguous() for x in final] == [False, True, True, *last]
    for out, value in zip(outs, expected, strict=True):
        assert out.is_contiguous()
        assert relative_error(out, value) < 1e-5


@pytest.mark.parametrize('name', BLOCKS)
def test_layers_with_kernels(name, auto_is_triton):
    """They run where a hook is; batches are counted once."""
    block, maps = draw_block(name)
    expected = copy.deepcopy(block).double()(*map(exact, maps))
    block.proj[0].register_forward_hook(lambda *args: None)
    assert relative_error(block(*maps), expected) < 2e-6
    for key, buffer in block.named_buffers():
        if key.endswith('num_batches_tracked'):
            assert buffer == 1, key


def add_hook(layer, seen):
    hook = layer.register_forward_hook(lambda *args: seen.append(args[0]))
    return hook.remove


def add_adapter(layer, seen):
    kind = type(layer)

    class Adapter(kind):
        def forward(self, *args, **kwargs):
            seen.append(self)
            return super().forward(*args, **kwargs)

    layer.__class__ = Adapter
    return lambda: setattr(layer, '__class__', kind)


@pytest.mark.parametrize('kernels', [False, True])
@pytest.mark.parametrize('change', [add_hook, add_adapter])
@pytest.mark.parametrize('name', BLOCKS)
def test_layers_that_are_called(name, change, kernels, request, monkeypatch):
    """One that has a hook, or computes in another way; of all, in turn."""
    if kernels:
        request.getfixturevalue('auto_is_triton')
        for kind in count._kernels():  # which compute nothing here
            monkeypatch.setattr(kind, 'run', lambda *_, **__: None)
    block, maps = draw_block(name)
    # Dropped paths are drawn before; sequences are not called.
    uncalled = {'proj', 'proj.9', 'mlp', 'drop_path', 'weight_proj'}
    if name == 'focus':
        uncalled.remove('proj')
    seen = []
    for training in (True, False):
        block.train(training)
        expected = block(*maps)
        for child, layer in block.named_modules():
            if change is add_adapter and child in ('', 'weight_proj'):
                continue
            undo = change(layer, seen)
            out = block(*maps)
            undo()
            assert seen == [layer] * (child not in uncalled), child
            seen.clear()
            if not kernels:
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kernels', [False, True])
def test_padding(kernels, request):
    """Around a ring, every place is like another."""
    if kernels:
        request.getfixturevalue('auto_is_triton')
    block, (x,) = draw_block('rep')
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = 'circular'
    torch.testing.assert_close(
        block(x.roll(2, 3)), block(x).roll(2, 3), rtol=1e-4, atol=1e-4
    )


def test_nothing_takes_the_place_of_a_part():
    block, maps = draw_block('focus')
    block.weight_proj.padding_mode = 'circular'  # as of all layers
    block(*maps)
    add_adapter(block.weight_proj, [])
    with pytest.raises(TypeError, match='weight_proj is a part.*Adapter'):
        block(*maps)
    block.drop_path = nn.Identity()
    with pytest.raises(TypeError, match='what drops paths.*Identity'):
        block(*maps)
