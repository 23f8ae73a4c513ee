"""Bounds of kernels, from their machine code; see benchmarks/kernels.py."""

import json

import pytest
from kernels import python

pytest.importorskip('triton', '3.6')
mix = pytest.importorskip('mmoverlock.ops.dynamic_conv.triton.mix')
CODE = """
import json, sys
import torch
from torch import nn
sys.path.insert(0, '..')
from benchmarks import kernels
from benchmarks.kernels import compile_step, describe
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops import contmix
from mmoverlock.ops.depthwise.triton import banded, common

def tell(kernels, *facts):
    fields = 'name', 'launches', 'warps', 'spills', 'issued'
    rows = [[getattr(kernel, name) for name in fields] for kernel in kernels]
    print(json.dumps([rows, describe(kernels).splitlines(), *facts]))
"""


@pytest.fixture
def compiled(pytestconfig):
    """A function that runs code; what it tells of kernels."""
    folder = str(pytestconfig.cache.mkdir('triton'))

    def run(code):
        out = python(CODE + code, TRITON_CACHE_DIR=folder)
        return map(json.loads, out.splitlines())

    return run


def test_convolution(compiled):
    """Multiply-adds, and products of matrices, are those of its definition."""
    results = compiled("""
with torch.device('meta'):
    conv = DilatedReparamConv(64, 13, dict(type='BN'), True, 'triton')
    x = torch.empty(2, 64, 21, 21).requires_grad_()
for dtype, module in (torch.float32, common), (torch.bfloat16, banded):
    tell(compile_step(conv, x, dtype), module.KNOBS['T'], banded.KNOBS['R'])
""")
    for rows, table, tiles, blocks in results:
        name, launches, warps, spills, issued = rows[0]
        if 'banded' in name:
            # 16 tiles of 11 columns, which two windows of the input reach; two
            # products for each of 2 channels a warp
            chunks = -(-2 * 2 * -(-21 // tiles) // 16)
            assert warps == 8 * chunks * 4
            number = 2 * -(-13 // blocks) * tiles * blocks * 2 * 2
            assert issued['HMMA'] == number
        else:
            # Tiles of 8 columns by 64 channels, four of these a thread
            assert warps == 2 * -(-21 // tiles) * -(-21 // 8) * 4
            assert issued['FFMA'] == 4 * tiles * 13 * 13
        assert launches == 1 and spills <= 32
        assert len(table) == len(rows) + 3  # a head and two sums
        assert name in table[1]


@pytest.mark.slow
def test_multiply_adds(compiled):
    """Of what is issued, most are those of the definition."""
    ((rows, _),) = compiled("""
kernels.FAMILIES = tuple(
    f'depthwise.triton.{name}' for name in (
        'statistics.', 'tap_grads.', 'branch_grads.'))
with torch.device('meta'):
    conv = DilatedReparamConv(64, 17, dict(type='BN'), False, 'triton')
    x = torch.empty(128, 64, 56, 56).requires_grad_()
tell(compile_step(conv, x))
""")
    small = 5**2 + 7**2 + 9**2 + 3 * 3**2
    bounds = [
        ('statistics._statistics', small, 1.6),
        ('tap_grads._tap_grads', 17**2, 1.3),
        ('branch_grads._branch_grads', small, 1.9),
        ('tap_grads._tap_grads', 17**2 + small, 1.5),
    ]
    for row, (what, taps, most) in zip(rows, bounds, strict=True):
        name, launches, warps, spills, issued = row
        assert name == f'depthwise.triton.{what}_kernel'
        lanes = 32 * warps * sum(issued.values())
        assert launches == 1 and spills == 0
        assert lanes <= most * taps * 128 * 64 * 56**2


@pytest.mark.slow
def test_contmix(compiled):
    """Of 16 positions, in all images that a program goes through."""
    (((large, small), _),) = compiled("""
kernels.FAMILIES = 'dynamic_conv.triton.mix.',

class Mix(nn.Module):
    @torch.no_grad
    def mix(self, x):
        key = torch.empty(128, 128, 7, 7, dtype=x.dtype, device='meta')
        weights = [torch.empty(*shape, device='meta') for shape in (
            (194, 49), (194,), (8, 9, 9), (8, 25, 25))]
        contmix(x[:, :128], key, x, *weights[:2], weights[2:], 'triton')

    def forward(self, x):
        self.mix(x)
        return x + 1

x = torch.empty(128, 256, 14, 14, dtype=torch.bfloat16, device='meta')
x = x.contiguous(memory_format=torch.channels_last)
tell(compile_step(Mix(), x.requires_grad_()))
""")
    images = mix.KNOBS['IMAGES']
    for row, name, products, most in (
        # Logits of two planes of filters, of 64 taps; 4 times 16 taps to mix
        (large, 'classes 13', 3 * (2 + 4), 1060),  # the target is 1200
        # Of 8 taps a product, 32 in two planes; 2 rows of 16 pixels to mix
        (small, 'windows 5', 8 + 3 * 4, 500),
    ):
        assert row[0].endswith(f'forward {name}')
        assert row[2:4] == [2048, 0]
        issued = row[4]
        matrices = issued.get('HGMMA', 0) + issued.get('HMMA', 0)
        assert matrices == images * products
        assert sum(issued.values()) <= most * images
