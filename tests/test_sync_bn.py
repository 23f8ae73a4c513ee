"""Batch norms that share statistics among processes, of branches and blocks.

Two processes train on maps of their own, of different sizes. Branches are
compared with one process and plain batch norms over all the values, blocks
with their layers in both processes, in float64.
"""

import copy
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from kernels import exact, relative_error
from test_block_nodes import draw_block, draw_maps, step
from torch import distributed, multiprocessing, nn
from torch.distributed.nn.functional import all_reduce

from mmoverlock.models.compilation import Regions
from mmoverlock.models.layers import run_layers
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops import backends, sum_of_branches

batch_norm = pytest.importorskip(
    'mmoverlock.ops.batch_norm.triton', exc_type=ImportError
)
tape = pytest.importorskip('mmoverlock.ops.tape', exc_type=ImportError)
debug = pytest.importorskip('torch.distributed.tensor.debug')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
EXCHANGES = dict(stem=1, rep=2, focus=4)
SHAPES = {
    'other sizes': ((1, 2, 6, 5), (1, 2, 4, 7)),
    'no maps, compiled': ((1, 2, 5, 4), (0, 2, 5, 4)),
}


def module(norm='BN', backend='auto'):
    torch.manual_seed(0)
    conv = DilatedReparamConv(2, 5, dict(type=norm), backend=backend)
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv.to(DEVICE)


def draw(name):
    """Maps whose means are large beside the deviations, and gradients."""
    torch.manual_seed(1)
    shapes = SHAPES[name]
    maps = [torch.randn(shape) + 3 + i for i, shape in enumerate(shapes)]
    return maps, [torch.randn(shape) for shape in shapes]


def train(conv, x, grad):
    """What comes out of a step."""
    x = x.to(DEVICE).clone().requires_grad_()
    out = conv(x)
    out.backward(grad.to(DEVICE))
    return dict(
        out=out.detach(),
        grad=x.grad,
        grads={k: p.grad for k, p in conv.named_parameters()},
        buffers=dict(conv.named_buffers()),
    )


class Norm(nn.Module):
    """A batch norm over the values of all processes, step by step."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x):
        channels = 1, -1, 1, 1
        count = all_reduce(x.new_tensor(x.numel() / x.shape[1]))
        mean = all_reduce(x.sum((0, 2, 3))) / count
        x = x - mean.view(channels)
        squares = all_reduce(x.square().sum((0, 2, 3)))
        self.running_mean.lerp_(mean.detach(), 0.1)
        self.running_var.lerp_(squares.detach() / (count - 1), 0.1)
        self.num_batches_tracked += 1
        x = x * (squares / count + 1e-5).rsqrt().view(channels)
        return x * self.weight.view(channels) + self.bias.view(channels)


def replace_norms(block):
    """In double precision, which no kernel takes."""
    block = copy.deepcopy(block).double()
    for parent in [*block.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, Norm(child))
    return block


def compare_blocks(rank):
    """Blocks in one node, whose exchanges are counted, and their layers."""
    counts = {}
    patches = [
        mock.patch.object(backends, 'why_not_triton', lambda device: None),
        mock.patch.object(backends, '_try', lambda *args: None),
        mock.patch.multiple(tape, MIN_RUNS=2, _tapes={}),
    ]
    for name in ('rep, scaled', 'focus', 'stem'):
        run = None
        if name == 'stem':
            conv = nn.Conv2d(12, 12, 3, padding=1)
            block = nn.Sequential(conv, nn.SyncBatchNorm(12), nn.GELU())
            run = partial(run_layers, block.to(DEVICE))
        else:
            block = draw_block(name, 'SyncBN')
        layers = replace_norms(block)
        maps = draw_maps(name)
        if rank:  # smaller than the kernel, with other values
            maps = [x[:1, :, 1:5] * 2 - 1 for x in maps]
            maps = [x.detach().requires_grad_() for x in maps]
        others = [*map(exact, maps)]
        gathered = mock.patch.object(
            batch_norm, '_all_gather', wraps=batch_norm._all_gather
        )
        reduced = mock.patch.object(
            distributed, 'all_reduce', wraps=distributed.all_reduce
        )
        with (
            patches[0],
            patches[1],
            patches[2],
            gathered as gathers,
            reduced as sums,
        ):
            results, buffers = step(block, maps, run)
            # Recorded, and then from tapes
            for _ in range(2 * (name != 'stem')):
                copies = [x.detach().requires_grad_() for x in maps]
                block = draw_block(name, 'SyncBN')
                again, _ = step(block, copies)
                torch.testing.assert_close(again, results, rtol=0, atol=0)
        times = 1 if name == 'stem' else 3
        counts[name] = gathers.call_count / times, sums.call_count / times
        if name.startswith('rep'):
            run = Regions(dict(backend='eager'))
            with patches[0], patches[1], gathered as gathers:
                run(draw_block(name, 'SyncBN'), maps[0])
            assert gathers.call_count == 2  # it is not compiled
            block = draw_block(name, 'SyncBN')
            block.dwconv.register_forward_hook(print)
            with patches[0], patches[1], pytest.warns(UserWarning) as warned:
                with pytest.raises(ValueError, match='GPU'):
                    block(maps[0])  # by layers, which need one
            assert 'wait forever' in str(warned[0].message)
        expected, others = step(layers, others, kernels=False)
        for key, value in expected.items():
            if value.abs().max() < 1e-9:  # of a bias before a norm
                assert results[key].abs().max() < 1e-3, key
            else:
                error = relative_error(results[key].cpu(), value.cpu())
                assert error < 1e-4, (name, key, error)
        check(buffers, others)
    return counts


def run(rank, folder):
    """What each of the processes does."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    groups = [distributed.new_group([i]) for i in (0, 1)]
    results = {}
    for name in (*SHAPES, 'alone'):
        maps, grads = draw('other sizes' if name == 'alone' else name)
        conv = module('SyncBN', 'auto' if name == 'alone' else 'triton')
        mode = debug.CommDebugMode()
        if name == 'alone':
            for part in conv.modules():
                part.process_group = groups[rank]
        elif 'compiled' in name:
            conv.compile(backend='aot_eager')
            mode = nullcontext()
        with mode:
            results[name] = train(conv, maps[rank], grads[rank])
        if 'compiled' not in name:
            results[name]['exchanges'] = mode.get_total_counts()
    results['exchanges'] = compare_blocks(rank)
    torch.save(results, f'{folder}/{rank}.pth')
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    method = 'fork' if DEVICE == 'cpu' else 'spawn'  # which imports anew
    multiprocessing.start_processes(
        run, (folder,), nprocs=2, start_method=method
    )
    return [torch.load(folder / f'{rank}.pth') for rank in (0, 1)]


