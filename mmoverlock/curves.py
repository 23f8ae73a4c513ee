"""Curves of a training, from what mmengine's LocalVisBackend wrote."""

import json
import math
import re
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

NO_METRICS = ('data_time', 'time', 'step', 'epoch', 'iter')
DETAILS = re.compile(r'_(75|s|m|l)$')  # of COCO's average precision


def read_scalars(work_dir: Path) -> tuple[list[dict], list[dict]]:
    """Read what the runs in a work dir logged, as one training.

    Where a run resumed, what had been logged beyond that point is left out;
    where one started anew, all that had been.

    Args:
        work_dir (Path): The work dir.

    Returns:
        tuple[list[dict], list[dict]]: Records of training and of evaluations.
    """
    training, evaluations = [], []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        records = [json.loads(line) for line in path.open()]
        config = path.with_name('config.py')
        if config.exists() and not re.search(
            r'^resume\s*=\s*True', config.read_text(), re.MULTILINE
        ):
            training, evaluations = [], []
        for kept, new in (
            (training, [r for r in records if 'loss' in r]),
            (evaluations, [r for r in records if not {'loss', 'lr'} & {*r}]),
        ):
            first = new[0]['step'] if new else math.inf
            kept[:] = [r for r in kept if r['step'] < first] + new
    return training, evaluations


def draw_curves(work_dir: Path, batch_size: int) -> dict:
    """Draw losses, metrics, learning rate, speed and memory.

    The picture is ``curves.png`` in the work dir.

    Args:
        work_dir (Path): The work dir of a training.
        batch_size (int): Images in each iteration of a process.

    Returns:
        dict: The last of what was measured, by name: metrics,
        ``'images/s'``, which is the median, and ``'memory (MB)'``, which is
        the maximum and only there for GPUs. Empty if nothing was logged.
    """
    training, evaluations = read_scalars(work_dir)
    if not training:
        return {}
    figure = Figure(figsize=(12, 7.5), layout='constrained')
    grid = figure.subplots(2, 2)
    (losses, metrics), (rates, speed) = grid

    for name in _names(training, 'loss'):
        _plot(losses, training, name)
    losses.set(title='Training loss', xlabel='iteration', yscale='log')

    last = {}
    for name in _names(evaluations, ''):
        if name not in NO_METRICS:
            last[name] = evaluations[-1].get(name)
            if not DETAILS.search(name):
                _plot(metrics, evaluations, name, marker='.')
    metrics.set(title='Validation', xlabel='epoch or iteration')

    _plot(rates, training, 'lr')
    rates.set(title='Learning rate', xlabel='iteration', ylim=(0, None))

    for record in training:
        record['images/s'] = batch_size / record['time']
    _plot(speed, training, 'images/s', color='C0')
    last['images/s'] = median(record['images/s'] for record in training)
    speed.set(title='Throughput of a process', xlabel='iteration')
    speed.set(ylabel='images/s', ylim=(0, None))
    if 'memory' in training[-1]:
        memory = speed.twinx()
        _plot(memory, training, 'memory', color='C1')
        memory.set_ylabel('GPU memory (MB)', color='C1')
        memory.set_ylim(0)
        last['memory (MB)'] = max(r.get('memory', 0) for r in training)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    for axes in (losses, metrics):
        if axes.lines:
            # Beside the curves, of which it would hide some.
            axes.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1.02))
    figure.savefig(work_dir / 'curves.png', dpi=120)
    return last


def _names(records: list[dict], start: str) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name.startswith(start)]


def _plot(axes: Axes, records: list[dict], name: str, **options: Any) -> None:
    points = [(r['step'], r[name]) for r in records if name in r]
    axes.plot(*zip(*points, strict=True), label=name, **options)
