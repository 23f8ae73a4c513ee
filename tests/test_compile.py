"""torch.compile: of the whole network as one graph, and of blocks.

``OverLoCK(compile=True)`` compiles blocks, for images of any size.
"""

import copy
import pickle
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from networks import backbone, step
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock.models import OverLoCK
from mmoverlock.models.fuse import fuse
from mmoverlock.ops import depthwise_conv2d

# Of each a graph: blocks without a layer scale, blocks with one, the first of
# the Focus-Net and its others.
ARCH = dict(
    depths=(2, 1, 1, 1),
    channels=(8, 8, 8, 8),
    focus_depths=(2, 1),
    focus_heads=(2, 2),
    kernel_sizes=(5, 5, 5, 5),
)
GRAPHS = 4
# As of multi-scale training. The square comes first: other sizes of a graph
# need not be alike where its first ones were.
SHAPES = (2, 3, 192, 192), (2, 3, 192, 256), (3, 3, 224, 288)


@pytest.fixture
def make():
    """A function that makes models, plain and compiled, and a counter."""
    torch.compiler.reset()
    counters.clear()

    def make(backend='eager', dtype=torch.float64, training=True, **options):
        counter = CompileCounterWithBackend(backend)
        plain = backbone(ARCH, **options)
        compiled = OverLoCK(ARCH, compile=dict(backend=counter), **options)
        compiled.load_state_dict(plain.state_dict())
        models = plain.to(dtype), compiled.to(dtype)
        return *(model.train(training) for model in models), counter

    yield make
    torch.compiler.reset()


def images(shape, model):
    return torch.rand(shape, dtype=next(model.parameters()).dtype)


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def compare(plain, compiled, shape):
    x = images(shape, plain)
    check(step(compiled, x), step(plain, x))


@pytest.mark.parametrize('training', [False, True])
def test_whole_network(training, make):
    """It is one graph, and no block is a graph in it."""
    plain, compiled, counter = make(training=training, deploy=not training)
    run = torch.compile(compiled, fullgraph=True, backend='eager')
    x = images((2, 3, 64, 64), plain)
    for _ in range(2):  # running statistics, and what is cached
        torch.testing.assert_close(run(x), plain(x))
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
    assert counter.frame_count == 0


def test_many_sizes(make):
    """Blocks share graphs, whatever they drop or recompute, and images do."""
    plain, compiled, counter = make(
        drop_path_rate=0.3, with_cp=(1, 0, 0, 1, 2, 0)
    )
    for shape in SHAPES:
        compare(plain, compiled, shape)
        # The very first block drops nothing, which is a graph of its own.
        assert counter.frame_count == GRAPHS + 1
    assert not counters['graph_break']


@torch.no_grad()
def test_copies(make):
    """They run graphs that are there, with weights and sizes of their own."""
    plain, compiled, counter = make(out_indices=(0,), training=False)
    x = images((2, 3, 64, 64), plain)
    check(compiled(x), plain(x))
    other = copy.deepcopy(compiled)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        a.mul_(0.5), b.mul_(0.5)
    x = images((3, 3, 96, 64), plain)
    check(other(x), plain(x))
    assert counter.frame_count == 1
    model = OverLoCK(ARCH, out_indices=(0,), compile=dict(backend='eager'))
    model(x.float())  # what it has compiled is not in the file
    saved = pickle.loads(pickle.dumps(model))
    assert saved.regions.compile == dict(backend='eager')


@torch.no_grad()
def test_what_changes_a_block(make):
    """Hooks that come late are called, and fused blocks are other blocks."""
    plain, compiled, counter = make(out_indices=(0,), training=False)
    x = images((1, 3, 64, 96), plain)
    seen = []
    check(compiled(x), plain(x))
    inner = compiled.blocks1[1].proj[2]
    hook = inner.register_forward_hook(lambda *args: seen.append(args[0]))
    check(compiled(x), plain(x))
    hook.remove()
    check(compiled(x), plain(x))
    assert seen == [inner]
    graphs = counter.frame_count
    check(fuse(compiled)(x), plain(x))
    assert counter.frame_count > graphs


def test_tracing_and_counting_see_the_blocks(make):
    plain, compiled, counter = make(out_indices=(0,), training=False)
    x = images((1, 3, 64, 64), plain)
    counts = []
    for model in (plain, compiled):
        with FlopCounterMode(display=False) as flops:
            model(x)
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0
    check(torch.jit.trace(compiled, x, check_trace=False)(x), plain(x))
    check(torch.export.export(compiled, (x,)).module()(x), plain(x))
    assert counter.frame_count == 0


def test_kernels_are_operators_of_graphs(auto_is_triton):
    """The kernels of a GPU are traced both ways, and not run here."""
    pytest.importorskip('triton')
    torch.compiler.reset()
    counters.clear()
    operators = Counter()

    def never_run(graph, _):
        operators.update(str(node.target) for node in graph.graph.nodes)

        def run(*args):
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                outs = graph(*tree_map_only(Tensor, mode.from_tensor, args))
            return tree_map_only(Tensor, zeros_of, outs)

        return make_boxed_func(run)

    def zeros_of(fake):
        shape, strides = fake.shape, fake.stride()
        return torch.empty_strided(shape, strides, dtype=fake.dtype).zero_()

    counter = CompileCounterWithBackend(aot_autograd(fw_compiler=never_run))
    model = OverLoCK(ARCH, out_indices=(2,), compile=dict(backend=counter))
    for shape in SHAPES[:2]:
        step(model, images(shape, model))
        assert counter.frame_count == GRAPHS
    assert not counters['graph_break']
    torch.compiler.reset()
    assert operators['mmoverlock.contmix.default'] == 2
    assert operators['mmoverlock.sum_of_branches_backward.default'] == GRAPHS
    assert not any('aten.convolution' in name for name in operators)


def test_under_ddp(make, process_group):
    """Gradients come out of it as they do without."""
    plain, compiled, _ = make(out_indices=(0,))
    x = images((2, 3, 64, 64), plain)
    step(DistributedDataParallel(compiled), x)
    _, expected, _ = step(plain, x)
    check({k: p.grad for k, p in compiled.named_parameters()}, expected)


@pytest.mark.slow
def test_inductor(make):
    """It computes the same; on CPUs, it makes graphs for every height."""
    plain, compiled, _ = make('inductor', drop_path_rate=0.3)
    for shape in SHAPES[:2]:
        compare(plain, compiled, shape)


@torch.no_grad()
def test_one_image_stays_in_channels_last(capfd):
    """Inductor's view of one image is not what a slow convolution gets."""

    def run(maps, weight):
        maps = F.layer_norm(maps.permute(0, 2, 3, 1), maps.shape[1:2])
        return depthwise_conv2d(maps.permute(0, 3, 1, 2)[-1:], weight)

    torch.manual_seed(0)
    maps = torch.randn(2, 16, 8, 8).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(16, 1, 13, 13)
    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(maps, weight), run(maps, weight))
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        compiled(maps, weight)
    convolution = re.search(r'exec,cpu,convolution.*', capfd.readouterr().out)
    assert ',src:f32::blocked:acdb:' in convolution[0], convolution[0]
