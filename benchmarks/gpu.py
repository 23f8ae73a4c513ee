"""Measure a GPU: ``python -m benchmarks.gpu --seconds 600``.

Prints a JSON line for each row of gpu_rows.py as soon as it is measured, the
most important first, so it can be cut off anywhere. Rows run one after the
other in a process beside this one; a row that fails is a line that says so,
and one that takes too long is ended with its process. Rows that the time was
not enough for are named in the last line.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import closing
from functools import partial

CONTEXT = multiprocessing.get_context('spawn')


class Worker:
    """A process that runs functions without arguments, one after the other.

    It ends with the first one that fails, since a GPU may give nothing but
    errors from then on.
    """

    def __init__(self):
        self._pipe, end = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=_serve, args=(end,), daemon=True
        )
        self._process.start()
        end.close()

    def start(self, run):
        self._pipe.send(run)

    def wait(self, seconds):
        """The result of the function, or a dict with the key 'failed'."""
        try:
            if self._pipe.poll(max(0, seconds)):
                return self._pipe.recv()
            reason = f'cut off after {seconds:.0f} s'
        except (EOFError, ConnectionError):
            self._process.join()
            reason = f'ended with exit code {self._process.exitcode}'
        return dict(failed=reason)

    def kill(self):
        """End the process and all that it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()  # it has no group yet, or is gone
        self._process.join()


def _serve(pipe):
    os.setpgid(0, 0)
    os.dup2(2, 1)  # stdout is for the rows
    figures = {}
    while 'failed' not in figures:
        try:
            run = pipe.recv()
        except EOFError:
            return
        try:
            figures = run()
        except ModuleNotFoundError as error:
            figures = dict(missing=error.name)
        except Exception as error:
            figures = dict(failed=f'{type(error).__name__}: {error}'[:1000])
        pipe.send(figures)


def run_all(jobs):
    """Run functions by name; return the errors of those that fail."""
    errors = {}
    for name, run in jobs:
        try:
            run()
        except Exception as error:
            errors[name] = f'{type(error).__name__}: {error}'[:300]
    return errors


def run_beside(jobs, seconds):
    """Run functions in as many processes as there are CPUs.

    Args:
        jobs (dict): The functions by name.
        seconds (float): After which the processes are ended.

    Returns:
        dict: The number of ``jobs`` and ``errors`` by name.
    """
    end = time.monotonic() + seconds
    count = min(len(jobs), os.cpu_count())
    workers = [Worker() for _ in range(count)]
    errors = {}
    try:
        for i, worker in enumerate(workers):
            worker.start(partial(run_all, [*jobs.items()][i::count]))
        for i, worker in enumerate(workers):
            left = end - time.monotonic()
            for name, error in worker.wait(left).items():
                errors[f'process {i}' if name == 'failed' else name] = error
    finally:
        for worker in workers:
            worker.kill()
    return dict(jobs=len(jobs), errors=errors)


def measure(rows, seconds):
    """Run rows in a process beside this one.

    Args:
        rows (dict): By name, a function without arguments that returns
            figures in a dict, and the seconds that it may take; in place of
            the function, there may be a dict of such for `run_beside`.
        seconds (float): That all rows may take.

    Yields:
        dict: The ``row``, its figures and the seconds that it ``took``. In
        place of figures, there may be why it ``failed`` or the package that
        is ``missing``. The last one has the rows ``left``, if there are any.
    """
    end = time.monotonic() + seconds
    worker = None
    names = [*rows]
    try:
        while names and time.monotonic() < end:
            name = names.pop(0)
            start = time.monotonic()
            run, limit = rows[name]
            limit = min(limit, end - start)
            if isinstance(run, dict):
                figures = run_beside(run, limit)
            else:
                worker = worker or Worker()
                worker.start(run)
                figures = worker.wait(limit)
                if 'failed' in figures:
                    worker.kill()
                    worker = None
            took = round(time.monotonic() - start, 1)
            yield dict(row=name, **figures, took=took)
    finally:
        if worker:
            worker.kill()
    if names:
        yield dict(left=names)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--seconds',
        type=float,
        default=600,
        help='that it may take; default: 600',
    )
    parser.add_argument(
        '--rows',
        nargs='+',
        metavar='TEXT',
        default=[''],
        help='rows whose names contain any of these; default: all',
    )
    parser.add_argument(
        '--tune',
        action='store_true',
        help='time the settings of kernels in place of the rows, and print '
        'the best ones; see gpu_tune.py',
    )
    return parser


def main(args=None):
    args = build_parser().parse_args(args)
    import torch  # here, so that processes start with what they need only

    from . import gpu_rows, gpu_tune

    if not torch.cuda.is_available():
        print('benchmarks.gpu needs a GPU that torch sees', file=sys.stderr)
        return 2
    # Ended by a signal, it ends its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device = torch.device('cuda')
    table_of = {}
    if args.tune:
        rows, table_of = gpu_tune.rows(device)
    else:
        rows = gpu_rows.rows(device)
    rows = {
        name: row
        for name, row in rows.items()
        if any(text in name for text in args.rows)
    }
    with closing(measure(rows, args.seconds)) as lines:
        for line in gpu_tune.choose(lines, table_of):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
