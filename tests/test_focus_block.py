"""A Focus block in one node of autograd, against its layers in float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import copy
from unittest import mock

import pytest
import torch
from kernels import DEVICE, draw, exact, relative_error
from torch import nn

from mmoverlock.models import blocks
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.layers import DropPath

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
    return block.to(DEVICE)


def draw_maps(first):
    torch.manual_seed(1)
    z, initial = draw(*SHAPE), draw(SHAPE[0], 4, *SHAPE[2:])
    return [x.requires_grad_() for x in ([z] if first else [z, initial])]


def step(block, maps, grad):
    keeps = torch.tensor([[1, 0, 2], [0.5, 1, 0]]).to(maps[0])
    with mock.patch.object(DropPath, 'draw', lambda *_: keeps.unbind()):
        out = block(*[*maps, None][:2])
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
    expected = step(other, [*map(exact, maps)], grad.double())
    for name, value in expected.items():
        if value.abs().max() < 1e-9:  # of a bias before a norm
            assert results[name].abs().max() < 1e-4, name
        else:
            assert relative_error(results[name], value) < 1e-4, name
    torch.testing.assert_close(
        dict(block.named_buffers()),
        dict(other.named_buffers()),
        check_dtype=False,
    )
