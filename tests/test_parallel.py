"""Gradients of two processes that are exchanged by operators on lists."""

from functools import partial

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import distributed, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmoverlock.engine import ForeachDistributedDataParallel
from mmoverlock.engine.parallel import exchanging_lists

WRAPPERS = {
    'lists': lambda model: ForeachDistributedDataParallel(model, 2e-4),
    'one list': ForeachDistributedDataParallel,
    'mmengine': MMDistributedDataParallel,
}


class Model(BaseModel):
    """Some parameters lie in memory otherwise, some are frozen."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, (3, 1), groups=8),
            nn.Conv2d(8, 4, 1).requires_grad_(False),
            nn.Conv2d(4, 4, 2),
        ).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = None
        self.repeats = False

    def forward(self, x, mode):
        loss = 0
        if self.repeats:  # the last layer, whose gradient comes late then
            image = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).requires_grad_()
            loss = checkpoint(self.net[-1], image, use_reentrant=True).sum()
        x = self.net(x.contiguous(memory_format=torch.channels_last))
        return dict(loss=loss + (x * self.scale.float()).square().mean())


def start(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )


def steps(rank, wrap, accumulative_counts=1, count=4, **options):
    """The weights after some steps, and the wrapper."""
    torch.manual_seed(rank)  # of which the first process's counts
    model = Model()
    for name, value in options.items():
        setattr(model, name, value)
    wrapper = wrap(model)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.5, momentum=0.9)
    wrapped = OptimWrapper(optimizer, accumulative_counts=accumulative_counts)
    torch.manual_seed(10 + rank)
    for _ in range(count):
        logged = wrapper.train_step(dict(x=torch.randn(2, 3, 9, 8)), wrapped)
        assert logged['loss'].isfinite()
    return wrapper, dict(model.named_parameters())


def watched(model, sent):
    """Notes whether each bucket is sent before the last gradient is made."""
    wrapper = WRAPPERS['lists'](model)
    send = wrapper._send

    def note(bucket):
        sent.append(model.net[0].weight.grad is None)
        send(bucket)

    wrapper._send = note
    return wrapper


def compare(rank, folder):
    start(rank, folder)
    check_first_weights(rank)
    for accumulative_counts in (1, 3):
        sent = []
        wrappers = WRAPPERS | dict(lists=partial(watched, sent=sent))
        found = {
            name: steps(rank, wrap, accumulative_counts)
            for name, wrap in wrappers.items()
        }
        if accumulative_counts == 1:
            assert len(sent) == 4 * 4
            assert all(sent[::4]) and not any(sent[3::4])
        else:
            assert not any(sent) and len(sent) == 4
        _, expected = found['mmengine']
        for _, weights in found.values():
            torch.testing.assert_close(weights, expected)
        torch.save(expected, f'{folder}/{accumulative_counts}_{rank}.pth')
    wrapper, _ = found['lists']
    assert len(wrapper._buckets) == 4  # one is of another dtype
    early = wrapper._buckets[0].parameters[0]
    assert early is wrapper.module.net[-1].bias
    for options, message in (
        (dict(unused=nn.Linear(2, 2)), r'2 parameters.*unused\.weight.*find_'),
        (dict(repeats=True), 'grew'),
    ):
        with pytest.raises(RuntimeError, match=message):
            steps(rank, WRAPPERS['lists'], **options)
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
    """Weights of all processes, with gradients accumulated or not; errors."""
    multiprocessing.start_processes(
        compare, (tmp_path,), nprocs=2, start_method='fork'
    )
    for accumulative_counts in (1, 3):
        first, second = (
            torch.load(tmp_path / f'{accumulative_counts}_{rank}.pth')
            for rank in (0, 1)
        )
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradients_of_other_strides(process_group):
    """Along sides of 1 they are taken in one operator with others."""
    wrapper, _ = steps(0, ForeachDistributedDataParallel, count=0)
    conv = wrapper.module.net[2]
    for parameter in wrapper.parameters():
        parameter.grad = torch.ones_like(parameter)
    grad = torch.randn(8, 3).as_strided((8, 1, 3, 1), (3, 1, 1, 7))
    conv.weight.grad = grad
    bucket, _ = wrapper._buckets
    for view, other in zip(bucket.views, bucket.gradients(), strict=True):
        assert view.stride() == other.stride()
    place = [p is conv.weight for p in bucket.parameters].index(True)
    torch.testing.assert_close(bucket.gradients()[place], grad)


def test_operators_of_a_bucket(process_group):
    """However many parameters it has."""
    wrapper, _ = steps(0, ForeachDistributedDataParallel, count=0)
    for parameter in wrapper.parameters():
        parameter.grad = torch.ones_like(parameter)
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator.__name__.split('.')[0])
            return operator(*args, **kwargs or {})

    wrapper._sent = []
    with Names():
        wrapper._finish()
    copy = '_foreach_copy_'
    each = [copy, 'div_', 'allreduce_']  # of a dtype
    assert names == [*each, *each, copy, copy]


class Joined(BaseModel):
    """The gradients of both parameters are views of one tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(2, 4))
        self.second = nn.Parameter(torch.ones(3, 4))

    def forward(self, mode):
        return dict(loss=torch.cat([self.first, self.second]).square().sum())


def joined():
    """A training of such a model, each parameter in a bucket of its own."""
    wrapper = ForeachDistributedDataParallel(Joined(), 0)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.25)
    return wrapper, OptimWrapper(optimizer)


def test_gradients_that_share_memory(process_group):
    """To write one is not taken for growth of the other."""
    wrapper, wrapped = joined()
    assert len(wrapper._buckets) == 2
    wrapper.train_step({}, wrapped)
    for parameter in wrapper.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5))


@pytest.mark.parametrize(
    'distributed, config, given, expected',
    [
        (True, {}, None, ForeachDistributedDataParallel),
        (True, {}, dict(type='other'), 'other'),
        (True, dict(find_unused_parameters=True), None, None),
        (False, {}, None, None),
    ],
)
def test_when_runners_take_it(distributed, config, given, expected):
    class Runner:
        cfg = config

        def wrap_model(self, model_wrapper_cfg, model):
            return model_wrapper_cfg and model_wrapper_cfg['type']

    runner = exchanging_lists(Runner)()
    runner.distributed = distributed
    assert runner.wrap_model(given, nn.Identity()) == expected
