"""What a step runs on a GPU, counted without one; see benchmarks/count.py."""

import re
from collections import Counter
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import count as counting
from benchmarks.count import build, count_operators
from mmoverlock.models import OverLoCK

triton = pytest.importorskip('triton', '3.6')
import triton.language as tl  # noqa: E402

BACKEND = 'triton'
# Of t with fewer blocks in bf16 on 128 images of 224 x 224: operators of
# PyTorch, launches of Triton, GB, GB of mixed layouts, and GB at a time.
BOUNDS = {
    ('network', True): (183, 265, 26.4, 0.7, 3.7),
    ('network, SyncBN', True): (214, 427, 27.9, 0.7, 3.7),
    ('network', False): (73, 76, 6.7, 0.5, 0.9),
    ('RepConv block', True): (4, 29, 6.3, 0.0, 1.3),
    ('RepConv block', False): (2, 7, 1.4, 0.0, 0.7),
    ('Focus block', True): (23, 47, 3.3, 0.1, 0.8),
    ('Focus block', False): (7, 15, 0.8, 0.1, 0.3),
}


@pytest.mark.parametrize('train', [True, False])
def test_bounds(train, monkeypatch):
    arch = dict(OverLoCK.arch_zoo['t', 'tiny'], depths=(1, 1, 1, 1))
    arch['focus_depths'] = 2, 1
    monkeypatch.setattr(
        counting, 'OverLoCK', lambda _, **options: OverLoCK(arch, **options)
    )
    model = build(train, BACKEND)
    images = torch.empty(128, 3, 224, 224, device='meta')
    counted = {'network': (model, images), **counting.blocks(model)}
    if train:
        synchronized = build(train, BACKEND, norm='SyncBN')
        counted['network, SyncBN'] = synchronized, images
    for name, (module, inputs) in counted.items():
        result = count_operators(module, inputs, train)
        sizes = result.bytes, result.mixed, result.memory
        figures = result.operators, result.launches, *(s / 1e9 for s in sizes)
        for figure, bound in zip(figures, BOUNDS[name, train], strict=True):
            assert figure <= bound, (name, figures)


class Operators(TorchDispatchMode):
    """Counts what runs on a CPU, inside the project's operators too."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f.namespace == 'mmoverlock':
            with self:
                return f._op_dk(counting.OPERATORS[1], *args, **kwargs)
        if counting.does_something(f):
            self.calls[str(f)] += 1
        return f(*args, **kwargs)


def test_what_a_cpu_runs():
    """With data on a CPU, the code for GPUs runs the same operators."""
    model = OverLoCK(
        tiny.DEEPER,
        drop_path_rate=0.1,
        contmix_backend=BACKEND,
        depthwise_backend=BACKEND,
    )
    images = torch.randn(2, 3, 64, 64)
    result = count_operators(model, images, True, torch.float32)
    actual = Counter({name: row[0] for name, row in result.rows.items()})
    assert actual.total() == result.operators + result.launches
    assert result.operators > 200 and result.launches > 10
    expected = Operators()

    def launch(kernel, *args, **kwargs):
        name = f'{kernel.fn.__module__}.{kernel.fn.__name__}'
        expected.calls[name.removeprefix('mmoverlock.ops.')] += 1

    launches = [
        mock.patch.object(kind, 'run', launch) for kind in counting._kernels()
    ]
    with counting._on_gpu('cpu', launches), expected:
        for _ in range(2):
            expected.calls.clear()
            model.zero_grad()
            counting._step(model, [images], True, torch.float32, nullcontext())
    # Some maps and gradients have other layouts, so that they are copied.
    for name in ('aten.copy_.default', 'aten.clone.default'):
        assert abs(expected.calls.pop(name, 0) - actual.pop(name, 0)) < 4
    assert actual == expected.calls


class Function(nn.Module):
    """A module of a function."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(torch.ones(16, 16, 1, 1))

    def forward(self, *inputs):
        return self.run(self, *inputs)


def count_function(run, *inputs, train=False, dtype=torch.float32):
    return count_operators(Function(run), inputs, train, dtype)


def draw(channels_last=False, dtype=torch.float32):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(4, 16, 128, 64, dtype=dtype, device='meta')
    return x.contiguous(memory_format=layout)


SIZE = 2**21  # bytes of the map above in fp32


def convolve(module, x):
    return F.conv2d(x, module.weight)


