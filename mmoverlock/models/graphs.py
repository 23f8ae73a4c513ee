"""CUDA graphs: what a GPU runs for images of a size, recorded and replayed.

A training step of ``t`` launches some 1,600 kernels, and a host takes longer
to launch them than a fast GPU to run them. A graph launches all kernels of a
pass at once. It is recorded when a size has come a few times; until then, and
wherever a recording would not do the same, the network runs as it is.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from ..ops import is_traced
from .layers import has_no_hooks

WARM_UPS = 3  # passes of a size before it is recorded: kernels compile there
MOST = 16  # recordings, unless said


class Graphs:
    """Runs a module on images, from CUDA graphs where it can.

    Recordings share their memory, so one pass at a time runs from them: its
    backward pass comes before the next one, which otherwise runs as it is.
    What is copied or pickled is without recordings.

    Args:
        cuda_graphs (bool | int): Whether there are any, or for how many sizes
            and modes.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, cuda_graphs: bool | int):
        if not isinstance(cuda_graphs, int) or cuda_graphs < 0:
            raise ValueError(
                'cuda_graphs must be True, False or a number of image sizes, '
                f'got {cuda_graphs!r}'
            )
        self.most = MOST if cuda_graphs is True else int(cuda_graphs)
        self._said = set()
        self._forget()

    def __getstate__(self) -> dict:
        return dict(most=self.most)

    def __setstate__(self, state: dict) -> None:
        self.__init__(state['most'])

    def __bool__(self) -> bool:
        return self.most > 0

    def _forget(self, addresses: list | None = None) -> None:
        self._addresses = addresses
        self._passes = {}  # by key, those before a recording
        self._recordings = {}  # by key
        self._grads = {}  # by parameter, what all recordings write
        self._places = {}  # by device, memory and stream of recordings
        self._last = lambda: None  # the last pass with a gradient, if alive

    def __call__(
        self,
        module: nn.Module,
        run: Callable[[Tensor], tuple[Tensor, ...]],
        x: Tensor,
    ) -> tuple[Tensor, ...]:
        """``run(x)``.

        Args:
            module (nn.Module): Whose parameters and buffers are read.
            run (callable): Of the images alone, else of the module.
            x (Tensor): Images.

        Returns:
            tuple[Tensor]: Outputs; they stay as they are after the next pass.

        Raises:
            RuntimeError: In a second backward pass of the same outputs.
        """
        if not self:
            return run(x)
        if not is_on_gpu(x):
            self._forget()
            return run(x)
        if _is_watched(x):
            return run(x)
        modes, tensors, obstacle = _survey(module)
        if obstacle is None and not getattr(self._last(), 'done', True):
            obstacle = 'the gradient of the pass before has not been taken'
        if obstacle is not None:
            self._say(f'This pass runs without CUDA graphs: {obstacle}')
            return run(x)
        addresses = [
            (id(t), t.data_ptr(), t.shape, t.stride(), t.dtype)
            + (t.requires_grad,)
            for t in tensors
        ]
        if addresses != self._addresses:
            self._forget(addresses)
        key = _describe(x), *modes
        if key not in self._recordings:
            passes = self._passes.get(key, 0)
            if passes < WARM_UPS:
                return self._count(key, run(x))
            if len(self._recordings) == self.most:
                return run(x)
            recording = self._record(module, run, x)
            if recording is None:
                return run(x)
            self._recordings[key] = recording
        recording = self._recordings[key]
        if not recording.parameters:
            return recording.run(x)
        this = _Pass()
        self._last = weakref.ref(this)
        return _Replay.apply(recording, this, x, *recording.parameters)

    def _count(self, key: tuple, outs: tuple[Tensor, ...]) -> tuple:
        """Count a pass, when its gradient is there if it has one."""
        counts = self._passes
        before = counts.get(key, 0)

        def count(*_) -> None:
            counts[key] = before + 1

        trained = [out for out in outs if out.requires_grad]
        for out in trained:
            out.register_hook(count)
        if not trained:
            count()
        return outs

    def _record(
        self, module: nn.Module, run: Callable, x: Tensor
    ) -> 'Recording | None':
        try:
            if x.device not in self._places:
                stream = torch.cuda.Stream(x.device)
                pool = torch.cuda.graph_pool_handle()
                self._places[x.device] = pool, stream
            with torch.cuda.device(x.device):
                place = self._places[x.device]
                return Recording(module, run, x, self._grads, place)
        except Exception as error:  # of CUDA, or what cannot be recorded
            self._forget()
            self.most = 0
            self._say(
                f'There are no CUDA graphs: {type(error).__name__}: {error}'
            )
            return None

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print_log(text, logger='current', level=logging.WARNING)


