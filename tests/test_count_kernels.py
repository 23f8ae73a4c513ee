"""What bounds kernels, from their machine code; see benchmarks/kernels.py."""

import json

import pytest
from kernels import python

pytest.importorskip('triton', '3.6')


def test_compiled_convolution(pytestconfig):
    """Multiply-adds, and products of matrices, are those of its definition."""
    out = python(
        """
import json, sys
import torch
sys.path.insert(0, '..')
from benchmarks.kernels import compile_step, describe
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops.depthwise.triton import banded
from mmoverlock.ops.depthwise.triton.common import KNOBS
with torch.device('meta'):
    conv = DilatedReparamConv(64, 13, dict(type='BN'), True, 'triton')
    x = torch.empty(2, 64, 21, 21).requires_grad_()
for dtype in torch.float32, torch.bfloat16:
    kernels = compile_step(conv, x, dtype)
    forward = kernels[0]
    print(describe(kernels))
    print(json.dumps([
        forward.name, forward.launches, forward.warps, forward.issued,
        forward.milliseconds, forward.spills, len(kernels),
    ]))
print(json.dumps([KNOBS, banded.KNOBS]))
""",
        TRITON_CACHE_DIR=str(pytestconfig.cache.mkdir('triton')),
    )
    lines = out.splitlines()
    tiles, knobs = json.loads(lines.pop())
    rows = tiles['T']
    ends = [i for i, line in enumerate(lines) if line.startswith('[')]
    bands = knobs['T'] * knobs['R']
    blocks = -(-13 // knobs['R'])
    chunks = -(-2 * 2 * -(-21 // knobs['T']) // 16)
    cases = [
        # Tiles of 8 columns by 64 channels, four of these a thread
        ('conv2d._', 2 * -(-21 // rows) * -(-21 // 8) * 4, 'FFMA')
        + (4 * rows * 13 * 13,),
        # 16 tiles of 11 columns, which two windows of the input reach; two
        # products for each of 2 channels a warp
        ('banded._banded_', 8 * chunks * 4, 'HMMA')
        + (2 * blocks * bands * 2 * 2,),
    ]
    for first, end, case in zip((0, ends[0] + 1), ends, cases, strict=True):
        table = lines[first:end]
        name, launches, warps, issued, milliseconds, *others = json.loads(
            lines[end]
        )
        module, expected_warps, instruction, number = case
        assert name == f'depthwise.triton.{module}conv2d_kernel'
        assert launches == 1
        assert warps == expected_warps
        assert issued[instruction] == number
        expected = 1e3 * warps * sum(issued.values()) / (132 * 4 * 1.755e9)
        assert milliseconds == pytest.approx(expected)
        assert others[0] <= 32
        assert len(table) == others[1] + 3  # a head and two sums
        assert name in table[1]
        assert table[-2].startswith('depthwise')
