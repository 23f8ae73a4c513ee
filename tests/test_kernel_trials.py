"""Kernels that do not compile or fit: plain PyTorch from the first call on."""

import copy
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kernels import draw
from networks import make_block
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock.models.blocks import FocusBlock, RepConvBlock
from mmoverlock.ops import backends, layer_norm

triton = pytest.importorskip('triton', '3.6')
errors = pytest.importorskip('triton.runtime.errors')
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='without a GPU'
)

FIT = errors.OutOfResources(232448, 101376, 'shared memory')
FORWARD, BACKWARD = (
    f'layernorm.triton._{name}_kernel' for name in ('forward', 'backward')
)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Names of kernels that are launched, and errors of some.

    'auto' takes the kernels here, of which none has been tried.
    """
    monkeypatch.setattr(backends, 'why_not_triton', lambda device: None)
    monkeypatch.setattr(backends, '_runs', {})
    monkeypatch.setattr(backends, '_warned', set())
    executor = triton.runtime.interpreter.GridExecutor
    launch = executor.__call__
    launches = SimpleNamespace(names=[], errors={})

    def run(this, *args, **kwargs):
        module = this.fn.__module__.removeprefix('mmoverlock.ops.')
        name = f'{module}.{this.fn.__name__}'
        if name in launches.errors:
            raise launches.errors[name]
        launches.names.append(name)
        return launch(this, *args, **kwargs)

    monkeypatch.setattr(executor, '__call__', run)
    return launches


def normalize(x, backend='auto'):
    ones = torch.ones(x.shape[1])
    return layer_norm(x, ones, ones, backend=backend)


@pytest.mark.parametrize(
    'kernel, error',
    [
        (FORWARD, FIT),
        (FORWARD, RuntimeError('PassManager::run failed')),
        (BACKWARD, FIT),
    ],
)
def test_first_call(kernel, error, launches):
    """It falls back, though the error is in the backward pass."""
    launches.errors[kernel] = error
    x = draw(1, 3, 4, 5).requires_grad_()
    with pytest.warns(RuntimeWarning, match='layernorm do not') as warned:
        out = normalize(x)
    assert len(warned) == 1
    assert str(error) in str(warned[0].message)
    assert torch.equal(out, normalize(x, 'reference'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        normalize(draw(2, 4, 4, 5).requires_grad_())  # another problem
        launches.errors.clear()
        launches.names.clear()
        normalize(draw(2, 3, 5, 4).requires_grad_()).sum().backward()
        assert launches.names == []  # it is remembered for maps of all sizes
        normalize(draw(1, 5, 4, 5).requires_grad_())  # that one runs
        assert kernel in launches.names


@pytest.mark.parametrize(
    'backend, error',
    [
        ('triton', FIT),
        # Which is not the kernel's fault
        ('auto', torch.OutOfMemoryError('no memory left')),
    ],
)
def test_errors_that_are_told(backend, error, launches):
    launches.errors[FORWARD] = error
    with pytest.raises(type(error)):
        normalize(draw(1, 3, 4, 5), backend)


def test_tried_once(launches):
    """Both ways where there is a gradient, but not where it is watched."""
    x = draw(1, 3, 4, 5)
    with FlopCounterMode(display=False):
        normalize(x)
    torch.compile(normalize, backend='eager')(x)
    assert launches.names == 2 * [FORWARD]
    for _ in range(2):
        normalize(x)
    assert launches.names == 5 * [FORWARD]
    x.requires_grad_()
    # Tensors that a trial saves are no part of checkpoints
    checkpoint(normalize, x, use_reentrant=False).sum().backward()
    assert len(launches.names) > 7
    launches.names.clear()
    normalize(x)
    assert launches.names == [FORWARD]


def test_batches_of_all_sizes_are_tried_once():
    kernels = mock.Mock(side_effect=lambda x, keep: x * keep.view(-1, 1, 1, 1))
    for batch in (2, 3):
        x, keep = draw(batch, 3, 4, 5), torch.ones(batch)
        assert backends.run_here(kernels, x, keep)
    assert kernels.call_count == 1


# One of each operator, of the backward pass
KERNELS = [
    'conv3x3.triton._backward_kernel',
    BACKWARD,
    'depthwise.triton.branches._sums_kernel',
    'grn.triton._backward_kernel',
    'excitation.triton._weights_grad_kernel',
    'residual.triton._backward_kernel',
    'prior.triton._backward_kernel',
    'dynamic_conv.triton.filters.finish',
]
OF_OTHERS = 'blocks', 'blocks', 'conv3x3_norm', 'ffn'  # that run these


def test_every_operator(launches):
    """Blocks give what they give in double precision, statistics too."""
    launches.errors = dict.fromkeys(KERNELS, FIT)
    torch.manual_seed(0)
    rep = make_block(RepConvBlock, 4, layer_scale=True)
    focus = make_block(FocusBlock, 4, 2, heads=1, first=False)
    blocks = [
        (rep, [draw(2, 4, 3, 5)]),
        (focus, [draw(2, 6, 5, 5), draw(2, 2, 5, 5)]),
    ]

    def step(block, maps):
        maps = [x.requires_grad_() for x in maps]
        out = block(*maps)
        leaves = [*maps, *block.parameters()]
        grads = torch.autograd.grad(out.sin().sum(), leaves)
        return [t.double() for t in (out, *grads, *block.buffers())]

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for block, maps in blocks:
            other = copy.deepcopy(block).double()  # which no kernel takes
            results = step(block, maps)
            expected = step(other, [x.detach().double() for x in maps])
            largest = max(value.norm() for value in expected)
            for actual, value in zip(results, expected, strict=True):
                difference = (actual - value).norm()
                assert difference < 1e-5 * max(value.norm(), 0.1 * largest)
    warned = [str(warning.message) for warning in warned]
    plain = [text.split()[2] for text in warned if 'do not run' in text]
    names = {kernel.split('.')[0] for kernel in KERNELS}
    assert sorted(plain) == sorted([*names, *OF_OTHERS])  # once each
    assert {name.split('.')[0] for name in launches.names} >= names
