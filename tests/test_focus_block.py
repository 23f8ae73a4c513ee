"""A Focus block in one node of autograd, against its layers in float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from fusion import far
from kernels import DEVICE, draw, exact, relative_error
from torch import nn

from mmoverlock.models import blocks
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.fuse import fuse
from mmoverlock.models.layers import DropPath
from mmoverlock.models.recomputation import recompute

pytest.importorskip('mmoverlock.ops.focus.triton', exc_type=ImportError)
SHAPE = 3, 12, 6, 5  # two of the kernel's size, so that it has two windows
pytestmark = pytest.mark.usefixtures('poison')


@pytest.fixture
def calls(auto_is_triton, monkeypatch):
    """How often the node ran."""
    calls = mock.Mock(side_effect=blocks.focus_block)
    monkeypatch.setattr(blocks, 'focus_block', calls)
    return calls


def draw_block(first, norm='BN'):
    torch.manual_seed(0)
    block = FocusBlock(
        8,
        4,
        kernel_size=5,
        heads=1,
        first=first,
        drop_path=0.25,
        norm_cfg=dict(type=norm),
        deploy=False,
    )
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        if name.startswith('ls'):
            nn.init.ones_(parameter)
    if first:  # a weight that lies in memory otherwise
        conv = block.dwconv1
        conv.weight = nn.Parameter(conv.weight.mT.contiguous().mT)
    return block.to(DEVICE)


def draw_maps(first):
    torch.manual_seed(1)
    z, initial = draw(*SHAPE), draw(SHAPE[0], 4, *SHAPE[2:])
    return [x.requires_grad_() for x in ([z] if first else [z, initial])]


def step(block, maps, grad, kernels=True):
    keeps = torch.tensor([[1, 0, 2], [0.5, 1, 0]]).to(maps[0])
    with mock.patch.object(DropPath, 'draw', lambda *_: keeps.unbind()):
        out = block(*[*maps, None][:2])
        for buffer in block.buffers() if kernels else ():
            buffer.add_(0)  # as the next batch does
        out.backward(grad)
    grads = {name: p.grad for name, p in block.named_parameters()}
    grads |= {f'map {i}': x.grad for i, x in enumerate(maps)}
    return grads | dict(out=out.detach())


@pytest.mark.parametrize('first', [True, False])
def test_value_gradients_and_statistics(first, calls, monkeypatch):
    block, maps = draw_block(first), draw_maps(first)
    other = copy.deepcopy(block).double()
    grad = draw(*SHAPE)
    results = step(block, maps, grad)
    assert calls.call_count == 1
    monkeypatch.undo()
    maps = [*map(exact, maps)]
    expected = step(other, maps, grad.double(), False)
    for name, value in expected.items():
        if value.abs().max() < 1e-9:  # of a bias before a norm; others: 100
            assert results[name].abs().max() < 1e-3, name
        else:
            assert relative_error(results[name], value) < 1e-4, name
    torch.testing.assert_close(
        dict(block.named_buffers()),
        dict(other.named_buffers()),
        check_dtype=False,
    )


def test_equal_bits_and_recomputation(calls):
    """With its maps computed again, all is as it was, and counted once."""
    results = []
    grad = draw(*SHAPE)
    for again in (False, True):
        block = draw_block(False)
        run = partial(recompute, block, block) if again else block
        run.buffers, run.named_parameters = (
            block.buffers,
            block.named_parameters,
        )
        results.append(step(run, draw_maps(False), grad))
        results[-1].update(block.named_buffers())
    assert calls.call_count == 3
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@pytest.mark.parametrize(
    'first, dtype, limit',
    [(False, torch.float32, 1e-4), (True, torch.float16, 1e-2)],
)
@torch.no_grad()
def test_inference(first, dtype, limit, calls, monkeypatch):
    """Fused, in one call, against the layers before."""
    block = far(draw_block(first))
    maps = [x.to(dtype) for x in draw_maps(first)]
    maps[-1] = maps[-1].contiguous()  # another layout
    fused = fuse(copy.deepcopy(block).float())
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = fused(*[*maps, None][:2])
    assert calls.call_count == 1
    assert out.dtype == dtype
    monkeypatch.undo()
    expected = block(*[*map(exact, maps), None][:2])
    assert relative_error(out, expected) < limit


class Taken(Exception):
    """What a form of the block is replaced by."""


def watch(block, maps):
    block.gate[0].register_forward_hook(print)


def watch_gradient(block, maps):
    block.mlp[0].register_full_backward_hook(print)


def watch_block(block, maps):
    block.register_forward_hook(print)


def freeze(block, maps):
    block.gate[1].eval()


def average(block, maps):
    block.lepe[0].origin_bn.momentum = None


def merge(block, maps):
    fuse(block)
    torch.set_grad_enabled(False)


def merge_with_gradients(block, maps):
    fuse(block)


def merge_watched(block, maps):
    merge(block, maps)
    watch(block, maps)


def merge_but_one(block, maps):
    watch(block, maps)  # which is left as it is
    merge(block, maps)
    block.gate[0]._forward_hooks.clear()


def merge_without_residual(block, maps):
    watched = block.dwconv2.register_forward_hook(print)
    merge(block, maps)
    watched.remove()


def shrink(block, maps):
    maps[:] = [x[..., :4] for x in maps]


def widen(block, maps):
    maps[0] = maps[0].double()


def replace(block, maps):
    block.contmix_backend = 'tiled'


@pytest.mark.parametrize(
    'change, form',
    [
        (lambda *_: None, 'focus_block'),
        (watch_block, 'focus_block'),
        (lambda block, _: block.eval(), 'conv_and_norm'),
        (merge, 'focus_block'),
        (merge_with_gradients, 'conv_and_norm'),
        (merge_watched, 'conv_and_norm'),
        (merge_but_one, 'conv_and_norm'),
        (merge_without_residual, 'conv_and_norm'),
        (watch, 'conv_and_norm'),
        (watch_gradient, 'conv_and_norm'),
        (freeze, 'conv_and_norm'),
        (average, 'conv_and_norm'),
        (shrink, 'conv_and_norm'),
        (widen, 'conv_and_norm'),
        (replace, 'conv_and_norm'),
    ],
)
def test_when_it_is_one_node(change, form, auto_is_triton, monkeypatch):
    def take(name, *args):
        raise Taken(name)

    for name in ('focus_block', 'conv_and_norm'):
        monkeypatch.setattr(blocks, name, partial(take, name))
    block, maps = draw_block(True), draw_maps(True)
    with torch.enable_grad():
        change(block, maps)
        with pytest.raises(Taken, match=form):
            block(maps[0], None)


def test_synchronized_norms_are_no_part_of_it(auto_is_triton, monkeypatch):
    monkeypatch.setattr(blocks, 'focus_block', None)
    monkeypatch.setattr(blocks, 'conv_and_norm', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_block(True, 'SyncBN')(*draw_maps(True), None)


def test_paths_are_dropped_in_one_launch(monkeypatch):
    """With the values that they have elsewhere."""
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    x = torch.empty(2000, 1, 1, 1, dtype=torch.bfloat16)
    torch.manual_seed(0)
    first, second = DropPath(0.2).draw(x, 2)
    assert not torch.equal(first, second)
    for keep in (first, second):
        assert keep.shape == (2000,)
        assert keep.dtype == torch.float32
        assert set(keep.tolist()) == {0, 1.25}
        assert abs(keep.mean().item() - 1) < 0.05
