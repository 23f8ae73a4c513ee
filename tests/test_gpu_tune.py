"""The tuning of kernels, with times that are made up; and on a CPU."""

import json
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton', '3.6')
from benchmarks import gpu_rows, gpu_tune  # noqa: E402

CPU = torch.device('cpu')


def test_tables():
    """Every candidate of every knob is a row, but those that are as it is."""
    rows, table_of = gpu_tune.rows(CPU)
    first, *names = rows
    assert names == [*table_of] == [*rows[first][0]]
    json.dumps(names)
    for table, module in gpu_tune.tables().items():
        expected = {(None, None)}
        for name, candidates in module.CANDIDATES.items():
            knobs, key = gpu_tune._find(module.KNOBS, name)
            assert knobs[key] in candidates
            others = {*candidates} - {knobs[key]}
            assert 0 < len(others) == len(candidates) - 1
            expected |= {(name, value) for value in others}
        assert expected == {k[1:] for k in table_of.values() if k[0] == table}
        tuned = {name.split('.')[0] for name in module.CANDIDATES}
        assert tuned == {*module.KNOBS}


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


FIGURES = {
    'one': dict(ms=10, error=0),
    'one, A=3': dict(ms=9.9, error=0),  # that is noise
    'one, B.C=4': dict(ms=9, error=0),
    'one, B.C=6': dict(ms=8, error=0),
}


@pytest.mark.parametrize(
    'changes, best',
    [
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
    # Cut off anywhere, what was found by then is there.
    few = [*gpu_tune.choose(lines[:3], table_of)]
    assert few == out[: len(few)] and len(few) > 3


def test_times(module, monkeypatch):
    """Of an operator with other settings, and how far its results are off."""
    monkeypatch.setattr(gpu_rows, 'WARM_UPS', 0)
    monkeypatch.setattr(gpu_rows, 'LEAST', 1)
    other = SimpleNamespace(knob=lru_cache(lambda: module.KNOBS['A']))
    monkeypatch.setitem(gpu_tune.sys.modules, 'a.c', other)

    def problem(shape, device):
        x = torch.ones(shape, device=device, requires_grad=True)
        return lambda: other.knob() * x, [x]

    shapes = [(2, 3), (1,)]
    values = {'A': 3, 'B.C': 4}
    figures = gpu_tune.time_settings('one', values, problem, shapes, CPU)
    assert module.KNOBS == dict(A=1, B=dict(C=2)) and other.knob() == 1
    assert len(figures['each']) == 2 and figures['error'] == pytest.approx(2)
    assert figures['ms'] == pytest.approx(sum(figures['each']))
