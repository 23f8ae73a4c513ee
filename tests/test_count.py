"""The launches of a step, counted without a GPU; see benchmarks/count.py."""

import re
from functools import partial
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import count as counting
from benchmarks.count import build, count_operators
from mmoverlock.models import OverLoCK
from mmoverlock.ops import layer_norm

pytest.importorskip('triton', '3.6')

BACKEND = 'triton'
# Of t in bf16 on 128 images of 224 x 224, mostly with fewer blocks: operators
# of PyTorch, launches of Triton, GB, GB of mixed layouts, and GB at a time.
BOUNDS = {
    ('all of t', True): (422, 1078, 100, 2, 12),  # as of benchmarks/NOTES.md
    ('network', True): (160, 254, 26, 1.0, 3.7),
    ('network, SyncBN', True): (194, 416, 27.5, 1.0, 3.7),
    ('network', False): (60, 80, 6.3, 0.4, 0.8),
    ('RepConv block', True): (4, 29, 6.3, 0.0, 1.3),
    ('RepConv block', False): (1, 8, 1.4, 0.0, 0.7),
    ('Focus block', True): (21, 44, 3.3, 0.1, 0.8),
    ('Focus block', False): (6, 15, 0.8, 0.1, 0.3),
}


@pytest.mark.parametrize('train', [True, False])
def test_bounds(train, monkeypatch):
    images = torch.empty(128, 3, 224, 224, device='meta')
    counted = {'all of t': (build(train, BACKEND), images)} if train else {}
    arch = dict(OverLoCK.arch_zoo['t', 'tiny'], depths=(1, 1, 1, 1))
    arch['focus_depths'] = 2, 1
    monkeypatch.setattr(
        counting, 'OverLoCK', lambda _, **options: OverLoCK(arch, **options)
    )
    model = build(train, BACKEND)
    counted |= {'network': (model, images), **counting.blocks(model)}
    if train:
        synchronized = build(train, BACKEND, norm='SyncBN')
        counted['network, SyncBN'] = synchronized, images
    for name, (module, inputs) in counted.items():
        result = count_operators(module, inputs, train)
        sizes = result.bytes, result.mixed, result.memory
        figures = result.operators, result.launches, *(s / 1e9 for s in sizes)
        for figure, bound in zip(figures, BOUNDS[name, train], strict=True):
            assert figure <= bound, (name, figures)


class Function(nn.Module):
    """A module of a function of its weight and the inputs."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(torch.ones(16, 16, 1, 1))

    def forward(self, *inputs):
        return self.run(self.weight, *inputs)


def draw(channels_last=False, **options):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = 4, 16, 128, 64
    options.update(device='meta', memory_format=layout)
    return torch.empty(shape, **options)


SIZE = 2**21  # bytes of the map above in fp32


def parts(weight, x):
    y = x + 1
    z = y * 2
    del y
    return z[:, :8] - 1


def below(weight, x):
    """A copy as in backward passes and in kernels."""
    with torch._C._AutoDispatchBelowAutograd():
        return x.contiguous()


@pytest.mark.parametrize(
    'run, inputs, size, mixed, memory',
    [
        (lambda _, x: x.mul_(2), [draw()], 2, 0, 1),
        (lambda _, x: x.half(), [draw()], 1.5, 0, 1.5),
        # An expanded operand is small, a view costs nothing.
        (lambda _, x: x * x[:1, :1, :1, :1].expand_as(x), [draw()], 2, 0, 2),
        (lambda _, x: torch.empty_like(x).view(-1), [draw()], 0, 0, 2),
        (lambda _, x, y: x + y, [draw(True), draw()], 3, 3, 3),
        (lambda _, x: x[:, :8].sum(), [draw(True)], 0.5, 0.5, 1),
        # As in cuDNN, results are in the layout of the map.
        (lambda w, x: F.conv2d(x, w) + x, [draw(True)], 5, 0, 3),
        (parts, [draw()], 5, 1, 3),
        # The operand, its two gradients and their sum
        (lambda _, x: (x * x).sum(), [draw(requires_grad=True)], 11, 0, 4),
        (below, [draw(True)], 2, 2, 2),
    ],
)
def test_bytes(run, inputs, size, mixed, memory):
    """In maps; scalars and weights are less than 4 KB."""
    train = inputs[0].requires_grad
    result = count_operators(Function(run), inputs, train, torch.float32)
    assert 0 <= result.bytes - size * SIZE < 4096
    assert 0 <= result.mixed - mixed * SIZE < 4096
    assert 0 <= result.memory - memory * SIZE < 4096
    assert result.launches == 0
    assert result.operators == sum(row[0] for row in result.rows.values())


LOW, HIGH = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    'run, dtype, copies, result',
    [
        (lambda w, x: F.conv2d(F.conv2d(x, w), w), LOW, 1, LOW),  # once
        (lambda w, x: F.layer_norm(x, (64,)), LOW, 1, HIGH),
        (lambda w, x: x.sum((2, 3)), LOW, 0, HIGH),
        (lambda w, x: torch.addcmul(x, x, w[0, 0, 0]), LOW, 2, HIGH),
    ],
)
def test_autocast(run, dtype, copies, result):
    def watch(*args):
        out = run(*args)
        assert out.dtype == result
        return out

    figures = count_operators(Function(watch), draw(dtype=dtype), False, LOW)
    assert figures.rows.get('aten._to_copy.default', [0])[0] == copies


def test_inside_of_operators():
    """Of an operator of the project, its launches are counted, itself not."""

    def run(weight, x):
        ones = weight.new_ones(16)
        return layer_norm(x, ones, ones, backend='triton')

    x = draw(True)
    result = count_operators(Function(run), x, False, torch.float32)
    assert (result.operators, result.launches) == (1, 1)
    ((name, (calls, size, _)),) = [
        row for row in result.rows.items() if 'aten' not in row[0]
    ]
    assert (name, calls) == ('layernorm.triton._forward_kernel', 1)
    assert 0 <= size - 2 * SIZE < 4096


def test_table(monkeypatch, capsys):
    """Rows of all networks and blocks; a missing package has a row."""

    def build(*args, channels=None, norm='BN'):
        with torch.device('cpu' if channels else 'meta'):
            return OverLoCK(tiny.ARCH)

    missing = mock.Mock(side_effect=ImportError('no mmpretrain'))
    monkeypatch.setattr(counting, 'build', build)
    monkeypatch.setattr(counting, 'build_peer', missing)
    host_seconds = partial(counting.host_seconds, repeats=1)
    monkeypatch.setattr(counting, 'host_seconds', host_seconds)
    assert counting.main(['--size', '1', '64', '96', '--top', '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r't, training( +\d+){2}( +\d+\.\d){3} +\d+', lines[1])
    rows = [line.split('  ')[0] for line in lines[1:]]
    rows = [row for row in rows if row]  # others are of the top
    assert len(lines) == 1 + len(rows) + 6
    names = 't', 'ConvNeXt-T', 'RepConv block', 'Focus block'
    expected = [f'{n}, {w}' for w in ('training', 'inference') for n in names]
    expected.insert(1, 't, SyncBN, training')  # inference is as of the other
    assert [row.split(':')[0] for row in rows] == expected
    assert 'ConvNeXt-T, inference: no mmpretrain' in rows
