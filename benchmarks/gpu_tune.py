"""Finds the fastest settings of kernels: ``python -m benchmarks.gpu --tune``.

Kernel files have a table ``KNOBS`` of settings and a table ``CANDIDATES`` of
values to try, by the same names (those of a table in a table with a point
between). Every value is timed with all others as they are, forward and
backward, at the shapes of `t`. Settings that are fastest alone need not be
together: after a change of the tables, run it again.
"""

import importlib
import pkgutil
import sys
from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmoverlock import ops
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops import feed_forward

from . import gpu_rows

GAIN = 0.02  # of the time, less of which is noise
ERROR = 2e-2  # of an output or gradient, beside the settings as they are
CALLS = 5  # that are timed
# (B, C, H, W) of feed-forward networks
FEED_FORWARD_MAPS = (
    (128, 64, 56, 56),
    (128, 128, 28, 28),
    (128, 256, 14, 14),
    (128, 512, 7, 7),
)


def tables():
    """Modules that have candidates, by their names within the operators."""
    found = {}
    for module in pkgutil.walk_packages(ops.__path__, f'{ops.__name__}.'):
        module = importlib.import_module(module.name)
        if hasattr(module, 'CANDIDATES'):
            name = module.__name__.removeprefix(f'{ops.__name__}.')
            found[name] = module
    return found


def _find(knobs, name):
    """The table that a setting is in, and its key."""
    *path, key = name.split('.')
    for part in path:
        knobs = knobs[part]
    return knobs, key


@contextmanager
def settings(module, values):
    """Other values of a module's knobs, and nothing kept from before.

    Args:
        module (module): One of :func:`tables`.
        values (dict): By name.
    """
    before = {}
    try:
        for name, value in values.items():
            knobs, key = _find(module.KNOBS, name)
            before[name] = knobs[key]
            knobs[key] = value
        _forget(module)
        yield
    finally:
        for name, value in before.items():
            knobs, key = _find(module.KNOBS, name)
            knobs[key] = value
        _forget(module)


def _forget(module):
    """Clear what functions of a module's package keep."""
    package = module.__name__.rpartition('.')[0]
    for name, other in [*sys.modules.items()]:
        if name.startswith(package):
            for function in vars(other).values():
                if hasattr(function, 'cache_clear'):
                    function.cache_clear()


def _contmix(shape, device):
    operands = gpu_rows.contmix_operands(shape, torch.bfloat16, device)
    return partial(gpu_rows.mix, operands, 'triton'), operands


def _branches(kind, device):
    size, shape = kind
    module = DilatedReparamConv(
        shape[1], size, dict(type='BN'), backend='triton'
    ).to(device)
    x = gpu_rows.draw(shape, device, torch.bfloat16).requires_grad_()
    return partial(module, x), [x, *module.parameters()]


def _feed_forward(shape, device):
    channels, hidden = shape[1], 4 * shape[1]
    operands = [
        gpu_rows.draw(shape, device, torch.bfloat16),
        gpu_rows.draw((hidden, channels, 1, 1), device) * channels**-0.5,
        torch.zeros(hidden, device=device),
        gpu_rows.draw((hidden, 1, 3, 3), device) / 3,
        torch.zeros(hidden, device=device),
        torch.ones(1, hidden, 1, 1, device=device),
        torch.zeros(1, hidden, 1, 1, device=device),
        gpu_rows.draw((channels, hidden, 1, 1), device) * hidden**-0.5,
        torch.zeros(channels, device=device),
    ]
    operands = [operand.requires_grad_() for operand in operands]
    return partial(feed_forward, *operands), operands


# By package: the function that makes a problem, and what of.
PROBLEMS = {
    'dynamic_conv': (_contmix, gpu_rows.CONTMIX_MAPS),
    'depthwise': (
        _branches,
        [
            (size, shape)
            for size, shapes in gpu_rows.DEPTHWISE_MAPS.items()
            for shape in shapes
        ],
    ),
    'pointwise': (_feed_forward, FEED_FORWARD_MAPS),
}


