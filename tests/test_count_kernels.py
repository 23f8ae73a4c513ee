"""What bounds kernels, from their machine code; see benchmarks/kernels.py."""

import json

import pytest
from kernels import python

from benchmarks.kernels import Loop, loops_of

pytest.importorskip('triton', '3.6')

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/              @!P2 BRA `(.L_x_2) ;
.L_x_2:
        /*0060*/                   EXIT ;
"""


def test_loops():
    root = loops_of(SASS)
    counted = root.run([(3, [(5, [])])])
    assert counted == dict(MOV=1, LDG=3, FFMA=15, BRA=15 + 3 + 1, EXIT=1)
    with pytest.raises(ValueError, match='1 loops'):
        root.run([])
    assert Loop(0, 8).run([]) == {}


def test_compiled_convolution(tmp_path):
    """Multiply-adds are those of its definition."""
    out = python(
        """
import json, sys
import torch
sys.path.insert(0, '..')
from benchmarks.kernels import compile_step, describe
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops.depthwise.triton.common import Layout
with torch.device('meta'):
    conv = DilatedReparamConv(64, 5, dict(type='BN'), True, 'triton')
    x = torch.empty(2, 64, 21, 21).requires_grad_()
kernels = compile_step(conv, x)
forward = kernels[0]
rows = Layout.of(x.shape, 5).rows
print(describe(kernels))
print(json.dumps([
    rows, forward.name, forward.launches, forward.warps, forward.issued,
    forward.milliseconds, forward.spills, len(kernels),
]))
""",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    *table, row = out.splitlines()
    rows, name, launches, warps, issued, milliseconds, *others = json.loads(
        row
    )
    assert name == 'depthwise.triton.conv2d._conv2d_kernel'
    assert launches == 1
    tiles = 2 * -(-21 // rows) * -(-21 // 8) * 2  # 8 columns, 32 channels
    assert warps == 4 * tiles
    assert issued['FFMA'] == 2 * rows * 5 * 5  # two columns a thread
    expected = 1e3 * warps * sum(issued.values()) / (132 * 4 * 1.755e9)
    assert milliseconds == pytest.approx(expected)
    assert others[0] == 0
    assert len(table) == others[1] + 3  # a head and two sums
    assert name in table[1]
    assert table[-2].startswith('depthwise')
