"""Running again, without its Python, what has run before.

Between the launches of a block stands what finds their grids, sizes and
settings, which takes the host longer than the launches do. All of that depends
on sizes and dtypes alone. So a function that has run often enough for such
operands is recorded once: the operators of PyTorch as its dispatcher sees
them, launches and exchanges between processes, with the places of what they
read and write. From then on these steps run as the lines of one function.
Memory comes from the allocator as before, and is given back behind the last
step that reads it.

A view is one step, however many operators made it; kernels that read a view
from where its memory begins take that memory, and need none. Settings of
kernels (``KNOBS``) that change after a recording are not looked at.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from operator import attrgetter, or_
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
)
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .environment import is_traced, recorded_by, recorder
from .launching import alignments, on_device

MIN_RUNS = 16  # before a recording, which takes as long as twenty runs
MAX_TAPES = 2048  # of 70 KB on average; then no more are recorded
MAX_COUNTED = 2**16
ALLOCATIONS = {
    f'aten::{name}'
    for name in (
        'empty',
        'empty_like',
        'empty_strided',
        'new_empty',
        'new_empty_strided',
    )
}
EMPTY_LIKE = torch.ops.aten.empty_like.default
_dtype, _shape = attrgetter('dtype'), attrgetter('shape')
_numbers = {}  # of parts of keys
_tapes = {}  # by key; None where there cannot be one
_runs = Counter()  # without a tape, by hash of the key


class Tape(NamedTuple):
    """A recorded function, to be run again on other operands."""

    run: Callable[[Sequence[Tensor | None], int | None], list[Tensor | None]]
    facts: Any  # what else the function returned
    same: list[tuple[int, int]]  # operands that were one tensor

    def takes(self, operands: Sequence[Tensor | None]) -> bool:
        """Whether what was one tensor is; nobody knows which was read."""
        return all(operands[i] is operands[j] for i, j in self.same)


class _Step(NamedTuple):
    function: Callable
    args: list[int]
    out: int | tuple[int, ...] | None = None
    is_launch: bool = False
    is_idle: bool = False  # nothing is done but for the result

    def outs(self) -> set[int]:
        return {self.out} if type(self.out) is int else {*(self.out or ())}


class _Owner(NamedTuple):
    """A tensor that is no view of another one on the tape."""

    place: int
    address: int
    dtype: torch.dtype
    offset: int  # in its storage
    is_made: bool  # by the tape, at the start of its storage


class _Recorder(TorchDispatchMode):
    """Records what a function does with its operands."""

    def __init__(self, operands: Sequence[Tensor | None]):
        super().__init__()
        self.operands = range(len(operands))
        self.steps, self.places = [], [None] * len(operands)
        self.constants = {}  # their places, as of the next two
        self.tensors = WeakTensorKeyDictionary()
        self.owners = {}  # of tensors, by place
        self.is_complete, self.same = True, []
        for place, operand in enumerate(operands):
            if operand is not None:
                if operand in self.tensors:
                    self.same.append((self.tensors[operand], place))
                self._set(place, operand)

    def __torch_dispatch__(
        self,
        operator: OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if not _has_tensors((args, kwargs, out)):
            pass  # a question about dtypes, say
        elif operator.namespace != 'aten' or _has_tensors(kwargs):
            self.is_complete = False
        elif operator._schema.name in ALLOCATIONS:
            self._allocate(operator, args, kwargs, out)
        elif not operator.is_view or not self._view(args[0], out):
            self._call(_binding(operator, kwargs), args, out)
        return out

    def launch(self, function: Callable | None, args: tuple) -> None:
        """Record a launch by a function that is given a stream by name.

        There is none where Triton did not compile the kernel.
        """
        self.is_complete &= function is not None
        places = [self._find(arg, is_address=True) for arg in args]
        self.steps.append(_Step(function, places, is_launch=True))

    def exchange(self, function: Callable, args: tuple) -> None:
        """Record and make a call that returns nothing."""
        with _disable_current_modes():
            function(*args)
        self._call(function, args, None)

    def finish(self, results: Sequence[Tensor | None], facts: Any) -> Tape:
        """The tape of all steps but those that make what nobody reads."""
        found = [None if r is None else self._find(r) for r in results]
        made = set().union(*(step.outs() for step in self.steps))
        needed = {place for place in found if place is not None}
        kept = needed | ({*range(len(self.places))} - made)
        steps = []
        for step in reversed(self.steps):
            outs = step.outs()
            if step.is_idle and not outs & needed:
                continue
            ended = outs.union(step.args) - needed - kept
            needed |= outs.union(step.args)
            steps.append((step, ended))
        return Tape(self._compile(steps[::-1], found), facts, self.same)

    def _compile(
        self, steps: Sequence[tuple[_Step, set[int]]], found: list[int | None]
    ) -> Callable:
        """Steps as a function, whose local variables are the places.

        Args:
            steps (Sequence[tuple[_Step, set[int]]]): Each with the places that
                no later one reads.
            found (list[int | None]): The places of what it returns.
        """

        def names(places: Iterable[int | None]) -> str:
            return ''.join(
                'None, ' if i is None else f'v{i}, ' for i in places
            )

        constants = {f'v{i}': self.places[i] for i in self.constants.values()}
        lines = [f'{names(self.operands)} = operands']
        for i, (step, ended) in enumerate(steps):
            function, options = step.function, {}
            if isinstance(function, partial):  # which would take longer
                function, options = function.func, function.keywords
            constants[f'f{i}'] = function
            args = names(step.args)
            for name, value in options.items():
                constants[f'{name}{i}'] = value
                args += f'{name}={name}{i}, '
            if step.is_launch:
                args += 'stream=stream'
            call = f'({args})' if function is _gather else f'f{i}({args})'
            if type(step.out) is int:
                call = f'v{step.out} = {call}'
            elif step.out:
                call = f'{names(step.out)} = {call}'
            lines.append(call)
            if ended:
                lines.append(f'del {names(ended)}')
        lines.append(f'return [{names(found)}]')
        source = '\n    '.join(['def run(operands, stream):', *lines])
        exec(source, constants)
        return constants['run']

    def _allocate(
        self, operator: OpOverload, args: tuple, kwargs: dict, out: Tensor
    ) -> None:
        like = self.tensors.get(args[0]) if operator is EMPTY_LIKE else None
        if like in self.operands and 'memory_format' not in kwargs:
            # Strides of operands differ in sides of 1, which keys leave out
            function, places = torch.empty_like, [like]
            form = dict(dtype=out.dtype)
        else:
            function, places = torch.empty_strided, []
            form = dict(size=tuple(out.shape), stride=out.stride())
            form |= dict(dtype=out.dtype, device=out.device)
        place = self._set(self._add(), out, is_made=True)
        function = partial(function, **form)
        self.steps.append(_Step(function, places, place, is_idle=True))

    def _view(self, base: Tensor, out: Tensor | Sequence[Tensor]) -> bool:
        """Record views as what they are in memory, if that is known."""
        owner = self.owners.get(self.tensors.get(base))
        views = [out] if isinstance(out, Tensor) else out
        if owner is None or any(view.dtype != owner.dtype for view in views):
            return False
        # Within inference_mode reshape, say, is one operator and may copy.
        if any(_memory(view) != _memory(base) for view in views):
            return False
        offsets = [view.storage_offset() - owner.offset for view in views]
        if any(offsets) and not owner.is_made:
            return False
        for view, offset in zip(views, offsets, strict=True):
            form = [tuple(view.shape), view.stride(), offset]
            if not owner.is_made:  # it starts where the owner does
                del form[2]
            args = [owner.place, *map(self._find, form)]
            place = self._set(self._add(), view, owner)
            step = _Step(torch.as_strided, args, place, is_idle=True)
            self.steps.append(step)
        return True

    def _call(self, function: Callable, args: tuple, out: Any) -> None:
        places = [self._find(arg) for arg in args]
        if isinstance(out, list | tuple):
            made = tuple(map(self._result, out))
        elif out is None or out in self.tensors:  # changed in place
            made = None
        else:
            made = self._result(out)
        self.steps.append(_Step(function, places, made))

    def _result(self, out: Any) -> int:
        if isinstance(out, Tensor):
            return self._set(self._add(), out)
        self.is_complete &= out is None  # a number, say, that was read
        return self._add()

    def _find(self, value: Any, is_address: bool = False) -> int:
        """The place of an argument, of which a kernel reads the address."""
        if isinstance(value, Tensor):
            place = self.tensors.get(value)
            if place is None:
                self.is_complete = False
                return 0
            owner = self.owners[place]
            form = value.data_ptr(), value.dtype
            if is_address and form == (owner.address, owner.dtype):
                return owner.place
            return place
        if isinstance(value, list | tuple) and _has_tensors(value):
            places = [self._find(each, is_address) for each in value]
            place = self._add()
            self.steps.append(_Step(_gather, places, place, is_idle=True))
            return place
        key = type(value), str(value) if isinstance(value, list) else value
        if key not in self.constants:
            self.constants[key] = self._add(value)
        return self.constants[key]

    def _add(self, value: Any = None) -> int:
        self.places.append(value)
        return len(self.places) - 1

    def _set(
        self,
        place: int,
        tensor: Tensor,
        owner: _Owner | None = None,
        is_made: bool = False,
    ) -> int:
        self.tensors[tensor] = place
        self.owners[place] = owner or _Owner(
            place,
            tensor.data_ptr(),
            tensor.dtype,
            tensor.storage_offset(),
            is_made,
        )
        return place


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_tensors(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(tree))


def _gather(*values) -> tuple:
    return values


def _binding(operator: OpOverload, kwargs: dict) -> Callable:
    """An operator, or torch's function for it, which is called faster."""
    if kwargs:
        return partial(operator, **kwargs)
    function = getattr(torch, operator._opname, None)
    is_default = operator._overloadname == 'default'
    if is_default and isinstance(function, BuiltinFunctionType):
        return function
    return operator


