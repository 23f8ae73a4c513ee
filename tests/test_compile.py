"""torch.compile takes the whole network as one graph."""

import copy
import re

import pytest
import tiny
import torch
import torch.nn.functional as F

from mmoverlock.models import OverLoCK
from mmoverlock.ops import depthwise_conv2d

ARCH = tiny.ARCH | dict(kernel_sizes=(5, 5, 5, 5))


@pytest.mark.parametrize('training', [False, True])
def test_fullgraph(training):
    """Gradients of blocks' graphs are in test_compile_regions.py."""
    torch.manual_seed(0)
    plain = OverLoCK(ARCH, deploy=not training).double().train(training)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend='eager')
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for _ in range(2):  # running statistics, and what is cached
        torch.testing.assert_close(run(image), plain(image))
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


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
