"""The time of a step's kernels if issuing instructions is all that bounds it.

Depthwise convolutions and ContMix are compiled for a GPU that is not there
(H100), and the instructions of their machine code are counted, those in loops
as often as they run. Kernels of multiply-adds reached 60 to 70 % of that rate
on a GPU, those on tensor cores 20 %: waiting is not counted. Compiling all of
``t`` takes some minutes, once: Triton keeps what it compiled.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from mmoverlock.ops.common import cdiv

from . import count as counting

MULTIPROCESSORS, SCHEDULERS, HERTZ = 132, 4, 1.755e9  # of an H100 SXM
FAMILIES = 'depthwise.', 'dynamic_conv.'
INSTRUCTION = re.compile(
    r'\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)'
)
KINDS = dict(  # of tasks of ContMix
    prepare=('filters', 'taps', 'pixels', 'rows'),
    forward=('classes', 'windows'),
    backward=('filters', 'query', 'value', 'positions', 'pixels'),
    finish=('keys', 'query', 'table of classes', 'table of windows'),
)
LABEL = re.compile(r'\s*(\.L_x_\d+):')
TARGET = re.compile(r'`\((\.L_x_\d+)\)')


@dataclass
class Loop:
    """A loop of machine code, or all of it.

    Args:
        first, last (int): Addresses of its instructions.
        own (Counter): How many there are by name, outside of inner loops.
        inner (list): Loops.
    """

    first: int
    last: int
    own: Counter = field(default_factory=Counter)
    inner: list = field(default_factory=list)

    def run(self, trips):
        """Instructions by name, of one pass.

        Args:
            trips (list): For each inner loop how often it runs, the same of
                the loops in it and, optionally, whether the compiler may have
                unrolled it. Defaults to False.

        Raises:
            ValueError: If there are other loops.
        """
        matched = _match(self.inner, trips)
        if matched is None:
            raise ValueError(f'{len(self.inner)} loops, trips are {trips}')
        total = Counter(self.own)
        for loop, (times, inner) in zip(self.inner, matched, strict=True):
            for name, number in loop.run(inner).items():
                total[name] += times * number
        return total


def _match(loops, trips):
    """The trips of some loops, without those of unrolled ones, or None."""
    if not trips:
        return None if loops else []
    (times, inner, *optional), *others = trips
    if loops and _match(loops[0].inner, inner) is not None:
        rest = _match(loops[1:], others)
        if rest is not None:
            return [(times, inner), *rest]
    return _match(loops, others) if optional == [True] else None


def loops_of(sass: str) -> Loop:
    """The instructions that nvdisasm prints of a kernel, by loops."""
    lines, labels, names = [], {}, []
    for line in sass.splitlines():
        if match := LABEL.match(line):
            names.append(match[1])
        elif match := INSTRUCTION.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(names, address))
            lines.append((address, match[2], match[3]))
            names = []
    loops = []
    for address, name, operands in lines:
        target = TARGET.search(operands)
        first = labels.get(target[1], address) if target else address
        if name.startswith('BRA') and first < address:
            loops.append(Loop(first, address))
    root = Loop(0, lines[-1][0])
    for loop in sorted(loops, key=lambda x: (x.first, -x.last)):
        outer = root
        while outer.inner and loop.last <= outer.inner[-1].last:
            outer = outer.inner[-1]
        outer.inner.append(loop)
    for address, name, _ in lines:
        loop = root
        while inside := [
            x for x in loop.inner if x.first <= address <= x.last
        ]:
            loop = inside[0]
        loop.own[name.split('.')[0]] += 1
    return root


def _print(tool: str, option: str, cubin: bytes) -> str:
    """The text that a tool of Triton's prints of machine code."""
    import triton

    tools = Path(triton.__file__).parent / 'backends/nvidia/bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tools / tool, option, file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory."""
    text = _print('cuobjdump', '-res-usage', cubin)
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', text).groups()
    return int(registers), int(stack)