def over_all(conv, maps):
    """The branches one by one, with statistics over all maps."""
    outs = 0
    for name, norm in conv.branches:
        name, norm = conv.get_submodule(name), conv.get_submodule(norm)
        ys = [name(x).transpose(0, 1).flatten(1) for x in maps]
        outs = outs + norm(torch.cat(ys, 1)[None, :, :, None])[0, ..., 0]
    parts = outs.split([x.numel() // x.shape[1] for x in maps], 1)
    return [
        part.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
        for part, x in zip(parts, maps, strict=True)
    ]


def check(actual, expected):
    torch.testing.assert_close(
        actual, expected, rtol=1e-4, atol=1e-4, check_dtype=False
    )


@pytest.mark.parametrize('name', SHAPES)
def test_statistics_are_those_of_all_maps(results, name):
    conv = module().double().cpu()
    maps, grads = draw(name)
    maps = [x.double().requires_grad_() for x in maps]
    outs = over_all(conv, maps)
    torch.autograd.backward(outs, [grad.double() for grad in grads])
    ranks = [result[name] for result in results]
    assert ranks[0].get('exchanges', 2) == 2  # one each way
    for rank, x, out in zip(ranks, maps, outs, strict=True):
        check(rank['out'].cpu(), out)
        check(rank['grad'].cpu(), x.grad)
        for key, buffer in conv.named_buffers():
            check(rank['buffers'][key].cpu(), buffer)
    # As DDP adds them up
    for key, parameter in conv.named_parameters():
        share, other = (rank['grads'][key].cpu() for rank in ranks)
        check(share + other, parameter.grad)


def test_blocks(results):
    """Compared where they run; norms side by side exchange once each way."""
    for result in results:
        for name, counts in result['exchanges'].items():
            each = EXCHANGES[name.split(',')[0]]
            assert counts == (each, each), name


def test_one_process(results):
    """In a group of one, and where nothing is distributed."""
    maps, grads = draw('other sizes')
    for result, x, grad in zip(results, maps, grads, strict=True):
        expected = train(module(), x, grad)
        assert result['alone'].pop('exchanges') == 0
        check(result['alone'], expected)
        check(train(module('SyncBN'), x, grad), expected)


def test_backend_without_exchange():
    with pytest.raises(ValueError, match='no statistics over several'):
        sum_of_branches(torch.ones(1, 1, 2, 2), [], group=object())
