"""Blocks in one node of autograd, against their layers in float64.

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
from networks import make_block
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mmoverlock.models import blocks
from mmoverlock.models.blocks import FocusBlock, RepConvBlock
from mmoverlock.models.fuse import fuse
from mmoverlock.models.recomputation import recompute
from mmoverlock.ops import backends

tape = pytest.importorskip('mmoverlock.ops.tape', exc_type=ImportError)
focus = pytest.importorskip(
    'mmoverlock.ops.blocks.triton.focus', exc_type=ImportError
)
SHAPE = 2, 12, 6, 5  # two of the kernel's size, so that it has two windows
pytestmark = pytest.mark.usefixtures('poison')

TRY = backends._try
NODES = 'repconv_block', 'focus_block'
REP_BLOCK = partial(make_block, RepConvBlock, 12, drop_path=0.25)
FOCUS_BLOCK = partial(make_block, FocusBlock, 8, 4, heads=1, drop_path=0.25)
BLOCKS = {  # of 12 channels; a Focus block has two maps, but for the first
    'rep': partial(REP_BLOCK, layer_scale=False),
    'rep, scaled': partial(REP_BLOCK, layer_scale=True),
    'focus, first': partial(FOCUS_BLOCK, first=True),
    'focus': partial(FOCUS_BLOCK, first=False),
    'focus, enlarged': partial(FOCUS_BLOCK, first=False),
}
ONE_MAP = 'rep, scaled', 'focus, first'


@pytest.fixture
def calls(auto_is_triton, monkeypatch):
    """Runs of nodes, of which there are no tapes yet."""
    monkeypatch.setattr(tape, '_tapes', {})
    calls = mock.Mock()
    for name in NODES:
        node = getattr(blocks, name)

        def run(*args, node=node):
            calls()
            return node(*args)

        monkeypatch.setattr(blocks, name, run)
    return calls


def draw_block(name, norm='BN'):
    torch.manual_seed(0)
    block = BLOCKS[name](norm_cfg=dict(type=norm))
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        if name.startswith('ls'):
            nn.init.normal_(parameter, 1, 0.3)
    # A weight that lies in memory otherwise
    conv = block.dwconv1 if hasattr(block, 'dwconv1') else block.dwconv
    conv.weight = nn.Parameter(conv.weight.mT.contiguous().mT)
    return block.to(DEVICE)


def draw_maps(name):
    torch.manual_seed(1)
    batch, channels, *size = SHAPE
    if name == 'focus, enlarged':
        size = 4, 3  # less than the kernel's
    maps = [draw(batch, count, *size) for count in (channels, 4)]
    return [
        x.requires_grad_()
        for x in maps[: 1 + (name in ('focus', 'focus, enlarged'))]
    ]


def draw_few(name, size=2):
    """Small maps of one image."""
    maps = [x.detach()[:1, :, :size, :size] for x in draw_maps(name)]
    return [x.contiguous().requires_grad_() for x in maps]


def arguments(block, maps):
    """Of a call; a Focus block that is the first reads no prior."""
    return [*maps, None][:2] if isinstance(block, FocusBlock) else maps


def step(block, maps, run=None, kernels=True):
    """The output, gradients and buffers."""
    torch.manual_seed(2)
    grad = draw(*maps[0].shape, dtype=maps[0].dtype)
    keeps = torch.tensor([[0, 2], [0.5, 0]]).to(maps[0])
    keeps = keeps[:, -len(maps[0]) :]
    with mock.patch.object(
        blocks, 'draw_paths', lambda paths, x: [keeps[: paths[0].branches]]
    ):
        out = (run or block)(*arguments(block, maps))
        for buffer in block.buffers() if kernels else ():
            buffer.add_(0)  # as the next batch does
        out.backward(grad)
    grads = {name: p.grad for name, p in block.named_parameters()}
    grads |= {f'map {i}': x.grad for i, x in enumerate(maps)}
    return grads | dict(out=out.detach()), dict(block.named_buffers())


@pytest.mark.parametrize('name', BLOCKS)
def test_value_gradients_and_statistics(name, calls, monkeypatch):
    """And the same bits where maps are computed again, counted once."""
    results, buffers = step(draw_block(name), draw_maps(name))
    assert calls.call_count == 1
    if name in ('rep', 'focus'):
        block = draw_block(name)
        again = step(block, draw_maps(name), partial(recompute, block, block))
        assert calls.call_count == 3
        torch.testing.assert_close(again, (results, buffers), rtol=0, atol=0)
    monkeypatch.undo()
    maps = [*map(exact, draw_maps(name))]
    expected, others = step(draw_block(name).double(), maps, kernels=False)
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
    x, weight = exact(x).requires_grad_(), weight.double()
    y = F.layer_norm(x.movedim(1, 3), (6,), weight, eps=1e-6).movedim(3, 1)
    means = F.adaptive_avg_pool2d(y[:, 2:], 7)
    grads = grad.double(), pooled.double()
    (expected,) = torch.autograd.grad((y, means), x, grads)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize(
    'name, dtype, limit',
    [
        ('rep', torch.float16, 1e-2),
        ('rep, scaled', torch.float32, 1e-4),
        ('focus, first', torch.float16, 1e-2),
        ('focus', torch.float32, 1e-4),
        ('focus, enlarged', torch.float32, 1e-4),
    ],
)
@torch.no_grad()
def test_inference(name, dtype, limit, calls, monkeypatch):
    """Fused, in one call, against the layers before."""
    block = far(draw_block(name))
    maps = [x.to(dtype) for x in draw_maps(name)]
    maps[-1] = maps[-1].contiguous()  # another layout
    fused = fuse(copy.deepcopy(block).float())
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = fused(*arguments(fused, maps))
    assert calls.call_count == 1
    assert out.dtype == dtype
    monkeypatch.undo()
    expected = block(*arguments(block, [*map(exact, maps)]))
    assert relative_error(out, expected) < limit


@pytest.fixture
def is_one_node(auto_is_triton, monkeypatch):
    """Whether a block would run as one node; neither it nor layers do."""
    for node in NODES:
        monkeypatch.setattr(blocks, node, mock.Mock(side_effect=KeyError))
    monkeypatch.setattr(blocks, 'conv_and_norm', lambda *_: 1 / 0)

    def is_one_node(block, z):
        with pytest.raises((KeyError, ZeroDivisionError)) as error:
            block(*arguments(block, [z]))
        return error.type is KeyError

    return is_one_node


REP = dict(se='proj.3', conv='proj.1', norm='proj.2', dw='dwconv')
FOCUS = dict(se='se_layer', conv='lepe.0', norm='gate.1', dw='mlp.2')


def parts_of(block):
    """A function that gets a part of any block by one name."""
    names = FOCUS if isinstance(block, FocusBlock) else REP
    names = {'': '', 'bn': names['conv'] + '.origin_bn'} | names
    return lambda name: block.get_submodule(names[name])


def watch(part):
    return part.register_forward_hook(print)


def merge(part, *watched):
    """For inference, but for what is watched meanwhile."""
    fuse(part(''))
    for hook in watched:
        hook.remove()
    torch.set_grad_enabled(False)


CHANGES = [
    (lambda part: None, True),
    (lambda part: watch(part('')), True),
    (lambda part: merge(part), True),
    (lambda part: part('norm').eval(), False),
    (lambda part: setattr(part('norm'), 'affine', False), False),
    (lambda part: setattr(part('bn'), 'momentum', None), False),
    (lambda part: setattr(part('conv'), 'backend', 'reference'), False),
    (lambda part: part('dw').absorb_residual(), False),
    (lambda part: part('conv').switch_to_deploy(), False),
    (lambda part: part('').eval(), False),
    (lambda part: fuse(part('')), False),
    (lambda part: (merge(part), watch(part('se'))), False),
    (lambda part: merge(part, watch(part('norm'))), False),
    (lambda part: merge(part, watch(part('dw'))), False),
]
OTHERS = {
    'rep, scaled': lambda part: setattr(part(''), 'ls', nn.Identity()),
    'focus, first': lambda part: setattr(part(''), 'contmix_backend', 'tiled'),
}


@pytest.mark.parametrize(
    'name, change, expected',
    [(name, *change) for name in ONE_MAP for change in CHANGES]
    + [(name, change, False) for name, change in OTHERS.items()],
)
def test_when_it_is_one_node(name, change, expected, is_one_node):
    block, (z,) = draw_block(name), draw_maps(name)
    with torch.enable_grad():
        change(parts_of(block))
        assert is_one_node(block, z) == expected
        assert not is_one_node(block, z.double())


@pytest.mark.parametrize('name', ONE_MAP)
def test_groups_of_processes(name, is_one_node, monkeypatch):
    """All norms have to be of one; it takes the same way for every map."""
    block, (z,) = draw_block(name), draw_maps(name)
    z = z[:1, :, :1, :1]  # which has no deviation
    assert not is_one_node(block, z)
    monkeypatch.setattr(blocks, 'group_of', lambda norm: norm.eps)
    assert is_one_node(block, z)
    parts_of(block)('norm').eps = 1
    assert not is_one_node(block, z)


@pytest.mark.parametrize('name', ['rep', 'focus, first'])
def test_graphs_of_make_fx(name, auto_is_triton):
    """They have the operators of the layers in them."""
    block, maps = draw_block(name), draw_maps(name)
    with torch.no_grad():
        graph = make_fx(block)(*arguments(block, maps)).graph
    targets = [str(node.target) for node in graph.nodes]
    assert sum(name.startswith('mmoverlock.') for name in targets) >= 5


def test_gradients_have_none(calls):
    """Of their own: an error, though the output's gradient is a constant."""
    (x,) = draw_few('rep')
    out = draw_block('rep')(2 * x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='has no gradient'):
        grad.square().sum().backward()


