"""Runs the tools in processes forked from one that has their imports."""

import multiprocessing
import os
import sys

from tiny import load_tool, no_curves

TIMEOUT = 1800  # seconds, because machines may be busy

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(
    ['mmpretrain.models', 'mmpretrain.evaluation', 'mmoverlock.cli']
)


def start(*argv, log, prepare=None, tool='train'):
    """Start ``tools/train.py ARGV``; return the process.

    Args:
        argv: Of the command line.
        log (Path): File for stdout and stderr.
        prepare (callable, optional): What the process does first.
        tool (str): Another tool than train.
    """
    argv = [str(arg) for arg in argv]
    process = _context.Process(target=_run, args=(tool, argv, log, prepare))
    process.start()
    return process


def run(*argv, log, status=0, **options):
    """Run ``tools/train.py ARGV`` as `start` does; return its output."""
    process = start(*argv, log=log, **options)
    process.join(TIMEOUT)
    process.kill()
    output = log.read_text()
    assert process.exitcode == status, output
    return output


def _run(tool, argv, log, prepare):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.chdir(log.parent)  # where MMEngine makes a folder to collect results
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(file, 'w', buffering=1)
    os.environ['LOCAL_RANK'] = '0'
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    if prepare:
        prepare()
    with no_curves():
        load_tool(tool).main(argv)
