"""Kernels compile for all GPUs that they are for, and fit there."""

import json

import pytest
from kernels import python

pytest.importorskip('triton', '3.6')

# Bytes that a block shares at most, by capability (CUDA's programming guide)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize(
    'capability',
    [
        100,
        # 8.0 and 9.0 are compiled in other tests, and the others are alike.
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in (80, 86, 89, 90, 120)
        ),
    ],
)
def test_compiles(capability, tmp_path):
    """Small problems, in the languages of Triton, LLVM and the assembler."""
    out = python(
        f"""
import json, torch
from compile_launches import *
where = {capability}, torch.bfloat16
with not_assembled():
    uses = [
        *compile_branches(*where, ((3, 1), (3, 2)), 16, 7),
        *compile_feed_forward(*where, 16),
        *compile_passes(*where, 16),
        *compile_fused_passes(*where, 16),
        *compile_contmix(*where, 7, 8, 7),
    ]
print(json.dumps(uses))
""",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    uses = json.loads(out.splitlines()[-1])
    assert len(uses) > 40
    for name, use in uses:
        assert use['shared'] <= SHARED[capability] * 1024, name
