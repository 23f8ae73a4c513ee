"""Runs the tools in processes forked from one that has their imports."""

import multiprocessing
import os
import sys

from tiny import load_tool

TIMEOUT = 1800  # seconds, because machines may be busy

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['mmdet.apis', 'mmpretrain', 'mmseg.apis'])


def start(*argv, log, prepare=None, tool='train', gpu=False):
    """Start ``tools/train.py ARGV``; return the process.

    Args:
        argv: Of the command line.
        log (Path): File for stdout and stderr.
        prepare (callable, optional): What the process does first.
        tool (str): Another tool than train.
        gpu (bool): Whether it sees GPUs. Defaults to False.
    """
    argv = [str(arg) for arg in argv]
    process = _context.Process(
        target=_run, args=(tool, argv, log, prepare, gpu)
    )
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


def _run(tool, argv, log, prepare, gpu):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(file, 'w', buffering=1)
    os.environ['LOCAL_RANK'] = '0'
    if not gpu:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    if prepare:
        prepare()
    load_tool(tool).main(argv)
