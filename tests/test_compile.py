"""torch.compile takes the whole network as one graph."""

import copy

import pytest
import torch

from mmoverlock.models import OverLoCK

pytestmark = pytest.mark.skipif(
    torch.__version__ < '2.6',
    reason='older compilers do not know what newer Python can do',
)
ARCH = dict(
    depths=(1, 1, 1, 1),
    channels=(8, 8, 16, 16),
    focus_depths=(2, 1),
    focus_heads=(2, 2),
)


@pytest.mark.parametrize('training', [False, True])
def test_fullgraph(training):
    torch.manual_seed(0)
    plain = OverLoCK(ARCH).double().train(training)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend='aot_eager')
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for _ in range(2):  # running statistics, and what is cached
        expected, actual = plain(image), run(image)
        torch.testing.assert_close(actual, expected)
    for maps in (expected, actual):
        sum(m.sin().sum() for m in maps).backward()
    gradients = (
        {name: p.grad for name, p in net.named_parameters()}
        for net in (plain, compiled)
    )
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
