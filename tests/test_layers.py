"""Small layers, beyond what the golden figures of test_parity.py tell."""

import copy
from unittest.mock import patch

import pytest
import torch
from fusion import far
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm

from mmoverlock.models import layers as layers_module
from mmoverlock.models.layers import (
    GRN,
    DropPath,
    StridedConv,
    draw_paths,
    enlarge,
    run_layers,
)
from mmoverlock.models.reparam import BRANCHES, DilatedReparamConv
from mmoverlock.ops.grn import reference

CHANNELS_LAST = torch.channels_last
BN = dict(type='BN')


def say_gpu(monkeypatch, value=True):
    """Layers run on a GPU or not."""
    monkeypatch.setattr(layers_module, 'takes_triton', lambda *_: value)


@pytest.mark.parametrize('squares', [1, 30])  # a row, two rows
def test_grn(squares, monkeypatch):
    """In pieces as at once; dead channels and maps have finite gradients."""
    torch.manual_seed(0)
    grn, x = GRN(5).double(), torch.randn(3, 5, 4, 3).double().requires_grad_()
    x.data[0, 1:] = x.data[1] = 0
    operands = [x, *map(nn.init.normal_, grn.parameters())]
    results = []
    for size in (1000, squares):  # of which the first is all
        monkeypatch.setattr(reference, 'SQUARES', size)
        out = grn(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), operands)])
    torch.testing.assert_close(*results)


def test_drop_path():
    """Of branches on their own, image by image, of several blocks at once."""
    drops = DropPath(0.2), DropPath(0.0, 2), DropPath(0.5, branches=2)
    x = torch.ones(2000, 2, 1, 1, dtype=torch.bfloat16)
    assert torch.equal(drops[0].eval()(x), x)
    torch.manual_seed(0)
    drops[0].train()
    (first,), nothing, others = draw_paths(drops, x)
    assert nothing == (None, None) and not torch.equal(*others)
    for keep, scale in zip((first, *others), (1.25, 2, 2), strict=True):
        assert keep.dtype == torch.float32 and keep.shape == (2000,)
        assert set(keep.tolist()) == {0, scale}
        assert abs(keep.mean().item() - 1) < 0.06
    dropped = drops[0](x)[..., 0, 0].float()
    assert torch.equal(*dropped.unbind(1))
    assert set(dropped[:, 0].tolist()) == {0, 1.25}


@pytest.mark.parametrize('count', [0, 1, 2, 5])
def test_places_of_what_is_drawn(count):
    """Addresses are alike to kernels, whichever block and batch it is of."""
    drops = DropPath(0.2), DropPath(0.5, branches=2), DropPath(0.1)
    for keeps in draw_paths(drops, torch.ones(count, 2, 1, 1)):
        for keep in keeps:
            assert keep.shape == (count,) and keep.is_contiguous()
            assert count == 0 or keep.data_ptr() % 16 == 0