@pytest.mark.parametrize(
    'run, inputs, size, mixed',
    [
        (lambda _, x: x.mul_(2), [draw()], 2, 0),
        (lambda _, x: x.half(), [draw()], 1.5, 0),
        # An expanded operand is small, a view costs nothing.
        (lambda _, x: x * x[:1, :1, :1, :1].expand_as(x), [draw()], 2, 0),
        (lambda _, x: torch.empty_like(x).view(-1), [draw()], 0, 0),
        (lambda _, x, y: x + y, [draw(True), draw()], 3, 3),
        (lambda _, x: x[:, :8].sum(), [draw(True)], 0.5, 0.5),
        # As in cuDNN, results are in the layout of the map.
        (lambda m, x: convolve(m, x) + x, [draw(True)], 5, 0),
    ],
)
def test_bytes(run, inputs, size, mixed):
    """In maps; scalars and weights are less than 2 KB."""
    result = count_function(run, *inputs)
    assert 0 <= result.bytes - size * SIZE < 2048
    assert 0 <= result.mixed - mixed * SIZE < 2048
    assert result.launches == 0
    assert result.operators == sum(row[0] for row in result.rows.values())


def test_memory():
    """The weight takes 1 KB; views have no memory of their own."""

    def run(_, x):
        y = x + 1
        z = y * 2  # three maps
        del y
        return z[:, :8] - 1  # half a map more than two

    def square(_, x):
        return (x * x).sum()  # the operand, its two gradients and their sum

    for function, maps, train in (
        (run, 3, False),
        (lambda _, x: x.view(-1) + 1, 2, False),
        (square, 4, True),
    ):
        x = draw().requires_grad_(train)
        result = count_function(function, x, train=train)
        assert 0 <= result.memory - maps * SIZE < 4096


LOW, HIGH = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    'run, dtype, copies, result',
    [
        (convolve, HIGH, 2, LOW),
        (lambda m, x: convolve(m, convolve(m, x)), LOW, 1, LOW),  # once
        (lambda m, x: F.layer_norm(x, (64,)), LOW, 1, HIGH),
        (lambda m, x: x.sum((2, 3)), LOW, 0, HIGH),
        (lambda m, x: torch.addcmul(x, x, m.weight[0, 0, 0]), LOW, 2, HIGH),
        (lambda m, x: F.gelu(x), LOW, 0, LOW),
        (lambda m, x: convolve(m.double(), x.double()), HIGH, 1, torch.double),
    ],
)
def test_autocast(run, dtype, copies, result):
    seen = []

    def watch(module, x):
        out = run(module, x)
        seen.append(out.dtype)
        return out

    figures = count_function(watch, draw(dtype=dtype), dtype=LOW)
    assert seen[-1] == result
    assert figures.rows.get('aten._to_copy.default', [0])[0] == copies


@triton.jit
def _double(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, 2 * tl.load(x + at))


@torch.library.custom_op('test_count::double', mutates_args=())
def _doubled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _double[(1,)](x.neg(), y=out, SIZE=8)
    return out


@_doubled.register_fake
def _(x):
    raise AssertionError('the operator itself is what counts')


def test_inside_of_operators():
    """What an operator of the project runs is counted, itself not."""
    result = count_function(lambda _, x: _doubled(x), draw())
    assert (result.operators, result.launches) == (1, 1)
    assert result.rows == {
        'aten.neg.default': [1, 2 * SIZE, 0],
        'test_count._double': [1, 2 * SIZE, 0],
    }


def test_only_while_it_counts():
    """Tensors and models are as before, after an error too."""
    before = torch.cuda.is_available()
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ZeroDivisionError):
        count_operators(Function(lambda *_: 1 / 0), x, True)
    assert x.device == torch.device('cpu') and x.grad is None
    assert torch.cuda.is_available() is before
    assert not torch.is_autocast_enabled('cuda')


def test_table(monkeypatch, capsys):
    """Rows of all networks and blocks; a missing package has a row."""

    def missing(train, channels=None):
        raise ModuleNotFoundError("No module named 'mmpretrain'")

    def build(*args, channels=None, norm='BN'):
        with torch.device('cpu' if channels else 'meta'):
            return OverLoCK(tiny.ARCH)

    monkeypatch.setattr(counting, 'build', build)
    monkeypatch.setattr(counting, 'build_peer', missing)
    host_seconds = partial(counting.host_seconds, repeats=1)
    monkeypatch.setattr(counting, 'host_seconds', host_seconds)
    assert counting.main(['--size', '1', '64', '96', '--top', '2']) == 0
    out = capsys.readouterr().out
    assert re.search(r't, training +\d+ +\d+( +\d+\.\d){3} +\d+\n', out)
    for name in ('t', 'RepConv block', 'Focus block'):
        for what in ('training', 'inference'):
            assert f'\n{name}, {what} ' in out
    assert "ConvNeXt-T, inference: No module named 'mmpretrain'" in out
    assert '\nt, SyncBN, training ' in out
    assert '\nt, SyncBN, inference ' not in out  # there, it is as the other
    assert len(re.findall(r'^  \S', out, re.M)) == 6