def _banded(a):
    """The same by banded matrices: over windows, and blocks of rows."""
    size = a['K']
    blocks = cdiv(size, a['ROWS'])
    loops = [(blocks, [])] * (blocks > 1)
    if a['NARROW']:
        return loops
    columns = cdiv(a['width'], a['across'])
    return [(cdiv(columns + size // 2 * 2, 16), loops)]


def _tap_grads(grid, a):
    """The same of a gradient of weights: over rows of a map, and columns.

    Programs of other kernels than a loop's own run it never.
    """
    loops = []
    height, width = a['height'], a['width']
    for (size, dilation, _), (_, rows, steps) in zip(
        a['BRANCHES'], a['FORMS'], strict=True
    ):
        # Of every program, the gradient's rows that see something
        seen = [
            min(height + (size // 2 - first) * dilation, height)
            - max((size // 2 - min(first + rows, size) + 1) * dilation, 0)
            for first in range(0, size, rows)
        ]
        items = sum(max(n, 0) for n in seen) * a['images'] * dilation
        inner = [] if a['WIDTH'] else [(cdiv(width, steps * dilation), [])]
        loops.append((items / a['N'] / grid[0] / grid[2], inner))
    if a['SUM']:
        positions = a['images'] * height * width
        loops.append((positions / 8 / a['N'] / grid[0] / grid[2], []))
    return loops


def _pieces(grid, a):
    """The same over tiles and items, which programs take turns for."""
    height, width = a['height'], a['width']
    loops = []
    for b in a['LARGE']:
        size = a['BRANCHES'][b][0]
        tiles = cdiv(height, a['T']) * cdiv(width, a['COLUMNS'])
        loops.append((tiles * a['images'] / grid[0], [(size, [])]))
    for size, lanes, rows, first, times in a['FORMS']:
        dilations = [d for d, *_ in a['MEMBERS'][first : first + times]]
        items = [cdiv(cdiv(height, d), rows) * d for d in dilations]
        phases = sum(n * d for n, d in zip(items, dilations, strict=True))
        steps = sum(
            n * d * cdiv(width, d)
            for n, d in zip(items, dilations, strict=True)
        )
        count = sum(items) * a['images'] / lanes / grid[0] / times
        inner = [(steps / phases, []), (size // 2, [], True)]
        if dilations != [1]:
            inner = [(phases / sum(items), inner)]
        inner = [(size, [], True), (count, inner)]
        loops += inner if times == 1 else [(times, inner)]
    return loops


def _trips(name, grid, a):
    """How often the loops of a kernel run, see :meth:`Loop.run`.

    Args:
        name (str): The kernel.
        grid (tuple): Its programs.
        a (dict): Its arguments.

    Raises:
        KeyError: If that is not known.
    """
    if name == '_banded_conv2d_kernel':
        return _banded(a)
    if name == '_banded_statistics_kernel':
        tiles = a['images'] * cdiv(a['height'], a['T']) * a['across']
        return [(cdiv(tiles, 16) / grid[0], _banded(a))]
    if name == '_conv2d_kernel':  # over columns
        return [(size, []) for size, *_ in a['BRANCHES']]
    if name == '_branch_grads_kernel':
        positions = a['images'] * a['height'] * a['width']
        copied = positions / a['COLUMNS'] / a['COPIED'] / grid[0]
        return [(copied, []), *_pieces(grid, a)]
    if name == '_statistics_kernel':
        return _pieces(grid, a)
    if name == '_tap_grads_kernel':
        return _tap_grads(grid, a)
    raise KeyError(name)


def _tasks(name, grid, a):
    """Launches of ContMix as one of each of its tasks, others as they are.

    Yields:
        tuple: Name, grid and arguments.
    """
    if 'TASKS' not in a:
        yield name, grid, a
        return
    for task, odd in zip(a['TASKS'], a['odds'], strict=True):
        kind, half = task
        what = KINDS[name.split('.')[-1]][kind]
        size = a['FORMS'][half][2]
        yield (
            f'{name} {what} {size}',
            (odd // 2,),
            dict(a, TASKS=(task,), odds=(odd,)),
        )


def _halves(odds):
    """The opposite of :func:`mmoverlock.ops.launching.odd`."""
    return [odd // 2 for odd in odds]


def _viewers(first, last, length, size):
    """Positions along an axis whose windows have some of the pixels."""
    start = 0 if first < size else first - size // 2
    return (length if last >= length - size else last + size // 2 + 1) - start


def _contmix_trips(name, a):
    """How often the nested loops of a task run, from the outermost on.

    Those that run once for all are none.
    """
    kind, half = a['TASKS'][0]
    what = KINDS[name][kind]
    form, batch = a['FORMS'][half], a.get('batch')
    size = form[2]
    if name == 'finish' and what == 'table of classes':
        blocks = cdiv(math.prod(form[8:11]), a['TERMS'])
        return [blocks] * (blocks > 1) + [_halves(a['chunks'])[half]]
    if name == 'finish' and what == 'table of windows':
        chunks = _halves(a['chunks'])[half]
        rows = a['height'] * cdiv(a['width'], form[7]) * chunks
        return [cdiv(rows, a['TERMS'])]
    if name == 'prepare' or name == 'finish':
        return []
    images = a['filter_images' if what == 'filters' else 'images'][half]
    trips = [batch / cdiv(batch, (images + 1) // 2)] * (images > 1)
    if what == 'filters':
        return trips
    if what in ('classes', 'query'):
        return [*trips, cdiv(size**2, form[14])]
    if what == 'value':
        return [*trips, form[8] * form[9]]
    if what in ('windows', 'positions'):
        # One of the loops, over steps and over parts of a step, is none.
        bands = cdiv(form[11], form[9] // form[13])
        return [*trips, cdiv(size, form[11]) * bands]
    height, width = a['height'], a['width']
    rows = [
        max(
            _viewers(y, y, height, size)
            for y in range(first, min(first + form[6], height))
        )
        for first in range(0, height, form[6])
    ]
    columns = [
        cdiv(
            _viewers(x, min(x + form[8], width) - 1, width, size),
            form[7],
        )
        for x in range(0, width, form[8])
    ]
    return [*trips, sum(columns) / len(columns), sum(rows) / len(rows)]


def _nest(loop, trips):
    """Nested loops for :meth:`Loop.run`; inner ones may be unrolled."""
    return [(trips[0], _nest(inner, trips[1:])) for inner in loop.inner]


def _key_trips(a):
    """Loops over tiles of taps of each size, and over their parts."""
    trips = []
    for form, parts in zip(a['FORMS'], _halves(a['parts']), strict=True):
        tiles = cdiv(form[2] ** 2, a['T'])
        inner = [(cdiv(parts, a['PARTS']), [])]
        trips += [(tiles, inner)] if tiles > 1 else inner
    return trips


@dataclass
class Kernel:
    """A compiled kernel and how it is launched.

    Args:
        name (str): With the module.
        size (str): Of the map, channels first, where there is one.
        registers (int): Of a thread.
        spills (int): Bytes of local memory of a thread.
        warps (int): Of a launch.
        issued (Counter | None): Instructions of a warp by name, None where it
            is not known how often loops run.
        launches (int): Of a step.
    """

    name: str
    size: str
    registers: int
    spills: int
    warps: int
    issued: Counter | None
    launches: int = 0

    @classmethod
    def of(cls, name, grid, arguments, binary):
        cubin = binary.asm['cubin']
        registers, spills = usage(cubin)
        loops = loops_of(_print('nvdisasm', '-c', cubin))
        kernel, *task = name.split('.')[-1].split()
        try:
            if task[:1] == ['keys']:
                trips = _key_trips(arguments)
            elif task:
                trips = _nest(loops, _contmix_trips(kernel, arguments))
            else:
                trips = _trips(kernel, grid, arguments)
            issued = loops.run(trips)
        except (KeyError, IndexError):
            issued = None if loops.inner else loops.own
        warps = binary.metadata.num_warps * math.prod(grid)
        sizes = [arguments.get(k) for k in ('channels', 'height', 'width')]
        size = ' x '.join(str(n) for n in sizes if n is not None)
        return cls(name, size, registers, spills, warps, issued)

    @property
    def milliseconds(self) -> float:
        """Of all launches at full issue; 0 where that is not known."""
        instructions = self.warps * sum((self.issued or Counter()).values())
        rate = MULTIPROCESSORS * SCHEDULERS * HERTZ
        return 1e3 * self.launches * instructions / rate

    def share(self, name: str) -> float:
        """Of an instruction among all that are issued."""
        issued = self.issued or Counter()
        return issued[name] / max(1, sum(issued.values()))


def compile_step(model, images, dtype=torch.bfloat16) -> list[Kernel]:
    """Compile the kernels that a training step of a model launches.

    Args:
        model (nn.Module): Without data, or a part of it.
        images (Tensor): What it takes, without data.
        dtype (torch.dtype): Of autocast. Defaults to bfloat16.

    Returns:
        list[Kernel]: In the order in which they are first launched.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels = {}
    compile_kernel = JITFunction.run

    def launch(kernel, *args, grid, warmup, **kwargs):
        name = f'{kernel.fn.__module__}.{kernel.fn.__name__}'
        name = name.removeprefix('mmoverlock.ops.')
        if not name.startswith(FAMILIES):
            return
        named = dict(zip(kernel.arg_names, args, strict=False))
        for task, programs, arguments in _tasks(
            name, tuple(grid), {**named, **kwargs}
        ):
            binary = compile_kernel(
                kernel, grid=programs, warmup=True, **arguments
            )
            key = task, binary.hash, programs
            if key not in kernels:
                kernels[key] = Kernel.of(task, programs, arguments, binary)
            kernels[key].launches += 1

    patches = [
        mock.patch.object(JITFunction, 'run', launch),
        mock.patch.object(type(driver), 'active', counting._Driver()),
    ]
    with counting._on_gpu('meta', patches):
        for _ in range(2):  # the first step tries kernels, too
            for kernel in kernels.values():
                kernel.launches = 0
            counting._step(model, (images,), True, dtype, counting._Autocast())
    return [kernel for kernel in kernels.values() if kernel.launches]


def describe(kernels: list[Kernel]) -> str:
    """A table, and the milliseconds of all."""
    lines = [
        f'{"kernel":48} {"map":14} launches registers spills'
        '      ms  FFMA  HMMA'
    ]
    for k in kernels:
        row = (
            f'{k.name:48} {k.size:14} {k.launches:8} {k.registers:9}'
            f' {k.spills:6}'
        )
        if k.issued:
            row += f' {k.milliseconds:7.2f}'
            row += f'{k.share("FFMA"):6.0%}{k.share("HMMA"):6.0%}'
        lines.append(row)
    for family in FAMILIES:
        total = sum(
            k.milliseconds for k in kernels if k.name.startswith(family)
        )
        lines.append(f'{family.rstrip("."):88} {total:7.2f}')
    return '\n'.join(lines)