@pytest.mark.parametrize('way', ['fake', 'grad'])
def test_drop_path_after_tracing(way):
    """Tensors that are kept are not those of a trace or transform."""
    layers_module._repeat_once.cache_clear()
    drop, x = DropPath(0.2), torch.ones(3, 2, 1, 1)
    if way == 'fake':
        with FakeTensorMode() as mode:
            drop(mode.from_tensor(x))
    else:
        torch.func.grad(lambda x: drop(x).sum())(x)
    drawn = []
    with patch.object(torch, 'bernoulli', lambda p: drawn.append(p) or p):
        drop(x)
    assert type(drawn[0]) is torch.Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(drawn[0])


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('kind', [torch.contiguous_format, CHANNELS_LAST])
def test_layers_as_gpus_like_them(half, kind, monkeypatch):
    """As layers say; gradients are laid out as the parameters that take them.

    A parameter takes those in their own memory, then.
    """
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(count) for count in (4, 5, 5)]
    norms[2].eval()
    convs = StridedConv(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 2)
    layers = nn.Sequential(convs[0], norms[0], convs[1], *norms[1:])
    layers.to(memory_format=kind)
    for shape in ((2, 3, 7, 6), (2, 3, 8, 3)):
        x, results = torch.randn(shape), []
        for on_gpu in (False, True):
            say_gpu(monkeypatch, on_gpu)
            run = copy.deepcopy(layers)
            with torch.autocast('cpu', torch.bfloat16, enabled=half):
                y = run_layers(run, x)
            grads = torch.autograd.grad(y.sin().sum(), [*run.parameters()])
            results.append((y, *grads, *run.buffers()))
        torch.testing.assert_close(*results)
        for grad in grads[:8:4]:
            assert grad.is_contiguous(memory_format=kind)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_enlarging(dtype, monkeypatch):
    """As in more precision, but for a rounding; so is the gradient."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, dtype=dtype).requires_grad_()
    more = torch.promote_types(dtype, torch.float32)
    grad, results = torch.randn(2, 8, 12, 15, dtype=dtype), []
    for on_gpu, kind in ((False, more), (True, dtype)):
        say_gpu(monkeypatch, on_gpu)
        with torch.autocast('cpu', torch.bfloat16):
            y = enlarge(x.to(kind), (12, 15)).to(dtype)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('way', ['deterministic', 'compiled'])
def test_enlarging_by_the_function(way, monkeypatch):
    """Its gradient on GPUs can be deterministic, or compiled for any size."""
    say_gpu(monkeypatch)
    run, x = enlarge, torch.randn(1, 2, 3, 4, requires_grad=True)
    if way == 'compiled':
        run = torch.compile(run, backend='eager', dynamic=True, fullgraph=True)
    torch.use_deterministic_algorithms(way == 'deterministic')
    try:
        y = run(x, (6, 8))
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.grad_fn.name() == 'UpsampleBilinear2DBackward0'


def test_convolutions_that_global_hooks_watch(monkeypatch):
    say_gpu(monkeypatch)
    layers, seen = nn.Sequential(StridedConv(3, 4, 3, 2, 1), nn.GELU()), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda layer, *_: seen.append(layer)
    )
    try:
        run_layers(layers, torch.randn(1, 3, 4, 4))
    finally:
        hook.remove()
    assert seen == [*layers, layers]


def make_conv(kernel_size):
    """A convolution, and a map."""
    conv = far(DilatedReparamConv(3, kernel_size, BN))
    conv.origin_bn.eps = 0.1
    return conv, torch.randn(2, 3, 21, 24).double().requires_grad_()


def sum_of_branches(conv, x):
    """By the names of the release."""
    names = [('lk_origin', 'origin_bn')] + [
        (f'dil_conv_k{size}_{dilation}', f'dil_bn_k{size}_{dilation}')
        for size, dilation in BRANCHES[conv.lk_origin.kernel_size[0]]
    ]
    return sum(
        conv.get_submodule(norm)(conv.get_submodule(name)(x))
        for name, norm in names
    )


def test_other_padding_of_a_column():
    conv, x = StridedConv(2, 3, 3, 2, 1), torch.randn(1, 2, 4, 1)
    conv.padding_mode = 'replicate'
    wide = conv(x.expand(-1, -1, -1, 3))
    torch.testing.assert_close(conv(x), wide[..., :1])


@pytest.mark.parametrize('kernel_size', BRANCHES)
def test_merging(kernel_size):
    """One convolution in eval mode, with the gradients of every branch."""
    conv, x = make_conv(kernel_size)
    weight_norm(conv.lk_origin)
    operands = [x, *conv.parameters()]
    expected = sum_of_branches(conv, x)
    results = [
        [out, *torch.autograd.grad(out.sin().sum(), operands)]
        for out in (conv(x), expected)
    ]
    torch.testing.assert_close(*results)
    for _ in range(2):  # the second time, gradients are added in place
        conv(x).sin().sum().backward()
    for operand, grad in zip(operands, results[1][1:], strict=True):
        torch.testing.assert_close(operand.grad, 2 * grad)
    other = copy.deepcopy(conv)
    for _ in range(2):  # the second time, there is nothing to merge
        conv.switch_to_deploy()
        torch.testing.assert_close(conv(x), expected)
        assert all(p.requires_grad for p in conv.parameters())
    torch.testing.assert_close(other(x), expected)  # no part of it has changed
    other.requires_grad_(False).switch_to_deploy()
    assert not any(p.requires_grad for p in other.parameters())
    deployed = DilatedReparamConv(3, kernel_size, BN, deploy=True)
    assert set(deployed.state_dict()) == set(conv.state_dict())


CHANGES = {  # of branches; the first two can be merged nevertheless
    'one in eval mode': lambda conv: conv.origin_bn.eval(),
    'average': lambda conv: setattr(conv.origin_bn, 'momentum', None),
    'type': lambda conv: setattr(conv, 'origin_bn', nn.InstanceNorm2d(3)),
    'fixed': lambda conv: setattr(conv.origin_bn, 'track_running_stats', 0),
    'plain': lambda conv: setattr(conv, 'origin_bn', PLAIN_BN),
    'bias': lambda conv: conv.lk_origin.register_parameter('bias', BIAS),
    'padding': lambda conv: setattr(conv.lk_origin, 'padding_mode', 'reflect'),
    'hook': lambda conv: conv.origin_bn.register_forward_hook(double),
}
PLAIN_BN, BIAS = nn.BatchNorm2d(3, affine=False), nn.Parameter(torch.ones(3))


def double(layer, args, out):
    return 2 * out


@pytest.mark.parametrize('change', CHANGES)
def test_other_branches(change):
    """Those that the fast path does not cover are computed plainly."""
    conv, x = make_conv(5)
    CHANGES[change](conv)
    conv.double()
    for training in (True, False):
        other = copy.deepcopy(conv.train(training))
        torch.testing.assert_close(conv(x), sum_of_branches(other, x))
        torch.testing.assert_close(
            dict(conv.state_dict()), dict(other.state_dict())
        )
    if change in [*CHANGES][2:]:
        with pytest.raises(TypeError, match='replaced cannot be merged'):
            conv.switch_to_deploy()
