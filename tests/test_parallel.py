"""Gradients of two processes that are exchanged by operators on lists."""

from unittest import mock

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import distributed, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmoverlock.engine import ForeachDistributedDataParallel
from mmoverlock.engine.parallel import exchanging_lists


class Model(BaseModel):
    """Some parameters lie in memory otherwise, some are frozen."""

    def __init__(self, unused=False, repeats=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, (3, 1), groups=8),
            nn.Conv2d(8, 4, 1).requires_grad_(False),
            nn.Conv2d(4, 4, 2),
        ).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = nn.Linear(2, 2) if unused else None
        self.repeats = repeats

    def forward(self, x, mode):
        loss = 0
        if self.repeats:  # the last layer, whose gradient comes late then
            image = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).requires_grad_()
            loss = checkpoint(self.net[-1], image, use_reentrant=True).sum()
        x = self.net(x.contiguous(memory_format=torch.channels_last))
        return dict(loss=loss + (x * self.scale.float()).square().mean())


class Noted(ForeachDistributedDataParallel):
    """In small buckets; notes which it sends before the last gradient."""

    def __init__(self, model):
        super().__init__(model, 2e-4)
        self.early = []

    def _send(self, bucket):
        self.early.append(self.module.net[0].weight.grad is None)
        super()._send(bucket)


def train(rank, wrap, accumulative_counts=1, **options):
    """The wrapper, and the weights after four steps."""
    torch.manual_seed(rank)  # of which the first process's counts
    wrapper = wrap(Model(**options))
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.5, momentum=0.9)
    wrapped = OptimWrapper(optimizer, accumulative_counts=accumulative_counts)
    torch.manual_seed(10 + rank)
    for _ in range(4):
        if accumulative_counts > 1:  # of which one parameter takes no part
            wrapper.module.net[0].weight.grad = None
        logged = wrapper.train_step(dict(x=torch.randn(2, 3, 9, 8)), wrapped)
        assert logged['loss'].isfinite()
    return wrapper, dict(wrapper.module.named_parameters())


def compare(rank, folder):
    """The part of each process."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    check_first_weights(rank)
    # Added up over three steps, gradients are whole when all are there.
    for counts, steps in (1, 4), (3, 1):
        _, expected = train(rank, MMDistributedDataParallel, counts)
        lists, weights = train(rank, Noted, counts)
        torch.testing.assert_close(weights, expected)
        assert len(lists.early) == 4 * steps
        assert lists.early[::4] == [counts == 1] * steps
        assert not any(lists.early[3::4])
        _, weights = train(rank, ForeachDistributedDataParallel, counts)
        torch.testing.assert_close(weights, expected)
    # One is of another dtype; the last layers come first.
    assert len(lists._buckets) == 4
    assert lists._buckets[0].parameters[0] is lists.module.net[-1].bias
    for name, message in (
        ('unused', r'2 parameters.*unused\.weight.*find_'),
        ('repeats', 'grew'),
    ):
        with pytest.raises(RuntimeError, match=message):
            train(rank, Noted, **{name: True})
    distributed.destroy_process_group()


def check_first_weights(rank):
    """Of tensors with gaps, and of one whose elements share memory, too."""
    model = nn.Module()
    model.gaps = nn.Parameter(torch.full((4, 4), float(rank))[:, ::2])
    model.register_buffer('turned', torch.full((2, 3), float(rank)).T)
    model.register_buffer('one', torch.zeros(1).expand(1000))
    ForeachDistributedDataParallel(model)
    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.any()


def test_as_mmengine(tmp_path):
    """With gradients accumulated or not; buckets go early; errors."""
    multiprocessing.start_processes(
        compare, (tmp_path,), nprocs=2, start_method='fork'
    )


class Copies(TorchDispatchMode):
    """Notes operators; those on lists get tensors of equal strides."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.__name__.split('.')[0])
        if self.names[-1] == '_foreach_copy_':
            for one, other in zip(*args[:2], strict=True):
                assert one.stride() == other.stride()
        return operator(*args, **kwargs or {})


def test_operators_of_a_bucket(process_group):
    """Few, however many parameters it has and whatever strides of sides of 1.

    Their gradients could be in any order there.
    """
    wrapper = ForeachDistributedDataParallel(Model())
    for parameter in wrapper.parameters():
        parameter.grad = torch.ones_like(parameter)
    conv = wrapper.module.net[2]
    grad = torch.randn(8, 3).as_strided((8, 1, 3, 1), (3, 1, 1, 7))
    conv.weight.grad = grad.clone()
    wrapper._sent = []
    with Copies() as copies:
        wrapper._finish()
    copy = '_foreach_copy_'
    each = [copy, 'div_', 'allreduce_']  # of a dtype
    names = [name for name in copies.names if name != 'as_strided']
    assert names == [*each, *each, copy, copy]
    torch.testing.assert_close(conv.weight.grad, grad)


class Joined(BaseModel):
    """The gradients of both parameters are views of one tensor."""

    def __init__(self):
        super().__init__()
        rows = torch.ones(2, 4), torch.ones(3, 4)
        self.rows = nn.ParameterList(rows)

    def forward(self, mode):
        return dict(loss=torch.cat([*self.rows]).square().sum())


def test_gradients_that_share_memory(process_group):
    """To write one is not taken for growth of the other."""
    wrapper = ForeachDistributedDataParallel(Joined(), 0)
    assert len(wrapper._buckets) == 2
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.25)
    wrapper.train_step({}, OptimWrapper(optimizer))
    for parameter in wrapper.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5))


@pytest.mark.parametrize(
    'config, given, expected',
    [
        ({}, None, dict(type=ForeachDistributedDataParallel)),
        ({}, dict(type='other'), dict(type='other')),
        (dict(find_unused_parameters=True), None, None),
    ],
)
def test_when_runners_take_it(config, given, expected):
    class Runner:
        distributed, cfg = True, config
        wrap_model = mock.Mock()

    exchanging_lists(Runner)().wrap_model(given, model := nn.Identity())
    Runner.wrap_model.assert_called_once_with(expected, model)
