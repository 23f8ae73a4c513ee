"""Count what a GPU would do, without one: ``python -m benchmarks.count``.

The code that GPUs run works on tensors without data (on the device 'meta').
PyTorch's operators are counted, those inside the project's own operators too,
and so are launches of Triton kernels, which do nothing here. Dropout counts
as three operators and is one on GPUs.
"""

import argparse
import copy
import math
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # noqa: F401, which looks at what is replaced below
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mmoverlock.models import OverLoCK
from mmoverlock.models.fuse import fuse

# Functions by what CUDA's autocast does, from its documentation: it casts
# their operands down, casts them up, only makes the result wide, or casts
# all to the widest of them.
LOW = {'conv2d', 'linear', 'matmul', 'mm', 'bmm', 'addmm', 'baddbmm'}
LOW |= {'__matmul__', '__rmatmul__', 'scaled_dot_product_attention'}
HIGH = {'layer_norm', 'group_norm', 'pow', '__pow__', 'norm', 'interpolate'}
HIGH |= {'exp', 'log', 'rsqrt', 'reciprocal', '__rdiv__', '__rtruediv__'}
HIGH_RESULT = {'sum', 'softmax', 'log_softmax', 'cumsum', 'prod'}
WIDEST = {'addcmul', 'addcdiv'}

OPERATORS = DispatchKey.CUDA, DispatchKey.CompositeExplicitAutograd
FREE = 'empty', 'as_strided', 'lift_fresh', '_unsafe_view', 'promote_types'
PROPERTIES = SimpleNamespace(
    name='none', major=9, minor=0, multi_processor_count=132
)
PROCESSES = 8  # that a SyncBN has statistics of
LARGE = 2**18  # elements of a map whose layout matters


@dataclass
class Count:
    """Operators and launches of a step.

    Args:
        operators (int): Of PyTorch, but for views and empty tensors.
        launches (int): Of Triton kernels.
        bytes (int): Of the operands and results of both.
        mixed (int): The bytes of those with large maps that are not all in
            one layout, or not dense.
        memory (int): The bytes of all that is alive at a time, at most: the
            model, its gradients and what is kept for them, the maps.
        rows (dict): By name of operator or kernel: calls, bytes and bytes of
            mixed layouts.
    """

    operators: int = 0
    launches: int = 0
    bytes: int = 0
    mixed: int = 0
    memory: int = 0
    rows: dict = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))

    def add(self, name, tensors):
        layouts = {_layout(t) for t in tensors if _is_large_map(t)}
        size = sum(_size(t) for t in tensors)
        is_mixed = len(layouts) > 1 or 'strided' in layouts
        self.bytes += size
        self.mixed += size * is_mixed
        row = self.rows[name]
        for i, number in enumerate((1, size, size * is_mixed)):
            row[i] += number


def _size(t):
    """Bytes in memory, where an expanded tensor has each element once."""
    sides = zip(t.shape, t.stride(), strict=True)
    return t.element_size() * math.prod(n for n, step in sides if step)


def _is_large_map(t):
    return (
        t.ndim == 4
        and min(t.shape[1], t.shape[2:].numel()) > 1
        and _size(t) >= LARGE * t.element_size()
    )


def _layout(t):
    if t.is_contiguous():
        return 'NCHW'
    if t.is_contiguous(memory_format=torch.channels_last):
        return 'channels_last'
    return 'strided'


def _tensors(*trees):
    return [t for t in pytree.tree_leaves(trees) if isinstance(t, Tensor)]


def does_something(f):
    """Whether an operator of PyTorch is more than a view or empty memory."""
    return not f.is_view and not any(word in f.__name__ for word in FREE)


