"""What measures GPUs, on a CPU."""

import inspect
import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import stub_rows as stub
import tiny
import torch

from benchmarks import gpu

CPU = torch.device('cpu')
SIZE = 2, 64, 64
ARCH = tiny.ARCH | dict(kernel_sizes=(5, 5, 5, 5))


def is_running(pid):
    """Whether it is there and no zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_rows(tmp_path):
    """A row that fails or hangs ends with its process, and the rest goes on.

    What it has started ends with it.
    """
    file = tmp_path / 'pid'
    table = {
        name: (run, 60)
        for name, run in dict(
            one=partial(stub.value, 1),
            fail=stub.fail,
            two=partial(stub.value, 2),
            need=stub.need,
            three=partial(stub.value, 3),
            crash=stub.crash,
        ).items()
    }
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
    wait_until(lambda: not is_running(file.read_text()))
    assert not any(map(is_running, (one, two)))


@pytest.mark.parametrize('seconds', [0, 1])
def test_out_of_time(seconds):
    table = {name: (stub.hang, 60) for name in ('one', 'two')}
    *lines, last = gpu.measure(table, seconds)
    assert [line['failed'] for line in lines] == (
        ['cut off after 1 s'] if seconds else []
    )
    assert last == dict(left=['one', 'two'][len(lines) :])


def test_ended_by_a_signal(tmp_path, monkeypatch):
    """What is measured is printed by then; no process is left."""
    gpu_rows = pytest.importorskip('benchmarks.gpu_rows')
    file, output = tmp_path / 'pid', tmp_path / 'output'
    table = dict(
        one=(partial(stub.value, 1), 60), hang=(partial(stub.hang, file), 60)
    )
    monkeypatch.setattr(gpu_rows, 'rows', lambda device: table)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)

    def measure():
        with output.open('w') as sys.stdout:
            sys.exit(gpu.main([]))

    process = multiprocessing.get_context('fork').Process(target=measure)
    process.start()
    wait_until(lambda: file.exists() and file.read_text(), 120)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    line = json.loads(output.read_text())
    assert line['ms'] == 1
    for pid in (line['process'], file.read_text()):
        wait_until(lambda pid=pid: not is_running(pid))


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
    gpu_rows = pytest.importorskip('benchmarks.gpu_rows')
    table = dict(small=(partial(stub.value, 1), 60), large=(stub.fail, 60))
    monkeypatch.setattr(gpu_rows, 'rows', lambda device: table)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.main([]) == 2
    assert 'needs a GPU' in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    assert gpu.main(['--rows', 'mall', 'other']) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)['row'] == 'small'


@pytest.fixture
def measured(monkeypatch):
    pytest.importorskip('triton', '3.6')
    from benchmarks import gpu_rows

    monkeypatch.setattr(gpu_rows, 'BUDGET', 0)
    monkeypatch.setattr(gpu_rows, 'WARM_UPS', 0)
    monkeypatch.setattr(gpu_rows, 'LEAST', 1)
    return gpu_rows


def test_rows_fit_their_functions(measured):
    names = [*measured.rows(CPU)]
    assert names[0] == 'machine'
    assert names.index('kernels compiled') < names.index(
        't, 128 x 224 x 224, bf16, training'
    )
    for run, limit in measured.rows(CPU).values():
        assert limit > 0
        for function in run.values() if isinstance(run, dict) else [run]:
            inspect.signature(function.func).bind(
                *function.args, **function.keywords
            )


def test_rates(measured):
    for figures in (
        measured.copy(CPU, size=2**20),
        measured.matmul('fp32', CPU, size=64),
    ):
        assert figures['ms'] > 0 and figures['rate'] > 0
    assert not torch.backends.cuda.matmul.allow_tf32


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


def test_peers(measured):
    timm = pytest.importorskip('timm')
    assert all(map(timm.is_model, measured.PEERS.values()))
    figures = measured.network('ResNet-50', (1, 64, 64), 'fp32', False, CPU)
    assert figures['ms'] > 0


def test_operators(measured, dtype='bf16'):
    """With the kernels interpreted, where there is no GPU."""
    shape, mix = (1, 1, 3, 4), (1, 5, 5, 1, 5)
    for size, backend in ((3, None), (3, 'auto'), (3, 'triton')):
        figures = measured.depthwise(
            shape, size, 'channels_last', dtype, CPU, backend
        )
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


def test_compiles_every_stage(measured):
    stages = {name.split(',')[0] for name in measured.compile_jobs(CPU)}
    assert stages == {*measured.STRIDES} == {*measured.OverLoCK.block_groups}
    for stage in stages:
        measured.compile_block(stage, SIZE, 'bf16', CPU, ARCH)


def test_whole_model(measured, monkeypatch, tmp_path, backbone='Swin-T'):
    """Its losses, of the real tool; a missing package is an ImportError."""
    pytest.importorskip('mmseg')
    with pytest.raises(RuntimeError, match='invalid choice'):
        measured._run_tool(tmp_path, 'make_sample_data', 'other', 'data')

    def run_tool(folder, name, *arguments):  # which saves imports
        monkeypatch.chdir(folder)
        tiny.run_tool(name, *arguments)

    monkeypatch.setattr(measured, '_run_tool', run_tool)
    package, config, (layout, folder, _), heads = measured.MODELS['UperNet']
    small = config, (layout, folder, 96), heads
    monkeypatch.setitem(measured.MODELS, 'UperNet', (package, *small))
    options = [
        'train_dataloader.dataset.pipeline.2.scale=(128,64)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'model.data_preprocessor.size=(64,64)',
        'model.decode_head.channels=8',
        'model.auxiliary_head.channels=8',
    ]
    figures = measured.trained('UperNet', backbone, CPU, 3, options)
    assert figures['ms'] > 0 and figures['finite'] is True
    assert 0 < min(figures['loss']) < max(figures['loss']) < 50
    monkeypatch.setitem(measured.MODELS, 'UperNet', ('no_package', *small))
    with pytest.raises(ModuleNotFoundError):
        measured.trained('UperNet', backbone, CPU)
