"""Batch norms that share statistics among processes, of branches and blocks.

Two processes train on maps of their own, of different sizes. What kernels
compute is compared with layers in both processes, in float64, whose batch
norms exchange step by step.
"""

import copy
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
from kernels import DEVICE, exact, relative_error
from test_block_nodes import draw_block, draw_maps, step
from torch import distributed, multiprocessing, nn
from torch.distributed.nn.functional import all_reduce

from mmoverlock.models.compilation import Regions
from mmoverlock.models.layers import run_layers
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops import backends, sum_of_branches

tape = pytest.importorskip('mmoverlock.ops.tape', exc_type=ImportError)


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


def draw_branches(norm='SyncBN', backend='triton'):
    torch.manual_seed(0)
    conv = DilatedReparamConv(2, 5, dict(type=norm), backend=backend)
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    return conv.to(DEVICE)


def build(name):
    """A module, and how it runs."""
    if name == 'branches':
        return draw_branches(), None
    if name != 'stem':
        return draw_block(name, 'SyncBN'), None
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 12, 3, padding=1)
    stem = nn.Sequential(conv, nn.SyncBatchNorm(12), nn.GELU()).to(DEVICE)
    return stem, partial(run_layers, stem)


def draw(name, rank):
    """Maps; those of the second process are smaller, with other values."""
    maps = draw_maps(name)
    if name == 'branches':
        maps = [x[:, :2] for x in maps]
    if rank:
        maps = [x[:1, :, 1:5] * 2 + 3 for x in maps]
    return [x.detach().requires_grad_() for x in maps]


def kernels():
    """Run here, untried; blocks from tapes, from the third time on."""
    changes = dict(why_not_triton=lambda device: None, _try=lambda *args: None)
    stack = ExitStack()
    stack.enter_context(mock.patch.multiple(backends, **changes))
    stack.enter_context(mock.patch.multiple(tape, MIN_RUNS=2, _tapes={}))
    return stack


def check(actual, layers, maps):
    """The outputs, gradients and buffers are those of layers."""
    (results, buffers), maps = actual, [*map(exact, maps)]
    expected, others = step(replace_norms(layers), maps, kernels=False)
    for key, value in expected.items():
        if value.abs().lt(1e-9).all():  # of a bias before a norm
            assert results[key].abs().lt(1e-3).all(), key
        else:
            error = relative_error(results[key].cpu(), value.cpu())
            assert error < 1e-4, (key, error)
    torch.testing.assert_close(
        buffers, others, rtol=1e-4, atol=1e-4, check_dtype=False
    )


def compare(rank, folder):
    """The part of each process."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    for name in ('branches', 'stem', 'rep, scaled', 'focus'):
        results = []
        with kernels():
            for _ in range(3):
                block, run = build(name)
                results.append(step(block, draw(name, rank), run))
        for others in results[1:]:
            torch.testing.assert_close(others, results[0], rtol=0, atol=0)
        check(results[0], build(name)[0], draw(name, rank))
    compare_compiled(rank)
    distributed.destroy_process_group()


def compare_compiled(rank):
    """Branches of which a process has no maps, and blocks, which are not."""
    conv = draw_branches()
    conv.compile(backend='aot_eager')
    maps = [x.detach()[rank : 2 * rank] for x in draw('branches', 0)]
    copies = [[x.clone().requires_grad_() for x in maps] for _ in range(2)]
    check(step(conv, copies[0]), draw_branches(), copies[1])
    (x,), run = draw('rep', rank), Regions(dict(backend='eager'))
    block = draw_block('rep', 'SyncBN')
    with kernels():
        run(block, x)
        block.dwconv.register_forward_hook(print)
        with pytest.warns(UserWarning, match='wait forever'):
            with pytest.raises(ValueError, match='GPU'):
                block(x)  # by layers, which need one


def test_statistics_are_those_of_all_processes(tmp_path):
    method = 'fork' if DEVICE == 'cpu' else 'spawn'  # which imports anew
    multiprocessing.start_processes(
        compare, (tmp_path,), nprocs=2, start_method=method
    )


@pytest.mark.parametrize('grouped', [False, True])
def test_one_process(grouped, request):
    """It exchanges nothing, in a group of one either."""
    if grouped:
        request.getfixturevalue('process_group')
    results = [
        step(draw_branches(norm, 'auto'), draw('branches', 0), kernels=False)
        for norm in ('SyncBN', 'BN')
    ]
    torch.testing.assert_close(*results)


def test_backend_without_exchange():
    with pytest.raises(ValueError, match='no statistics over several'):
        sum_of_branches(torch.ones(1, 1, 2, 2), [], group=object())
