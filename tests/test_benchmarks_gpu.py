"""What measures GPUs, on a CPU."""

import inspect
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import stub_rows as stub
import tiny
import torch

from benchmarks import gpu

pytest.importorskip('triton', '3.6')
from benchmarks import gpu_rows, gpu_tune  # noqa: E402

CPU = torch.device('cpu')
SIZE = 2, 64, 64
ARCH = tiny.ARCH | dict(kernel_sizes=(5, 5, 5, 5))


def has_ended(pid):
    """Whether a process is gone, or will be within seconds."""
    stat = Path(f'/proc/{pid}/stat')
    end = time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != 'Z':
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_rows(tmp_path):
    """A row that fails or hangs ends with its process, and the rest goes on.

    What it has started ends with it. Then the time is over.
    """
    file = tmp_path / 'pid'
    runs = dict(
        one=partial(stub.value, 1),
        fail=stub.fail,
        two=partial(stub.value, 2),
        need=stub.need,
        three=partial(stub.value, 3),
        crash=stub.crash,
    )
    table = {name: (run, 60) for name, run in runs.items()}
    table['hang'] = partial(stub.hang, file), 3
    lines = {line['row']: line for line in gpu.measure(table, 120)}
    assert [*lines] == [*table]
    for number, name in enumerate(('one', 'two', 'three'), 1):
        assert lines[name]['ms'] == number
    assert lines['fail']['failed'] == 'ValueError: it fails'
    assert lines['need']['missing'] == 'a_package_that_is_not_there'
    assert lines['crash']['failed'] == 'ended with exit code 3'
    assert lines['hang']['failed'] == 'cut off after 3 s'
    assert lines['one']['took'] < 60 and 3 <= lines['hang']['took'] < 30
    one, two, three = (lines[n]['process'] for n in ('one', 'two', 'three'))
    assert two == three != one != os.getpid()
    assert all(map(has_ended, (one, two, file.read_text())))


def test_out_of_time():
    line, last = gpu.measure(dict.fromkeys('ab', (stub.hang, 60)), 1)
    assert line['failed'] == 'cut off after 1 s'
    assert last == dict(left=['b'])


def test_functions_beside_each_other(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    jobs = dict(one=partial(stub.value, 1), bad=stub.fail, crash=stub.crash)
    (line,) = gpu.measure(dict(jobs=(jobs, 60)), 60)
    assert line['jobs'] == 3
    # The first process has the first and the third.
    assert line['errors'] == {
        'process 0': 'ended with exit code 3',
        'bad': 'ValueError: it fails',
    }


def test_command(capsys, monkeypatch):
    """Rows that are chosen; there is none without a GPU."""
    table = dict(small=(partial(stub.value, 1), 60), large=(stub.fail, 60))
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
    monkeypatch.setattr(gpu_rows, 'BUDGET', 0)
    monkeypatch.setattr(gpu_rows, 'WARM_UPS', 0)
    monkeypatch.setattr(gpu_rows, 'LEAST', 1)
    for name, value in dict(MIN_RUNS=0, _tapes={}).items():
        monkeypatch.setattr(gpu_rows.tape, name, value)
    return gpu_rows


def test_rows_fit_their_functions():
    """Those of networks are compiled first, of every stage."""
    names = [*gpu_rows.rows(CPU)]
    network = 't, 128 x 224 x 224, bf16, training'
    assert names.index('kernels compiled') < names.index(network)
    stages = {name.split(',')[0] for name in gpu_rows.compile_jobs(CPU)}
    assert stages == {*gpu_rows.STRIDES} == {*gpu_rows.OverLoCK.block_groups}
    for run, limit in gpu_rows.rows(CPU).values():
        assert limit > 0
        for function in run.values() if isinstance(run, dict) else [run]:
            inspect.signature(function.func).bind(
                *function.args, **function.keywords
            )


def test_networks(measured):
    for train in (False, True):
        figures = measured.network(ARCH, SIZE, 'bf16', train, CPU)
        assert 0 < figures['least'] <= figures['ms'] <= figures['most']
        rate = pytest.approx(2e3 / figures['ms'], abs=0.1)
        assert figures['images_per_second'] == rate
    figures = measured.kernels(ARCH, SIZE, 'bf16', True, CPU, most=3)
    longest = [ms for _, ms, _ in figures['kernels']]
    assert len(longest) == 3 and longest == sorted(longest, reverse=True)
    assert figures['busy_ms'] > 0 and figures['launches'] > 100
    json.dumps(figures)
    figures = measured.halves(ARCH, 2, CPU, side=64)
    for what in ('forward', 'backward'):
        assert figures[f'{what}_ms'] >= figures[f'{what}_host_ms'] > 0
    for how in (None, *measured.HOW):  # it would be, with the first call
        model = measured.build(ARCH, SIZE, True, CPU, how)
        assert model.regions.compile is (how == 'compiled')
        assert bool(model.graphs) is (how == 'CUDA graphs')
        assert (measured.tape.MIN_RUNS == 1) is (how != 'no tapes')
    for stage in ('blocks1', 'sub_blocks3'):
        measured.compile_block(stage, SIZE, 'bf16', CPU, ARCH)


def test_operators(measured, dtype='bf16'):
    """With the kernels interpreted, where there is no GPU."""
    shape, mix = (1, 1, 3, 4), (1, 5, 5, 1, 5)
    for backend in (None, 'triton'):
        options = 3, 'channels_last', dtype, CPU, backend
        figures = measured.depthwise(shape, *options)
        assert {'forward', 'input_gradient', 'weight_gradient'} <= {*figures}
    for figures in (
        measured.branches(shape, 5, dtype, CPU, 'reference'),
        measured.contmix_row(mix, dtype, 'tiled', CPU),
    ):
        assert figures['forward'] > 0 and figures['backward'] > 0
    for figures in (
        measured.branches_error((1, 2, 3, 4), 5, dtype, CPU),
        measured.contmix_error(mix, dtype, CPU),
    ):
        assert 1e-4 < figures['output'] < 2e-2
        assert figures['output'] <= figures['largest'] < 2e-2
    for figures in (
        measured.copy(CPU, size=2**20),
        measured.matmul('fp32', CPU, size=64),
    ):
        assert figures['ms'] > 0 and figures['rate'] > 0
    assert not torch.backends.cuda.matmul.allow_tf32