class _Autocast(TorchFunctionMode):
    """CUDA's autocast, of tensors that are elsewhere."""

    def __init__(self):
        super().__init__()
        self.weights = {}

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(f, '__name__', None)
        if torch.is_autocast_enabled('cuda'):
            dtypes = [
                t.dtype
                for t in _tensors(args, kwargs)
                if t.dtype in (torch.float32, torch.float16, torch.bfloat16)
            ]
            low = torch.get_autocast_dtype('cuda')
            if name in LOW:
                args, kwargs = self._cast((args, kwargs), low)
            elif name in HIGH or (name in WIDEST and torch.float32 in dtypes):
                args, kwargs = self._cast((args, kwargs), torch.float32)
            elif name in HIGH_RESULT and dtypes:
                kwargs.setdefault('dtype', torch.float32)
        return f(*args, **kwargs)

    def _cast(self, tree, dtype):
        def cast(t):
            if not t.is_floating_point() or t.dtype == torch.float64:
                return t
            if t.is_leaf and t.requires_grad and dtype != torch.float32:
                if t not in self.weights:
                    self.weights[t] = t.to(dtype)
                return self.weights[t]
            return t.to(dtype)

        return pytree.tree_map_only(Tensor, cast, tree)


class _Operators(TorchDispatchMode):
    """Counts operators, and what is alive beside some tensors."""

    def __init__(self, result, tensors):
        super().__init__()
        self.result = result
        self.alive, self.size = {}, 0
        self._allocate(tensors)

    def _allocate(self, tensors):
        for t in tensors:
            storage = t.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self.alive:
                self.alive[reference] = storage.nbytes()
                self.size += storage.nbytes()
        if self.size > self.result.memory:  # as far as one knows
            for reference in [r for r in self.alive if r.expired()]:
                self.size -= self.alive.pop(reference)
            self.result.memory = max(self.result.memory, self.size)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f.namespace not in ('aten', 'prim', 'prims'):
            # Not what it says about its results without data, but itself.
            key = next(
                k for k in OPERATORS if f.has_kernel_for_dispatch_key(k)
            )
            with self:
                return f._op_dk(key, *args, **kwargs)
        if f.namespace == 'aten':  # of which backward passes call some
            with self:
                out = f.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = _as_cudnn(f, args, f(*args, **kwargs))
        self._allocate(_tensors(out))
        if does_something(f):
            self.result.operators += 1
            # An operand that is changed in place is read and written.
            self.result.add(str(f), _tensors(args, kwargs, out))
        return out


def _as_cudnn(f, args, out):
    """Without data, results of convolutions are in NCHW.

    cuDNN's are in channels_last where the map or the weight is.
    """
    forward = f is torch.ops.aten.convolution.default
    backward = f is torch.ops.aten.convolution_backward.default
    if not forward and not backward:
        return out
    if all(_layout(t) == 'NCHW' for t in args[backward:][:2]):
        return out
    results = [out] if forward else [*out]
    if results[0] is not None:
        results[0] = results[0].contiguous(memory_format=torch.channels_last)
    return results[0] if forward else tuple(results)


class _Device(str):
    """A device of PyTorch's that Python code takes for a GPU."""

    type = 'cuda'
    index = 0


@contextmanager
def _on_gpu(device, patches):
    """Make Python code find tensors on a GPU of capability 9.0."""
    device = _Device(device)
    tensors = dict(device=property(lambda _: device), is_cuda=True)
    cuda = dict(
        is_available=lambda: True,
        is_bf16_supported=lambda *_: True,
        get_device_capability=lambda *_: (9, 0),
        get_device_properties=lambda *_: PROPERTIES,
    )
    autocast = dict(amp_definitely_not_available=lambda: False)
    with ExitStack() as stack:
        for patch in (
            mock.patch.multiple(torch.Tensor, **tensors),
            mock.patch.multiple('torch.cuda', **cuda),
            mock.patch.multiple('torch.cuda.amp.common', **autocast),
            mock.patch('mmoverlock.models.overlock.print_log'),
            mock.patch('mmoverlock.ops.backends._launch'),
            *patches,
        ):
            stack.enter_context(patch)
        yield


