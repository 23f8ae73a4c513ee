"""Compiles the kernels of ContMix for a GPU that is not there.

``python tests/compile_contmix.py CAPABILITY DTYPE HEIGHT WIDTH SIZE`` runs
the code that launches them on tensors of the CPU, with a driver of Triton that
compiles and launches nothing. It prints a JSON line for each kernel: its
registers, and the bytes that it spills and shares.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from mmoverlock.ops.dynamic_conv import triton as contmix_triton

CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
BATCH, GROUPS, CHANNELS = 128, 2, 16


class Utils:
    """Takes binaries, and answers as a large GPU would."""

    def load_binary(self, name, kernel, shared, device):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(kernel)
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, '-res-usage', file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        found = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
        registers, spills = map(int, found)
        row = dict(
            name=name, registers=registers, spills=spills, shared=shared
        )
        print(json.dumps(row), flush=True)
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device):
        return dict(max_shared_mem=2**30, max_num_regs=65536, warpSize=32)


class Driver:
    """A driver of Triton with a GPU that is not there."""

    def __init__(self, capability):
        self.capability = capability
        self.utils = Utils()
        self.launcher_cls = lambda source, metadata: lambda *a, **k: None

    def get_current_target(self):
        return GPUTarget('cuda', self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.capability, 10)


def operands(dtype, height, width, size):
    """Operands of the custom operator, in channels_last."""

    def maps(channels, *sides):
        shape = BATCH, GROUPS * channels, *sides
        return torch.zeros(shape, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )

    taps = 5**2 + size**2
    return (
        maps(CHANNELS, height, width),
        maps(CHANNELS, 7, 7),
        torch.zeros(taps, 49),
        torch.zeros(taps),
        torch.zeros(GROUPS, 9, 9),
        torch.zeros(GROUPS, 2 * size - 1, 2 * size - 1),
        maps(2 * CHANNELS, height, width),
        0.25,
    )


def main():
    capability, dtype, *sizes = sys.argv[1:]
    triton.runtime.driver.set_active(Driver(int(capability)))
    inputs = operands(getattr(torch, dtype), *map(int, sizes))
    out, *saved = contmix_triton._mix(*inputs)
    contmix_triton._mix_backward(out, *inputs, out, *saved)


if __name__ == '__main__':
    main()
