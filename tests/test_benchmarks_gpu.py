"""Measuring GPUs and tuning kernels, tried on a CPU."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import time
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from benchmarks import gpu

pytest.importorskip('triton', '3.6')
from benchmarks import gpu_rows, gpu_tune  # noqa: E402

CPU = torch.device('cpu')
SIZE = 2, 64, 64
ARCH = tiny.ARCH | dict(kernel_sizes=(5, 5, 5, 5))
# Rows, of functions that processes have without this module.
FAIL, FAILED = partial(next, iter(())), 'StopIteration: '
CRASH, CRASHED = partial(os._exit, 3), 'ended with exit code 3'
HANG = partial(time.sleep, 600)
MISSING = 'a_package_that_is_not_there'
ONE = partial(dict, ms=1)


def has_ended(pid):
    """Whether a process is gone, or will be within seconds."""
    stat = Path(f'/proc/{pid}/stat')
    end = time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != 'Z':
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_rows(tmp_path, monkeypatch):
    """A row that fails or hangs ends with its process, and the rest goes on.

    What it has started ends with it. Then the time is over. Functions beside
    each other are in two processes, of which one has the first and the third.
    """
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    file = tmp_path / 'pid'
    start = ['sh', '-c', f'echo $$ > {file}; exec sleep 600']
    table = dict(
        fail=(FAIL, 60),
        need=(partial(importlib.import_module, MISSING), 60),
        crash=(CRASH, 60),
        hang=(partial(subprocess.run, start), 3),
        one=(ONE, 60),
        jobs=(dict(one=ONE, bad=FAIL, crash=CRASH), 60),
    )
    lines = [*gpu.measure(table, 120)]
    assert [line.pop('row') for line in lines] == [*table]
    took = [line.pop('took') for line in lines]
    assert 30 > took[3] >= 3
    assert lines == [
        dict(failed=FAILED),
        dict(missing=MISSING),
        dict(failed=CRASHED),
        dict(failed='cut off after 3 s'),
        dict(ms=1),
        dict(jobs=3, errors={'process 0': CRASHED, 'bad': FAILED}),
    ]
    assert has_ended(file.read_text().strip())
    line, last = gpu.measure(dict.fromkeys('ab', (HANG, 60)), 1)
    assert line['failed'] == 'cut off after 1 s'
    assert last == dict(left=['b'])


def test_command(capsys, monkeypatch):
    """Rows that are chosen; there is none without a GPU."""
    table = dict(small=(ONE, 60), large=(FAIL, 60))
    monkeypatch.setattr(gpu_rows, 'rows', lambda device: table)
    monkeypatch.setattr(gpu_tune, 'rows', lambda device: (table, {}))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.main([]) == 2
    assert 'needs a GPU' in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    for options, chosen in (
        (['--rows', 'mall', 'other'], ['small']),
        (['--tune'], ['small', 'large']),
    ):
        assert gpu.main(options) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        assert [line['row'] for line in lines] == chosen


@pytest.fixture
def measured(monkeypatch):
    """The rows, which are quick."""
    for name, value in dict(BUDGET=0, WARM_UPS=0, LEAST=1).items():
        monkeypatch.setattr(gpu_rows, name, value)
    for name, value in dict(MIN_RUNS=0, _tapes={}).items():
        monkeypatch.setattr(gpu_rows.tape, name, value)
    return gpu_rows


def test_rows_fit_their_functions():
    """Kernels of all stages are compiled."""
    stages = {name.split(',')[0] for name in gpu_rows.compile_jobs(CPU)}
    assert stages == {*gpu_rows.OverLoCK.block_groups}
    for run, limit in gpu_rows.rows(CPU).values():
        assert limit > 0
        for function in run.values() if isinstance(run, dict) else [run]:
            inspect.signature(function.func).bind(
                *function.args, **function.keywords
            )


def test_networks(measured):
    figures = measured.network(ARCH, SIZE, 'bf16', True, CPU)
    rate = pytest.approx(2e3 / figures['ms'], abs=0.1)
    assert figures['images_per_second'] == rate
    figures = measured.kernels(ARCH, SIZE, 'bf16', True, CPU, most=3)
    assert len(figures['kernels']) == 3 and figures['launches'] > 100
    json.dumps(figures)
    assert measured.halves(ARCH, 2, CPU, side=64)['backward_ms'] > 0
    for how in (None, *measured.HOW):  # it would be, with the first call
        model = measured.build(ARCH, SIZE, True, CPU, how)
        assert model.regions.compile is (how == 'compiled')
        assert bool(model.graphs) is (how == 'CUDA graphs')
        assert (measured.tape.MIN_RUNS == 1) is (how != 'no tapes')
    measured.compile_block('sub_blocks3', SIZE, 'bf16', CPU, ARCH)


def test_operators(measured):
    """With the kernels interpreted, where there is no GPU."""
    shape, mix = (1, 1, 3, 4), (1, 5, 5, 1, 5)
    options = 3, 'channels_last', 'bf16', CPU
    for figures in (
        measured.depthwise(shape, *options, 'triton'),
        measured.branches(shape, 5, 'bf16', CPU, 'reference'),
        measured.contmix_row(mix, 'bf16', 'tiled', CPU),
    ):
        assert figures['forward'] > 0
    for figures in (
        measured.branches_error((1, 2, 3, 4), 5, 'bf16', CPU),
        measured.contmix_error(mix, 'bf16', CPU),
    ):
        assert 1e-4 < figures['output'] <= figures['largest'] < 2e-2
    assert measured.copy(CPU, size=2**20)['rate'] > 0
    assert measured.matmul('fp32', CPU, size=64)['rate'] > 0
    assert not torch.backends.cuda.matmul.allow_tf32


def test_candidates():
    """The settings as they are among them; every other one is a row."""
    rows, table_of = gpu_tune.rows(CPU)
    first, *names = rows
    assert names == [*table_of] == [*rows[first][0]]
    expected = []
    for table, module in gpu_tune.tables().items():
        expected += [(table, None, None)]
        for name, candidates in module.CANDIDATES.items():
            knobs, key = gpu_tune._find(module.KNOBS, name)
            assert knobs[key] in candidates
            others = [v for v in candidates if v != knobs[key]]
            expected += [(table, name, value) for value in others]
    assert [*table_of.values()] == expected


@pytest.fixture
def module(monkeypatch):
    """A file of kernels in place of all others."""
    module = SimpleNamespace(
        __name__='a.b',
        KNOBS=dict(A=1, B=dict(C=2)),
        CANDIDATES={'A': (1, 3), 'B.C': (2, 4, 6)},
    )
    monkeypatch.setattr(gpu_tune, 'tables', lambda: dict(one=module))
    monkeypatch.setitem(gpu_tune.PROBLEMS, 'one', (None, ()))
    return module


def test_best_settings(module):
    """It is told at once; noise and what is wrong are no gain."""
    times = {'one': 10, 'one, A=3': 9.9, 'one, B.C=4': 9, 'one, B.C=6': 8}
    lines = [dict(row=row, ms=ms, error=0) for row, ms in times.items()]
    lines[-1]['error'] = 0.1
    _, table_of = gpu_tune.rows(CPU)
    paste = "KNOBS = {'A': 1, 'B': {'C': 4}}"
    best = dict(table='one', best={'B.C': 4}, paste=paste)
    out = [*gpu_tune.choose(lines, table_of)]
    assert out == [*lines[:3], best, lines[3]]
    assert [*gpu_tune.choose(lines[1:], table_of)] == lines[1:]


def test_times_of_settings(module, measured, monkeypatch):
    """Of an operator, and how far its results are off."""
    other = SimpleNamespace(knob=lru_cache(lambda: module.KNOBS['A']))
    monkeypatch.setitem(gpu_tune.sys.modules, 'a.c', other)

    def problem(shape, device):
        x = torch.ones(shape, device=device, requires_grad=True)
        return lambda: other.knob() * x, [x]

    values = {'A': 3, 'B.C': 4}
    shapes = [(2, 3), (1,)]
    figures = gpu_tune.time_settings('one', values, problem, shapes, CPU)
    assert module.KNOBS == dict(A=1, B=dict(C=2)) and other.knob() == 1
    assert len(figures['each']) == 2 and figures['error'] == pytest.approx(2)
    assert figures['ms'] == pytest.approx(sum(figures['each']))