class Recording:
    """Graphs of the passes of a module on images of one size.

    Args:
        module (nn.Module): See :meth:`Graphs.__call__`.
        run (callable): The same.
        x (Tensor): The same.
        grads (dict): By parameter, what takes its gradient; missing ones are
            added.
        place (tuple): Memory, as of ``torch.cuda.graph_pool_handle``, and a
            stream.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable,
        x: Tensor,
        grads: dict[nn.Parameter, Tensor],
        place: tuple,
    ):
        self._x = x.detach().clone()
        self.parameters = []
        if torch.is_grad_enabled():
            self.parameters = [
                p for p in module.parameters() if p.requires_grad
            ]
        # In the same memory. What adds up gradients of the true ones belongs
        # to the stream in which it was first asked for, which DDP does.
        aliases = {p: nn.Parameter(p.detach()) for p in self.parameters}
        autocast = dict(
            dtype=torch.get_autocast_dtype('cuda'),
            enabled=torch.is_autocast_enabled('cuda'),
            cache_enabled=False,  # a cast that was kept is not in the graph
        )
        live = []  # outputs with what their gradients need

        def compute() -> list[Tensor]:
            with (
                _replaced(module, aliases),
                torch.autocast('cuda', **autocast),
            ):
                outs = run(self._x)
            live[:] = [out for out in outs if out.requires_grad]
            self.is_trained = [out.requires_grad for out in outs]
            return [out.detach() for out in outs]

        def differentiate() -> list[bool]:
            """Write the gradients; return which there are."""
            with torch.autocast('cuda', enabled=False):  # as behind a step's
                found = torch.autograd.grad(
                    live,
                    [*aliases.values()],
                    self._out_grads,
                    allow_unused=True,
                )
            is_used = [grad is not None for grad in found]
            used = [grad for grad in found if grad is not None]
            torch._foreach_copy_([*compress(self._grads, is_used)], used)
            return is_used

        self._replay, self._outs = record(compute, *place)
        if not live:
            self.parameters = []
            return
        self._grads = [
            grads.setdefault(p, torch.empty_like(p)) for p in self.parameters
        ]
        self._out_grads = [torch.zeros_like(out) for out in live]
        self._replay_backward, self._is_used = record(differentiate, *place)

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in memory of their own."""
        self._x.copy_(x)
        self._replay()
        return tuple(out.clone() for out in self._outs)

    def differentiate(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the parameters, in memory of their own."""
        grads = [*compress(grads, self.is_trained)]
        torch._foreach_copy_(self._out_grads, grads)
        self._replay_backward()
        used = [*compress(self._grads, self._is_used)]
        copies = iter(torch._foreach_mul(used, 1))
        return [next(copies) if used else None for used in self._is_used]


def record(
    function: Callable[[], Any], pool: Any, stream: Any
) -> tuple[Callable, Any]:
    """Record what a function has a GPU do.

    Returns:
        tuple[callable, Any]: What has it done again, and what the function
        returned: each time, the same tensors get new values.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        # Threads that load images may go on meanwhile.
        with torch.cuda.graph(
            graph, pool, stream, capture_error_mode='thread_local'
        ):
            result = function()
    finally:  # which a failed recording leaves out
        torch.cuda.set_stream(before)
    return graph.replay, result


class _Pass:
    """Of a recording, with a gradient that is to come."""

    done = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        this: _Pass,
        x: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.recording, ctx.this = recording, this
        # So that it is an error to change them before the backward pass
        ctx.save_for_backward(*parameters)
        outs = recording.run(x)
        fixed = zip(outs, recording.is_trained, strict=True)
        ctx.mark_non_differentiable(*(out for out, t in fixed if not t))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.this.done:
            raise RuntimeError(
                'a second backward pass through CUDA graphs, which keep '
                'nothing for it: set cuda_graphs=False in the backbone'
            )
        ctx.this.done = True
        _ = ctx.saved_tensors  # raises an error if they have changed
        return None, None, None, *ctx.recording.differentiate(grads)


def is_on_gpu(x: Tensor) -> bool:
    """Whether CUDA graphs could take images."""
    return x.is_cuda


def _describe(x: Tensor) -> tuple:
    """All that makes a difference, but for the module."""
    return (
        x.device,
        x.dtype,
        x.shape,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled('cuda'),
        torch.get_autocast_dtype('cuda'),
    )


def _is_watched(x: Tensor) -> bool:
    """Whether anything but values is asked of a pass, or it is recorded."""
    return (
        is_traced()
        or torch.jit.is_tracing()
        or torch.is_anomaly_enabled()
        or _has_any_global_hook()
        or forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(False)
        is not None
        or x.requires_grad
        or type(x) is not Tensor
        or torch.cuda.is_current_stream_capturing()
    )


def _survey(
    module: nn.Module,
) -> tuple[list, list[Tensor], str | None]:
    """Look at all modules within one, 1,500 of them in two milliseconds.

    Returns:
        tuple[list, list, str | None]: What they are set to, their parameters
        and buffers, and why they cannot be recorded.
    """
    modes, tensors, obstacle, parts = [], [], None, [module]
    while parts:
        part = parts.pop()
        own = part.__dict__
        # Hooks of a training change some of these
        modes += type(part), part.training
        modes += str(own.get('drop_prob')), str(own.get('momentum'))
        tensors += part._parameters.values()
        tensors += part._buffers.values()
        parts += part._modules.values()
        if not has_no_hooks(part):
            obstacle = f'{type(part).__name__} has hooks'
        elif isinstance(part, nn.SyncBatchNorm) and part.training:
            obstacle = 'processes exchange the statistics of SyncBN'
    kinds = bool, int, float, str, tuple
    modes.append(repr([v for v in vars(module).values() if type(v) in kinds]))
    if getattr(module, '_is_replica', False):
        obstacle = 'DataParallel has a replica for every pass'
    return modes, [t for t in tensors if t is not None], obstacle


@contextmanager
def _replaced(
    module: nn.Module, others: dict[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    """Other parameters in the place of some."""
    tables = [
        (part._parameters, part._parameters.copy())
        for part in module.modules()
    ]
    for table, kept in tables:
        table.update((k, others[p]) for k, p in kept.items() if p in others)
    try:
        yield
    finally:
        for table, kept in tables:
            table.update(kept)