@pytest.mark.parametrize('name', ONE_MAP)
def test_empty_maps(name, auto_is_triton, monkeypatch):
    """Of a group they are errors, as others wait; kernels are not given up."""
    monkeypatch.setattr(backends, '_try', tried := mock.Mock(wraps=TRY))
    block, (z,) = draw_block(name), draw_maps(name)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, 'group_of', lambda norm: 'some')
        with pytest.raises(ValueError, match=r'empty.*\(0, 12, 6, 5\)'):
            block(*arguments(block, [z[:0]]))
    assert not tried.called
    fused = fuse(block)
    assert fused(*arguments(fused, [z[:0]])).shape == z[:0].shape


@pytest.mark.parametrize(
    'name, dtype',
    [
        ('rep', torch.bfloat16),
        ('rep, scaled', torch.float32),
        ('focus', torch.bfloat16),
        ('focus, enlarged', torch.float32),
    ],
)
def test_tapes(name, dtype, calls, monkeypatch):
    """The same bits as without one, of other values than were recorded."""
    cast = partial(torch.autocast, DEVICE, torch.bfloat16)

    def run(factor, fused=False):
        block = draw_block(name)
        for parameter in block.parameters():
            parameter.data *= factor
        maps = [factor * x.detach().to(dtype) for x in draw_maps(name)]
        with cast(enabled=dtype != torch.float32):
            if fused:
                with torch.no_grad():
                    return fuse(block)(*arguments(block, maps))
            return step(block, [x.requires_grad_() for x in maps])

    expected = run(1.5), run(1.5, fused=True)
    monkeypatch.setattr(tape, 'MIN_RUNS', 1)
    run(1), run(1, fused=True)
    assert len(tape._tapes) == 3
    assert all(tape._tapes.values())
    monkeypatch.setattr(tape, '_record', None)
    monkeypatch.setattr(focus.conv, 'forward', None)
    actual = run(1.5), run(1.5, fused=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def same(x):
    return x


@pytest.mark.parametrize(
    'name, dtype, pack, unpack',
    [
        ('focus, first', torch.float32, torch.clone, Tensor.contiguous),
        ('rep, scaled', torch.bfloat16, same, Tensor.float),
    ],
)
def test_saved_maps_that_hooks_change(
    name, dtype, pack, unpack, calls, monkeypatch
):
    """Their layout, as in the memory of the host, or their dtype.

    Without tapes, and with one that was recorded before.
    """
    results = []
    for runs, hooks in (
        (100, (pack, unpack)),
        (1, (same, same)),
        (1, (pack, unpack)),
    ):
        monkeypatch.setattr(tape, 'MIN_RUNS', runs)
        maps = [x.detach().to(dtype) for x in draw_few(name, 5)]
        with (
            torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(*hooks),
        ):
            block = draw_block(name)
            results.append(step(block, [x.requires_grad_() for x in maps]))
    expected, plain, changed = results
    torch.testing.assert_close(changed, expected, rtol=0, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(changed, plain, rtol=0, atol=0)
