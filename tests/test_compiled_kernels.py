"""Kernels compile for GPUs that are not there, and fit on all of them.

The interpreter takes what the compiler does not.
"""

import json
import subprocess
import sys

import pytest
from kernels import python

from mmoverlock.ops.environment import MIN_TRITON

pytest.importorskip('triton', '3.6')

SHARED = 99 * 1024  # bytes of a block on the smallest, capability 8.6
MANY = (  # registers
    'pointwise',
    'dynamic_conv.triton.filters',
    'excitation.triton',
)
# Bytes are spilled, by capability: in large convolutions, so that more warps
# fit a multiprocessor.
A_FEW = {
    80: dict(depthwise=128, dynamic_conv=128),
    90: dict(depthwise=64),
    100: dict(depthwise=64, dynamic_conv=64, layernorm=32),
    120: dict(depthwise=64, prior=32, layernorm=32),
}
CONTMIX = dict(filters=('prepare', 'finish'), mix=('forward', 'backward'))


@pytest.mark.parametrize(
    'capability, dtype, every_shape',
    [
        (90, 'bfloat16', False),
        *(
            pytest.param(*where, True, marks=pytest.mark.slow)
            for where in [
                (80, 'bfloat16'),
                (80, 'float16'),
                (80, 'float32'),
                (90, 'bfloat16'),
                (90, 'float32'),
                (100, 'bfloat16'),
                (120, 'float32'),
            ]
        ),
    ],
)
def test_compiles_without_spills(capability, dtype, every_shape, pytestconfig):
    # Of 16 bits or of 32, whichever the rest is not
    other = 'bfloat16' if dtype == 'float32' else 'float32'
    out = python(
        f"""
import json, torch
from compile_launches import *
uses = compile_all({capability}, torch.{dtype}, {every_shape})
others = compile_operators(80, torch.{other}, 64, [branches])
others += compile_branches(80, torch.{other}, LARGE, 64, 14)
print(json.dumps([uses, others, [*all_kernels()]]))
""",
        TRITON_CACHE_DIR=str(pytestconfig.cache.mkdir('triton')),
    )
    uses, others, expected = json.loads(out.splitlines()[-1])
    names = {name for rows in uses.values() for name, _ in rows}
    assert {*expected} <= names | {name for name, _ in others}
    assert names - {*expected} == {
        f'dynamic_conv.triton.{file}.{name}'
        for file, names in CONTMIX.items()
        for name in names
    }
    for name, use in others:
        assert use['shared'] <= SHARED, (name, use)
    for kind, rows in uses.items():
        for name, use in rows:
            assert use['shared'] <= SHARED, (name, use)
            if kind == 'contmix' and dtype == 'float32':
                continue
            few = A_FEW.get(capability, {}).get(name.split('.')[0], 0)
            assert use['spills'] <= few, (name, use)
            if capability == 90 and not name.startswith(MANY):
                assert use['registers'] <= 168, (name, use)


def test_sizes_that_kernels_are_compiled_for():
    """Few, and small kernels: trainings at many sizes wait for each."""
    sizes = [(800, 1344), (800, 1088), (768, 992), (896, 1216), (704, 1056)]
    sizes += [(1024, 1344), (736, 704), (1344, 800)]
    out = python(
        f"""
import json
from compile_launches import *
print(json.dumps(compiled_anew({sizes})))
"""
    )
    first, *others = json.loads(out.splitlines()[-1])
    assert len(first) > 50
    anew = sum(others, [])
    assert len(anew) <= 4
    assert {name.split('.')[0] for name in anew} <= {'conv3x3', 'excitation'}


def test_layer_norm_in_nchw(pytestconfig):
    """Values side by side go together; programs run at a time as planned."""
    out = python(
        """
import json, torch
from compile_launches import *
def run(channels, width):
    x = draw(2, channels, 8, width, dtype=torch.bfloat16).to('meta')
    weight = torch.empty(channels, device='meta')
    y = focus.layer_norm.forward(x, weight, weight, 1e-6, True)
    focus.layer_norm.backward(y, x, weight, 1e-6)
shapes = (64, 8), (640, 8), (64, 7)
uses = [compile_launches(lambda: run(*s), 90) for s in shapes]
print(json.dumps(uses))
""",
        TRITON_CACHE_DIR=str(pytestconfig.cache.mkdir('triton')),
    )
    uses = [[use for _, use in pair] for pair in json.loads(out)]
    assert [forward['stores'] for forward, _ in uses] == [2, 2, 16]
    assert all(backward['registers'] <= 128 for _, backward in uses)


@pytest.mark.slow  # downloads 190 MB
def test_compiles_with_the_oldest_triton(tmp_path):
    version = '.'.join(map(str, MIN_TRITON))
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps']
    folder = tmp_path / 'triton'
    done = subprocess.run(
        [*command, '-t', folder, f'triton=={version}.*'],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f'triton {version} does not install: {done.stderr}')
    out = python(
        f"""
import sys; sys.path.insert(0, {str(folder)!r})
import json, torch, triton
from compile_launches import *
uses = compile_all(90, torch.bfloat16, False)
print(json.dumps([triton.__version__, [*uses]]))
""",
        TRITON_CACHE_DIR=str(tmp_path / 'cache'),
    )
    found, kinds = json.loads(out.splitlines()[-1])
    assert found.startswith(version) and len(kinds) > 1