def busy_ms(run, device):
    """Milliseconds that a call's kernels run."""
    run()
    if device.type != 'cuda':
        return gpu_rows.timed(run, device, 0)['ms']
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize(device)
    times = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return sum(times) / 1e3 / CALLS


def time_settings(table, values, problem, shapes, device):
    """Time an operator with other settings, and compare its results.

    Args:
        table (str): One of :func:`tables`.
        values (dict): The other settings.
        problem (callable): Makes a run and its operands of a shape.
        shapes (Sequence): Of the problems.
        device (torch.device): Of the GPU.

    Returns:
        dict: ``ms`` of all shapes, of ``each``, and the largest ``error`` of
        an output or gradient beside the settings as they are.
    """
    module = tables()[table]
    each, error = [], 0
    for shape in shapes:
        torch.manual_seed(0)
        run, operands = problem(shape, device)
        grad = torch.randn_like(run())

        def step(run=run, operands=operands, grad=grad):
            out = run()
            return [out, *torch.autograd.grad(out, operands, grad)]

        expected = step()
        with settings(module, values):
            largest = max(t.double().norm() for t in expected[1:])
            for actual, value in zip(step(), expected, strict=True):
                # Some gradients are zero but for rounding.
                scale = max(value.double().norm(), 1e-3 * largest)
                difference = (actual.double() - value.double()).norm() / scale
                error = max(error, difference.item())
            each.append(round(busy_ms(step, device), 4))
    return dict(ms=round(sum(each), 4), each=each, error=error)


def rows(device):
    """Rows as of :func:`benchmarks.gpu.measure`, and what they are.

    Returns:
        tuple[dict, dict]: The rows by name; and by the same names (table,
        setting, value), of the settings as they are (table, None, None).
    """
    table_of, timed = {}, {}
    for table, module in tables().items():
        problem, shapes = PROBLEMS[table.split('.')[0]]

        def add(name, values, key, table=table, problem=problem, s=shapes):
            run = partial(
                time_settings, table, values, problem, s, device=device
            )
            timed[name] = run, 120
            table_of[name] = key

        add(table, {}, (table, None, None))
        for name, candidates in module.CANDIDATES.items():
            knobs, key = _find(module.KNOBS, name)
            for value in candidates:
                if value != knobs[key]:
                    add(
                        f'{table}, {name}={value}',
                        {name: value},
                        (table, name, value),
                    )
    # Kernels compile in parallel first, and are found in Triton's cache.
    jobs = {name: run for name, (run, _) in timed.items()}
    return {'candidates compiled': (jobs, 600), **timed}, table_of


def choose(lines, table_of):
    """Pass on lines of rows, and add the best settings as far as they are.

    Args:
        lines (Iterable[dict]): Of :func:`benchmarks.gpu.measure`.
        table_of (dict): See :func:`rows`.

    Yields:
        dict: The lines; and behind one that changes them, of its ``table``
        the ``best`` settings, which are faster than those there are, and
        ``paste``, the whole table as it would be.
    """
    times, found = {}, {}
    for line in lines:
        yield line
        table, *_ = table_of.get(line.get('row'), (None,))
        if table and 'ms' in line and line['error'] <= ERROR:
            times[line['row']] = line['ms']
            best = _best(table, times, table_of)
            if best != found.get(table, {}):
                found[table] = best
                module = tables()[table]
                with settings(module, best):
                    paste = f'KNOBS = {module.KNOBS!r}'
                yield dict(table=table, best=best, paste=paste)


def _best(table, times, table_of):
    """Values that are faster than those there are, by setting."""
    best = {}
    limit = times.get(table, 0) * (1 - GAIN)
    for row, ms in times.items():
        of, name, value = table_of[row]
        if of == table and name and ms < best.get(name, (None, limit))[1]:
            best[name] = value, ms
    return {name: value for name, (value, _) in best.items()}