def _kernels():
    """The classes of Triton's that launch kernels."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return ()
    return JITFunction, InterpretedFunction


def _step(model, inputs, train, dtype, mode):
    with (
        torch.set_grad_enabled(train),
        torch.autocast('cuda', dtype, enabled=dtype != torch.float32),
        mode,
    ):
        out = model(*inputs)
    outs = [out] if isinstance(out, Tensor) else [*out]
    if train:
        torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])


def _exchanges(run):
    """Exchanges of processes, in place of which a function runs."""
    distributed = dict(
        is_initialized=lambda: True,
        get_world_size=lambda group: PROCESSES,
        all_reduce=partial(run, 'all_reduce'),
    )
    gather = 'mmoverlock.ops.batch_norm.triton._all_gather'
    return [
        mock.patch.multiple('torch.distributed', **distributed),
        mock.patch(gather, partial(run, 'all_gather')),
    ]


def count_operators(model, inputs, train, dtype=torch.bfloat16):
    """Count what a step of a model runs on a GPU.

    Exchanges of a SyncBN that has a ``process_group`` count as operators, as
    among ``PROCESSES`` GPUs.

    Args:
        model (nn.Module): In the mode that is to be counted; it is left as
            it is.
        inputs (Tensor | tuple): Of the model.
        train (bool): Whether there is a backward pass.
        dtype (torch.dtype): Of autocast, which float32 is without. Defaults
            to bfloat16.

    Returns:
        Count: What it runs.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    inputs = [
        x.detach().to('meta').requires_grad_(x.requires_grad) for x in inputs
    ]
    model = copy.deepcopy(model).to('meta')

    def run(kernel, *args, grid, warmup, **kwargs):
        result.launches += 1
        name = f'{kernel.fn.__module__}.{kernel.fn.__name__}'
        result.add(
            name.removeprefix('mmoverlock.ops.'), _tensors(args, kwargs)
        )

    def exchange(name, *tensors, **options):
        result.operators += 1
        result.add(name, _tensors(tensors))

    patches = [mock.patch.object(kind, 'run', run) for kind in _kernels()]
    if _kernels():
        patches += _exchanges(exchange)
    with _on_gpu('meta', patches):
        for _ in range(2):  # the first step makes constants that are kept
            result = Count()
            for leaf in (*inputs, *model.parameters()):
                leaf.grad = None
            tensors = *inputs, *model.parameters(), *model.buffers()
            with _Operators(result, tensors):
                _step(model, inputs, train, dtype, _Autocast())
    return result


class _Driver:
    """Of a GPU that is not there: what launching a kernel asks for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return -1  # as that of the CPU

    def get_current_stream(self, device):
        return 0


class _Compiled:
    """Stands for a compiled kernel; it is launched as Triton launches one."""

    function = packed_metadata = None

    def run(self, *args):
        pass

    def launch_metadata(self, *args):
        pass

    def __getitem__(self, grid):
        def run(*args, stream=0):
            self.launch_metadata(grid, stream, *args)
            self.run(*grid, stream, *args)

        return run


def _do_not_compile(kernel, key, signature, device, *args):
    """A compiled kernel that does nothing, kept as others are."""
    compiled = _Compiled()
    kernel.device_caches[device][0][key] = compiled
    return compiled


def host_seconds(model, inputs, train, repeats=5):
    """CPU time of Python and PyTorch in a step, in single precision.

    What a GPU computes is computed on the CPU, or not at all in kernels of
    Triton, so maps have to be small.

    Args:
        model (nn.Module): On the CPU. Its statistics and gradients are not
            those of a step.
        inputs (Tensor | tuple): Of the model.
        train (bool): Whether there is a backward pass.
        repeats (int): Steps after two that warm up. Defaults to 5.

    Returns:
        float: The least of them.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    patches = []
    if _kernels():
        from triton.runtime import driver

        # After the two steps, blocks run from tapes
        tapes = dict(MIN_RUNS=1, _tapes={}, _runs=Counter())
        jit, interpreted = _kernels()
        patches = [
            mock.patch.multiple('mmoverlock.ops.tape', **tapes),
            mock.patch.object(type(driver), 'active', _Driver()),
            mock.patch.object(jit, '_do_compile', _do_not_compile),
            mock.patch.object(interpreted, 'run', lambda *_, **__: None),
            *_exchanges(lambda *_, **__: None),
        ]
    times = []
    with _on_gpu('cpu', patches):
        for _ in range(2 + repeats):
            start = time.process_time()
            _step(model, inputs, train, torch.float32, nullcontext())
            times.append(time.process_time() - start)
            model.zero_grad(set_to_none=True)
    return min(times[2:])