def describe(values: Sequence) -> tuple[list[Tensor], tuple]:
    """The tensors among operands; of a tape's key, what is about operands.

    Args:
        values (Sequence): Tensors and others, which are parts of the key as
            they are, and sequences of both.
    """
    tensors, facts = [], []
    _sort(values, tensors, facts)
    forms = *map(_dtype, tensors), *map(_shape, tensors), alignment(tensors)
    return tensors, (*facts, *forms)


def number(key: tuple) -> int:
    """A number for a long part of a key, which is found faster."""
    if len(_numbers) < MAX_TAPES:
        return _numbers.setdefault(key, len(_numbers))
    return _numbers.get(key, key)


def alignment(tensors: Sequence[Tensor]) -> Hashable:
    """Of addresses, as kernels are compiled for it; a part of a key."""
    if reduce(or_, map(Tensor.data_ptr, tensors), 0) & 15:
        return tuple(alignments(tensors))
    return 0


def _sort(values: Sequence, tensors: list[Tensor], facts: list) -> None:
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):  # faster than of a union
            facts += len(tensors), len(value)
            _sort(value, tensors, facts)
        else:  # behind so many tensors
            facts += len(tensors), value


def play(
    function: Callable, operands: Sequence[Tensor | None], key: Hashable
) -> tuple[list[Tensor | None], Any]:
    """Run a function, or the tape of what it does.

    Args:
        function (Callable): Without arguments, to a list of tensors and None,
            and to other facts. No gradients are taken through it.
        operands (Sequence[Tensor | None]): All tensors that it reads or
            changes, the first one on its device.
        key (Hashable): All that decides what it does with them. Sizes,
            dtypes, strides and alignment of the operands are to be a part.

    Returns:
        tuple: What the function returns.
    """
    if is_traced() or recorder() is not None:
        return function()
    device = operands[0].device.type
    is_cast = torch.is_autocast_enabled(device)
    index = operands[0].get_device()
    # A backward pass need not be cast as its forward pass was.
    key = key, index, is_cast and torch.get_autocast_dtype(device)
    tape = _tapes.get(key)
    if tape is not None and not tape.takes(operands):
        key = key, 'apart'  # those of saved maps that hooks bring back, say
        tape = _tapes.get(key)
        if tape is not None and not tape.takes(operands):
            return function()
    if tape is not None:
        # Steps of the tape cast what autocast does.
        mode = torch.autocast(device, enabled=False) if is_cast else None
        with on_device(index) as stream, mode or nullcontext():
            return tape.run(operands, stream), tape.facts
    if key in _tapes or len(_tapes) >= MAX_TAPES:
        return function()
    if len(_runs) >= MAX_COUNTED:
        _runs.clear()
    _runs[hash(key)] += 1
    if _runs[hash(key)] < MIN_RUNS:
        return function()
    return _record(function, operands, key)


def _record(
    function: Callable, operands: Sequence[Tensor | None], key: Hashable
) -> tuple[list[Tensor | None], Any]:
    """Run a function and keep its tape."""
    mode = _Recorder(operands)
    with recorded_by(mode), mode:
        results, facts = function()
    tape = mode.finish(results, facts)
    _tapes[key] = tape if mode.is_complete else None
    return results, facts


def exchange(function: Callable, *args) -> None:
    """Call a function that returns nothing, and is no operator of PyTorch."""
    mode = recorder()
    if mode is None:
        function(*args)
    else:
        mode.exchange(function, args)
