"""The tuning of kernels, with times that are made up; and on a CPU."""

import json
from functools import lru_cache, partial
from types import SimpleNamespace

import pytest
import stub_rows as stub
import torch

from benchmarks import gpu

pytest.importorskip('triton', '3.6')
from benchmarks import gpu_rows, gpu_tune  # noqa: E402

CPU = torch.device('cpu')


def test_tables():
    """Every table of knobs has candidates for every knob, its own first."""
    for module in gpu_tune.tables().values():
        names = set()
        for name, candidates in module.CANDIDATES.items():
            knobs, key = gpu_tune._find(module.KNOBS, name)
            assert knobs[key] in candidates
            assert len({*candidates}) == len(candidates) > 1
            names.add(name.split('.')[0])
        assert names == {*module.KNOBS}


def test_every_value_is_a_row():
    rows, table_of = gpu_tune.rows(CPU)
    first, *names = rows
    assert {*names} == {*table_of} == {*rows[first][0]}
    table = 'depthwise.triton.weight_grads'
    mine = [table_of[name][1:] for name in names if table_of[name][0] == table]
    assert mine[0] == (None, None)
    knobs = gpu_tune.tables()[table].KNOBS
    assert {name for name, _ in mine[1:]} == {*knobs}
    assert not {*mine} & {*knobs.items()}  # those are as they are
    json.dumps([*rows[first][0]])


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


def test_settings(module, monkeypatch):
    other = SimpleNamespace(
        double=lru_cache(lambda n: 2 * module.KNOBS['A'] * n)
    )
    monkeypatch.setitem(gpu_tune.sys.modules, 'a.c', other)
    assert other.double(1) == 2
    with gpu_tune.settings(module, {'A': 3, 'B.C': 4}):
        assert module.KNOBS == dict(A=3, B=dict(C=4))
        assert other.double(1) == 6
    assert module.KNOBS == dict(A=1, B=dict(C=2))
    assert other.double(1) == 2


FIGURES = {
    'one': dict(ms=10, error=0),
    'one, A=3': dict(ms=9.9, error=0),  # that is noise
    'one, B.C=4': dict(ms=9, error=0),
    'one, B.C=6': dict(ms=8, error=0),
}


@pytest.mark.parametrize(
    'changes, best',
    [
        ({}, {'B.C': 6}),
        ({'one, B.C=6': dict(ms=8, error=0.1)}, {'B.C': 4}),  # it is wrong
        ({'one, B.C=6': dict(failed='out of resource')}, {'B.C': 4}),
        ({'one, A=3': dict(ms=7, error=0)}, {'A': 3, 'B.C': 6}),
        ({'one': dict(failed='cut off')}, None),
    ],
)
def test_choice(module, changes, best):
    _, table_of = gpu_tune.rows(CPU)
    assert [*table_of] == [*FIGURES]
    lines = [dict(row=r, **f) for r, f in {**FIGURES, **changes}.items()]
    out = [*gpu_tune.choose(lines, table_of)]
    assert [line for line in out if 'row' in line] == lines
    chosen = [line for line in out if 'table' in line]
    if best is None:
        assert chosen == []
        return
    assert chosen[-1]['best'] == best
    knobs = eval(chosen[-1]['paste'].removeprefix('KNOBS = '))
    assert knobs == dict(A=best.get('A', 1), B=dict(C=best['B.C']))
    assert module.KNOBS == dict(A=1, B=dict(C=2))
    # Cut off anywhere, what was found by then is there.
    few = [*gpu_tune.choose(lines[:3], table_of)]
    assert few == out[: len(few)] and len(few) > 3


def test_command(module, capsys, monkeypatch):
    """Lines of rows that run in processes, and the best."""
    _, table_of = gpu_tune.rows(CPU)
    rows = {
        name: (partial(stub.figures, **figures), 60)
        for name, figures in FIGURES.items()
    }
    rows['one, B.C=6'] = stub.crash, 60
    monkeypatch.setattr(gpu_tune, 'rows', lambda device: (rows, table_of))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu.signal, 'signal', lambda *args: None)
    assert gpu.main(['--tune']) == 0
    lines = [*map(json.loads, capsys.readouterr().out.splitlines())]
    assert [line.get('row') for line in lines] == [
        'one', 'one, A=3', 'one, B.C=4', None, 'one, B.C=6'
    ]  # fmt: skip
    assert lines[3]['best'] == {'B.C': 4}
    assert 'failed' in lines[4]


def test_times(module, monkeypatch):
    """Of an operator with other settings, and how far its results are off."""
    monkeypatch.setattr(gpu_rows, 'WARM_UPS', 0)
    monkeypatch.setattr(gpu_rows, 'LEAST', 1)

    def problem(shape, device):
        x = torch.ones(shape, device=device, requires_grad=True)
        return lambda: module.KNOBS['A'] * x, [x]

    shapes = [(2, 3), (1,)]
    figures = gpu_tune.time_settings('one', {'A': 3}, problem, shapes, CPU)
    assert module.KNOBS['A'] == 1
    assert len(figures['each']) == 2 and figures['error'] == pytest.approx(2)
    assert figures['ms'] == pytest.approx(sum(figures['each']))


@pytest.mark.parametrize(
    'package, shape',
    [
        ('dynamic_conv', (1, 5, 5, 1, 5)),
        ('depthwise', (5, (1, 1, 3, 4))),
        ('pointwise', (1, 4, 3, 3)),
    ],
)
def test_problems(package, shape):
    run, operands = gpu_tune.PROBLEMS[package][0](shape, CPU)
    out = run()
    grads = torch.autograd.grad(out, operands, torch.ones_like(out))
    assert all(grad.isfinite().all() for grad in grads)