def build(train, backend='auto', channels=None, norm='BN'):
    """t without data, fused for inference.

    With other channels, it is on the CPU, for :func:`host_seconds`. Its norms
    may be 'SyncBN'.
    """
    arch = 't'
    if channels:
        arch = dict(OverLoCK.arch_zoo['t', 'tiny'], channels=channels)
        arch['focus_heads'] = (2, 2)
    with torch.device('cpu' if channels else 'meta'):
        model = OverLoCK(
            arch,
            drop_path_rate=0.1,
            contmix_backend=backend,
            depthwise_backend=backend,
            norm_cfg=dict(type=norm),
        )
    for part in model.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.process_group = f'{PROCESSES} processes'
    return model.train() if train else fuse(model)


def build_peer(train, channels=None):
    """ConvNeXt-T of MMPretrain, which may be missing."""
    from mmpretrain.models import ConvNeXt

    arch = 'tiny'
    if channels:
        arch = dict(depths=[3, 3, 9, 3], channels=channels)
    model = ConvNeXt(
        arch,
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        drop_path_rate=0.1,
    )
    model.train(train)
    return model


def blocks(model, batch=128):
    """A block of either kind, and what it takes of images of 224 x 224.

    Maps are in bfloat16, as autocast leaves them inside of the network.

    Args:
        model (OverLoCK): t.
        batch (int): Defaults to 128.

    Returns:
        dict: By name, a block and its inputs.
    """
    layout = dict(memory_format=torch.channels_last)
    rep, focus = model.blocks1[-1], model.sub_blocks3[-1]
    maps = (model.channels[0], 56, 56), (sum(focus.splits), 14, 14)
    x, z = (
        torch.empty(
            batch, *size, dtype=torch.bfloat16, device='meta'
        ).contiguous(**layout)
        for size in maps
    )
    prior = z[:, : focus.splits[1]].contiguous(**layout)
    if model.training:
        x.requires_grad_()
        z.requires_grad_()
    return {'RepConv block': (rep, (x,)), 'Focus block': (focus, (z, prior))}


def describe(name, result, host=None):
    text = (
        f'{name:40}{result.operators:10}{result.launches:10}'
        f'{result.bytes / 1e9:9.1f}{result.mixed / 1e9:9.1f}'
        f'{result.memory / 1e9:8.1f}'
    )
    return text if host is None else f'{text}{host * 1e3:9.0f}'


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--backend', default='auto', help='of the operators; default: auto'
    )
    parser.add_argument(
        '--size',
        nargs=3,
        type=int,
        default=(128, 224, 224),
        metavar=('B', 'H', 'W'),
        help='of the images; default: 128 224 224',
    )
    parser.add_argument(
        '--top',
        type=int,
        default=0,
        metavar='N',
        help='the N operators that move most, of every network',
    )
    parser.add_argument(
        '--kernels',
        action='store_true',
        help='instead, what bounds the kernels of a training step of t; '
        'compiling them takes minutes',
    )
    args = parser.parse_args(args)
    torch.set_num_threads(1)
    batch, *sides = args.size
    images = torch.empty(batch, 3, *sides, device='meta')
    if args.kernels:
        from . import kernels

        model = build(True, 'triton')
        print(kernels.describe(kernels.compile_step(model, images)))
        return 0
    small = torch.randn(2, 3, 224, 224)
    print(
        f'{"bf16; host in fp32, with few channels":40} operators  launches'
        '       GB    mixed  memory  host ms'
    )
    for train in (True, False):
        what = 'training' if train else 'inference'
        for name, make in (
            ('t', partial(build, train, args.backend)),
            ('t, SyncBN', partial(build, train, args.backend, norm='SyncBN')),
            ('ConvNeXt-T', partial(build_peer, train)),
        ):
            if 'SyncBN' in name and not train:
                continue  # there, it is as the other
            try:
                model = make()
            except ImportError as error:
                print(f'{name}, {what}: {error}')
                continue
            result = count_operators(model, images, train)
            host = host_seconds(make(channels=(8, 8, 16, 16)), small, train)
            print(describe(f'{name}, {what}', result, host), flush=True)
            rows = sorted(result.rows.items(), key=lambda row: -row[1][1])
            for operator, (calls, size, mixed) in rows[: args.top]:
                print(
                    f'  {operator:38}{calls:20}{size / 1e9:9.2f}'
                    f'{mixed / 1e9:9.2f}'
                )
        for name, (block, inputs) in blocks(
            build(train, args.backend)
        ).items():
            result = count_operators(block, inputs, train)
            print(describe(f'{name}, {what}', result), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
