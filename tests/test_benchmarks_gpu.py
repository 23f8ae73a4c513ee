"""What measures GPUs, on a CPU."""

import inspect
import json
import re

import pytest
import torch

from benchmarks import gpu

triton = pytest.importorskip('triton', '3.6')

CPU = torch.device('cpu')
SMALL = dict(batch=1, height=5, width=6, groups=1, channels=2, kernel_size=5)
ARCH = dict(
    depths=[1, 1, 1, 1],
    channels=[8, 16, 24, 32],
    focus_depths=[1, 1],
    focus_heads=[2, 2],
)

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason='the kernels are compiled'
)


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(gpu, 'WARM_UPS', 0)
    monkeypatch.setattr(gpu, 'REPEATS', 1)


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.main([]) == 2
    assert 'needs a GPU' in capsys.readouterr().err


@pytest.mark.parametrize('rows', ['CONTMIX_ROWS', 'NETWORK_ROWS'])
def test_rows_fit_their_functions(rows):
    for run in getattr(gpu, rows).values():
        inspect.signature(run.func).bind(CPU, **run.keywords)


def test_measures(monkeypatch, tmp_path):
    """All kinds of rows, at sizes for an interpreter."""
    results = {
        'copy': gpu.copy(CPU, size=2**20),
        'matrix product, fp32': gpu.matmul(CPU, torch.float32, size=64),
    }
    for backend in gpu.BACKENDS:
        for backward in (False, True):
            name = f'ContMix, fp32, {backend}, {backward}'
            results[name] = gpu.contmix_row(
                CPU, torch.float32, backend, backward, **SMALL
            )
    for train in (False, True):
        results[f'network, {train}'] = gpu.network_row(
            CPU, torch.bfloat16, 'tiled', train, 2, (64, 64), arch=ARCH
        )
    for name, figures in results.items():
        assert figures['seconds'] > 0
        assert name in gpu.describe(name, results)
    assert 'of the bound' in gpu.describe(
        'ContMix, fp32, triton, True', results
    )
    json.dumps(results)


def test_depthwise_rows():
    """They are among the others, and in their table."""
    from benchmarks import gpu_depthwise

    shape = (1, 2, 5, 6), 5, 'NCHW', 'fp32'
    rows = {
        'forward': gpu_depthwise.convolution(*shape, 'forward', CPU),
        'branches': dict(
            gpu_depthwise.branches(*shape, CPU),
            torch_bytes=2**21,
            triton_bytes=2**20,
        ),
    }
    names = [*gpu.rows(CPU)]
    for name, words in (('forward', 'bound'), ('branches', '1 MB, .* 2 MB')):
        assert any(name in row and '17 x 17' in row for row in names)
        assert re.search(f'PyTorch.*{words}', gpu.describe(name, rows))


def test_out_of_memory():
    def run(device):
        raise torch.OutOfMemoryError

    figures = gpu.measure(run, CPU)
    assert 'out of memory' in gpu.describe('row', {'row': figures})


@pytest.mark.parametrize('tolerance, right', [(1e-4, True), (-1, False)])
def test_checks_first(monkeypatch, capsys, tolerance, right):
    monkeypatch.setattr(gpu, 'CHECKS', {'small': (torch.float32, SMALL)})
    monkeypatch.setitem(gpu.TOLERANCES, torch.float32, tolerance)
    assert gpu.check(CPU) is right
    assert ('WRONG' in capsys.readouterr().out) is not right
