"""``OverLoCK(compile=True)``: blocks run compiled, for images of any size."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mmoverlock.models import OverLoCK

ARCH = dict(
    depths=(2, 1, 1, 1),
    channels=(8, 8, 16, 16),
    focus_depths=(3, 1),
    focus_heads=(2, 2),
)
# Of each a graph: blocks of the four stages; the first of the Focus-Net, the
# others at stride 16, and those at stride 32.
GRAPHS = 7


@pytest.fixture
def make():
    """A function that makes models, plain and compiled, and a counter."""
    torch.compiler.reset()
    counters.clear()
    counter = CompileCounterWithBackend('aot_eager')

    def make(**options):
        torch.manual_seed(0)
        plain = OverLoCK(ARCH, **options)
        compiled = OverLoCK(ARCH, compile=dict(backend=counter), **options)
        compiled.load_state_dict(plain.state_dict())
        return plain, compiled, counter

    yield make
    torch.compiler.reset()


def train(model, shape):
    """A step, from the same random numbers; outputs and gradients."""
    torch.manual_seed(1)
    model.zero_grad()
    maps = model(torch.rand(shape))
    sum(m.sin().sum() for m in maps).backward()
    return maps, {name: p.grad for name, p in model.named_parameters()}


def test_training(make):
    """Blocks share graphs, whatever they drop; sizes make no new ones."""
    plain, compiled, counter = make(drop_path_rate=0.3)
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (4, 3, 128, 160)):
        torch.testing.assert_close(
            train(compiled, shape), train(plain, shape), rtol=1e-3, atol=1e-4
        )
        assert counter.frame_count == GRAPHS
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
    assert not counters['graph_break']


@torch.no_grad()
def test_inference(make):
    plain, compiled, counter = make()
    for model in (plain, compiled):
        model.eval()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64)):
        x = torch.rand(shape)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-3, atol=1e-4)
        assert counter.frame_count == GRAPHS
    assert not counters['graph_break']


def test_recomputing(make):
    """With ``with_cp``, statistics are counted once here, too."""
    plain, compiled, _ = make(with_cp=True)
    torch.testing.assert_close(
        train(compiled, (2, 3, 64, 64)),
        train(plain, (2, 3, 64, 64)),
        rtol=1e-3,
        atol=1e-4,
    )
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_copies(make):
    """They run their own weights, and can be pickled."""
    _, compiled, _ = make()
    compiled.eval()
    x = torch.rand(1, 3, 64, 64)
    before = compiled(x)
    other = copy.deepcopy(compiled)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    assert not torch.equal(other(x)[0], before[0])
    torch.testing.assert_close(compiled(x), before)
    assert pickle.loads(pickle.dumps(OverLoCK(ARCH, compile=True)))


def test_arguments():
    with pytest.raises(ValueError, match="compile must be.*'yes'"):
        OverLoCK(ARCH, compile='yes')
    assert not hasattr(OverLoCK(ARCH).blocks1[0], 'region')
