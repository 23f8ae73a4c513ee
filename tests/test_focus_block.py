"""A Focus block in one node of autograd, against its layers in float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fusion import far
from kernels import DEVICE, draw, exact, relative_error
from torch import nn

from mmoverlock.models import blocks
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.fuse import fuse
from mmoverlock.models.layers import DropPath
from mmoverlock.models.recomputation import recompute

focus = pytest.importorskip(
    'mmoverlock.ops.blocks.triton.focus', exc_type=ImportError
)
SHAPE = 2, 12, 6, 5  # two of the kernel's size, so that it has two windows
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
            nn.init.normal_(parameter, 1, 0.3)
    if first:  # a weight that lies in memory otherwise
        conv = block.dwconv1
        conv.weight = nn.Parameter(conv.weight.mT.contiguous().mT)
    return block.to(DEVICE)


def draw_maps(first):
    torch.manual_seed(1)
    z, initial = draw(*SHAPE), draw(SHAPE[0], 4, *SHAPE[2:])
    return [x.requires_grad_() for x in ([z] if first else [z, initial])]


def step(block, maps, run=None, kernels=True):
    """The output, gradients and buffers."""
    torch.manual_seed(2)
    grad = draw(*SHAPE, dtype=maps[0].dtype)
    keeps = torch.tensor([[0, 2], [0.5, 0]]).to(maps[0])
    with mock.patch.object(DropPath, 'draw', lambda *_: keeps.unbind()):
        out = (run or block)(*[*maps, None][:2])
        for buffer in block.buffers() if kernels else ():
            buffer.add_(0)  # as the next batch does
        out.backward(grad)
    grads = {name: p.grad for name, p in block.named_parameters()}
    grads |= {f'map {i}': x.grad for i, x in enumerate(maps)}
    return grads | dict(out=out.detach()), dict(block.named_buffers())


@pytest.mark.parametrize('first', [True, False])
def test_value_gradients_and_statistics(first, calls, monkeypatch):
    """And the same bits where maps are computed again, counted once."""
    results, buffers = step(draw_block(first), draw_maps(first))
    assert calls.call_count == 1
    if not first:
        block = draw_block(first)
        again = step(block, draw_maps(first), partial(recompute, block, block))
        assert calls.call_count == 3
        torch.testing.assert_close(again, (results, buffers), rtol=0, atol=0)
    monkeypatch.undo()
    maps = [*map(exact, draw_maps(first))]
    expected, others = step(draw_block(first).double(), maps, kernels=False)
    for name, value in expected.items():
        if value.abs().max() < 1e-9:  # of a bias before a norm; others: 100
            assert results[name].abs().max() < 1e-3, name
        else:
            assert relative_error(results[name], value) < 1e-4, name
    torch.testing.assert_close(buffers, others, check_dtype=False)


@pytest.mark.parametrize('size', [(9, 16), (3, 20)])
def test_gradient_of_means(size):
    """Of the last channels behind a norm, of more and fewer rows than 7."""
    torch.manual_seed(0)
    x, grad, weight = draw(2, 6, *size), draw(2, 6, *size), draw(6)
    pooled = draw(2, 4, 7, 7)
    out, _ = focus.layer_norm.backward(grad, x, weight, 1e-6, pooled=pooled)
    x, weight = exact(x), weight.double()
    y = F.layer_norm(x.movedim(1, 3), (6,), weight, eps=1e-6).movedim(3, 1)
    means = F.adaptive_avg_pool2d(y[:, 2:], 7)
    grads = grad.double(), pooled.double()
    (expected,) = torch.autograd.grad((y, means), x, grads)
    assert relative_error(out, expected) < 1e-5


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


def watch(block):
    block.gate[0].register_forward_hook(print)


def freeze(block):
    block.gate[1].eval()


def average(block):
    block.lepe[0].origin_bn.momentum = None


def replace(block):
    block.contmix_backend = 'tiled'


def merge(block):
    fuse(block)
    torch.set_grad_enabled(False)


def merge_watched(block):
    merge(block)
    watch(block)


def merge_but_one(block):
    watch(block)  # which is left as it is
    merge(block)
    block.gate[0]._forward_hooks.clear()


def merge_without_residual(block):
    watched = block.dwconv2.register_forward_hook(print)
    merge(block)
    watched.remove()


CHANGES = [
    *(watch, freeze, average, replace),
    *(lambda block: block.eval(), lambda block: fuse(block)),
    *(merge_watched, merge_but_one, merge_without_residual),
]


@pytest.mark.parametrize(
    'change, is_one',
    [
        (lambda block: None, True),
        (lambda block: block.register_forward_hook(print), True),
        (merge, True),
        *((change, False) for change in CHANGES),
    ],
)
def test_when_it_is_one_node(change, is_one, auto_is_triton, monkeypatch):
    monkeypatch.setattr(blocks, 'focus_block', mock.Mock(side_effect=KeyError))
    monkeypatch.setattr(blocks, 'conv_and_norm', lambda *_: 1 / 0)
    block, (z,) = draw_block(True), draw_maps(True)
    with torch.enable_grad():
        change(block)
        with pytest.raises(KeyError if is_one else ZeroDivisionError):
            block(z, None)
        for other in (z[..., :4], z.double()):
            with pytest.raises(ZeroDivisionError):
                block(other, None)


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
