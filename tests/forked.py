"""Runs the tools in processes forked from one that has their imports."""

import multiprocessing
import os
import socket
import sys

from tiny import load_tool, no_curves

TIMEOUT = 1800  # seconds, because machines may be busy

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(
    ['mmpretrain.models', 'mmpretrain.evaluation', 'mmoverlock.cli']
)


def run(tool, *argv, folder, processes=1, prepare=None):
    """Run ``tools/TOOL.py ARGV``; return the output of the first process.

    There are as many as if torchrun had started them. Each calls `prepare`
    first, and writes its output into the folder.
    """
    port = free_port()
    logs = [folder / f'log_{rank}' for rank in range(processes)]
    argv = [str(arg) for arg in argv]
    started = []
    for rank, log in enumerate(logs):
        args = tool, argv, log, prepare, rank, processes, port
        started.append(_context.Process(target=_run, args=args))
        started[-1].start()
    for process in started:
        process.join(TIMEOUT)
        process.kill()
    outputs = [log.read_text() for log in logs]
    assert not any(p.exitcode for p in started), '\n'.join(outputs)
    return outputs[0]


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])


def _run(tool, argv, log, prepare, rank, processes, port):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.chdir(log.parent)  # where MMEngine makes a folder to collect results
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(file, 'w', buffering=1)
    os.environ.update(LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES='')
    if processes > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(processes),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        )
    if prepare:
        prepare()
    with no_curves():
        load_tool(tool).main(argv)
