"""Measure this machine: ``python -m benchmarks.run``.

Prints a table, with the share of the machine's own matrix product rate where
multiply-adds are known, and ratios between rows. ``--out`` keeps the figures
as JSON and draws the growth of time and memory with the image.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from .rows import ROWS


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rows',
        nargs='+',
        metavar='TEXT',
        default=[''],
        help='rows whose names contain any of these; default: all',
    )
    parser.add_argument('--out', type=Path, help='folder to write to')
    parser.add_argument('--row', help=argparse.SUPPRESS)
    return parser


def measure(name):
    """Run a row in a process of its own."""
    command = [sys.executable, '-m', 'benchmarks.run', '--row', name]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f'{name} failed')
    return json.loads(run.stdout.splitlines()[-1])


def describe(name, figures):
    """A line of the table."""
    text = (
        f'{name:36} {figures["seconds"] * 1e3:9.2f} ms '
        f'({figures["least"] * 1e3:.2f} to {figures["most"] * 1e3:.2f})'
    )
    if 'rate' in figures:
        share = figures['rate'] / figures['sgemm']
        text += f'  {figures["rate"]:6.1f} GMAC/s, {share:4.0%} of sgemm'
    if 'peak_mb' in figures:
        text += f'  peak {figures["peak_mb"]:.0f} MB'
    if 'used_mb' in figures:
        text += f', {figures["used_mb"]:.0f} of them for this'
    for key in ('products', 'both', 'op', 'op_both', 'plain'):
        if key in figures:
            text += f'  {key} {figures[key] * 1e3:.2f} ms'
    return text


def draw_growth(results, path):
    """Time and memory per pixel of inference, over the image's size."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    rows = [
        results[f't, {size}, inference']
        for size in (512, 1024, 2048)
        if f't, {size}, inference' in results
    ]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout='constrained')
    sides = [row['pixels'] ** 0.5 for row in rows]
    for axis, key, unit, factor in (
        (axes[0], 'seconds', 'µs', 1e6),
        (axes[1], 'used_mb', 'bytes', 2**20),
    ):
        values = [factor * row[key] / row['pixels'] for row in rows]
        axis.plot(sides, values, 'o-')
        axis.set(
            xscale='log',
            xticks=sides,
            xticklabels=[f'{side:.0f}' for side in sides],
            xlabel='side of the image in pixels',
            ylabel=f'{unit} per pixel',
        )
        axis.set_ylim(0, 1.1 * max(values))
        axis.minorticks_off()
    figure.savefig(path, dpi=150)


def main():
    args = build_parser().parse_args()
    if args.row:
        print(json.dumps(ROWS[args.row]()))
        return
    names = [n for n in ROWS if any(text in n for text in args.rows)]
    print(
        f'{platform.processor() or platform.machine()}, '
        f'{torch.get_num_threads()} threads, PyTorch {torch.__version__}'
    )
    results = {}
    for name in names:
        results[name] = measure(name)
        print(describe(name, results[name]), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1)
        (args.out / 'results.json').write_text(text)
        draw_growth(results, args.out / 'growth.png')


if __name__ == '__main__':
    main()
