"""The rows of benchmarks/gpu.py: functions that return figures of a GPU.

Times are in milliseconds, medians of single calls unless said; memory is in
MB of 2**20 bytes, the peak beyond what is there before the call. A training
step is forward and backward of a backbone, of drawn images, with the mean
square of the outputs as the loss, under autocast unless in fp32.
"""

import gc
import importlib
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmoverlock.models import OverLoCK, graphs
from mmoverlock.models.fuse import fuse
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops import contmix, depthwise_conv2d, tape

MB = 2**20
DTYPES = {
    'bf16': torch.bfloat16,
    'fp16': torch.float16,
    'fp32': torch.float32,
}
LAYOUTS = {
    'channels_last': torch.channels_last,
    'NCHW': torch.contiguous_format,
}
SIZES = {
    '128 x 224 x 224': (128, 224, 224),
    '2 x 800 x 1344': (2, 800, 1344),
}
PEERS = {
    'ConvNeXt-T': 'convnext_tiny',
    'Swin-T': 'swin_tiny_patch4_window7_224',
    'ResNet-50': 'resnet50',
}
# The project's forms: kernels first, then what they are compared with.
CONTMIX_BACKENDS = 'triton', 'tiled'
DEPTHWISE_BACKENDS = 'triton', 'reference'
# Kernel size: the maps of t, (B, C, H, W).
DEPTHWISE_MAPS = {
    17: ((128, 64, 56, 56), (2, 64, 200, 336)),
    15: ((128, 128, 28, 28), (2, 128, 100, 168)),
    13: ((128, 256, 14, 14), (2, 256, 50, 84)),
    7: ((128, 512, 7, 7), (2, 512, 25, 42)),
}
# 3 x 3, in the order of what a step spends on them.
SMALL_MAPS = (
    (128, 256, 56, 56),
    (128, 512, 28, 28),
    (128, 1152, 14, 14),
    (2, 256, 200, 336),
)
# Batch, height, width, groups, kernel size.
CONTMIX_MAPS = (
    (128, 14, 14, 8, 13),
    (128, 7, 7, 16, 7),
    (2, 50, 84, 8, 13),
    (2, 25, 42, 16, 7),
)
ROOT = Path(__file__).parents[1]
SWIN = dict(
    _delete_=True,
    type='SwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    drop_path_rate=0.2,
)
SWIN_CHANNELS = [96, 192, 384, 768]
# Package and config of a model; layout, folder and size of drawn images; what
# else the config of Swin-T changes.
MODELS = {
    'Mask R-CNN': (
        'mmdet',
        'mask_rcnn/overlock_t_1x.py',
        ('coco', 'data/coco', 1333),
        dict(neck=dict(in_channels=SWIN_CHANNELS)),
    ),
    'UperNet': (
        'mmseg',
        'upernet/overlock_t_160k.py',
        ('ade20k', 'data/ade/ADEChallengeData2016', 683),
        dict(
            decode_head=dict(in_channels=SWIN_CHANNELS),
            auxiliary_head=dict(in_channels=SWIN_CHANNELS[2]),
        ),
    ),
}
HOW = 'compiled', 'CUDA graphs', 'no tapes'
STRIDES = dict(
    blocks1=4,
    blocks2=8,
    blocks3=16,
    sub_blocks3=16,
    blocks4=32,
    sub_blocks4=32,
)
WARM_UPS = 2
LEAST, MOST = 3, 30  # calls that are timed
BUDGET = 1.5  # seconds for the calls between these


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def timed(run, device, budget=BUDGET):
    """Time calls, after some that warm up.

    Returns:
        dict: ``ms``, the shortest and the longest, and ``host_ms``, after
        which the call returned.
    """
    for _ in range(WARM_UPS):
        run()
    synchronize(device)
    hosts, times = [], []
    end = time.perf_counter() + budget
    while len(times) < LEAST or (
        len(times) < MOST and time.perf_counter() < end
    ):
        start = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - start)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return dict(
        ms=_ms(statistics.median(times)),
        least=_ms(min(times)),
        most=_ms(max(times)),
        host_ms=_ms(statistics.median(hosts)),
    )


def _ms(seconds):
    return round(seconds * 1e3, 4)


def kernel_ms(run, device):
    """Median of calls with a cold cache, for operators."""
    if device.type != 'cuda':
        return timed(run, device, 0)['ms']
    from triton.testing import do_bench

    return round(do_bench(run, 10, 100, return_mode='median'), 4)


def peak(run, device):
    """Memory that a call takes beyond what is there."""
    if device.type != 'cuda':
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) // MB


def autocast(dtype, device):
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != 'fp32')


def draw(shape, device, dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(shape, device=device).to(dtype, memory_format=layout)


def machine(device):
    import triton

    properties = torch.cuda.get_device_properties(device)
    return dict(
        name=properties.name,
        capability=f'{properties.major}.{properties.minor}',
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        triton=triton.__version__,
    )


def copy(device, size=2**30):
    """Bandwidth, read and written, in TB/s."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = kernel_ms(lambda: target.copy_(source), device)
    return dict(ms=ms, rate=2 * size / ms / 1e9)


def matmul(dtype, device, tf32=False, size=8192):
    """Rate of a matrix product, in TFLOP/s."""
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ms = kernel_ms(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return dict(ms=ms, rate=2 * size**3 / ms / 1e9)


def build(name, size, train, device, how=None):
    """A backbone: 't' or another arch, or a key of ``PEERS``.

    OverLoCK is fused for inference, and so are the branches of its large
    convolutions. How it runs is one of ``HOW`` or None: its blocks are what
    is compiled or, from the second run on, taken from tapes. Peers are
    compiled whole, and are classifiers where images are of 224 x 224.
    """
    if name in [*PEERS]:
        import timm

        options = dict(num_classes=1000 if size[1:] == (224, 224) else 0)
        if name == 'Swin-T':
            options['img_size'] = size[1:]
        model = timm.create_model(PEERS[name], **options)
        if name != 'Swin-T':
            model = model.to(memory_format=torch.channels_last)
        if how == 'compiled':
            model.compile()
    else:
        model = OverLoCK(
            name,
            drop_path_rate=0.1,
            compile=how == 'compiled',
            cuda_graphs=how == 'CUDA graphs',
        )
        tape.MIN_RUNS = 10**9 if how == 'no tapes' else 1
        tape._tapes.clear()
        if not train:
            fuse(model)
    model.to(device).train(train)
    if how == 'compiled':
        torch._dynamo.reset()
    return model


def forward(model, images, dtype):
    with autocast(dtype, images.device):
        maps = model(images)
    return maps if isinstance(maps, tuple | list) else [maps]


def backward(model, maps):
    sum(x.float().square().mean() for x in maps).backward()
    model.zero_grad(set_to_none=True)


def caller(model, images, dtype, train):
    """A function that runs a training step, or inference."""

    def run():
        if train:
            backward(model, forward(model, images, dtype))
        else:
            with torch.inference_mode():
                forward(model, images, dtype)

    return run


def prepare(name, size, dtype, train, device, how=None):
    gc.collect()  # what the row before has left
    torch.cuda.empty_cache()
    model = build(name, size, train, device, how)
    images = torch.randn(size[0], 3, *size[1:], device=device)
    run = caller(model, images, dtype, train)
    if how == 'CUDA graphs':
        for _ in range(graphs.WARM_UPS):
            run()
    return run


def network(name, size, dtype, train, device, how=None):
    """A training step or inference of a backbone."""
    run = prepare(name, size, dtype, train, device, how)
    start = time.perf_counter()
    run()
    synchronize(device)
    first = time.perf_counter() - start
    figures = timed(run, device)
    return dict(
        figures,
        images_per_second=round(size[0] / figures['ms'] * 1e3, 1),
        mb=peak(run, device),
        first_s=round(first, 1),
    )


def halves(name, batch, device, side=224):
    """Forward and backward of a step apart, in bf16."""
    model = build(name, (batch, side, side), True, device)
    images = torch.randn(batch, 3, side, side, device=device)
    maps = None

    def ahead():
        nonlocal maps
        maps = forward(model, images, 'bf16')

    times = {'forward': [], 'backward': []}
    for _ in range(WARM_UPS + LEAST + 2):
        for what, run in (
            ('forward', ahead),
            ('backward', lambda: backward(model, maps)),
        ):
            start = time.perf_counter()
            run()
            host = time.perf_counter() - start
            synchronize(device)
            times[what].append((host, time.perf_counter() - start))
    figures = {}
    for what, pairs in times.items():
        host, wall = zip(*pairs[WARM_UPS:], strict=True)
        figures[f'{what}_ms'] = _ms(statistics.median(wall))
        figures[f'{what}_host_ms'] = _ms(statistics.median(host))
    return figures


def kernels(name, size, dtype, train, device, how=None, most=60):
    """Time by kernel, and how long any of them is running.

    Returns:
        dict: ``wall_ms`` of a call without the profiler, ``busy_ms`` and the
        number of ``launches`` with it, and of the ``most`` longest kernels
        the name, the milliseconds and the launches.
    """
    run = prepare(name, size, dtype, train, device, how)
    wall = timed(run, device)
    on_gpu = device.type == 'cuda'
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        synchronize(device)
    launches, ms = Counter(), Counter()
    for event in profiler.events():
        if event.device_type == kind:
            launches[event.name[:120]] += 1
            ms[event.name[:120]] += event.time_range.elapsed_us() / 1e3
    return dict(
        wall_ms=wall['ms'],
        host_ms=wall['host_ms'],
        busy_ms=round(sum(ms.values()), 3),
        launches=sum(launches.values()),
        kernels=[
            (kernel, round(time, 3), launches[kernel])
            for kernel, time in ms.most_common(most)
        ],
    )


def passes(run, operands, grad, device):
    """Milliseconds of an operator, and of the gradient of each operand.

    Args:
        run (callable): The operator, without arguments.
        operands (dict): By name, what needs a gradient.
        grad (Tensor): Of the output.
    """
    with torch.no_grad():
        figures = dict(forward=kernel_ms(run, device))
    out = run()
    grad = grad.to(out.dtype)
    for name, operand in operands.items():
        figures[name] = kernel_ms(
            partial(
                torch.autograd.grad, out, operand, grad, retain_graph=True
            ),
            device,
        )
    return figures


def depthwise(shape, size, layout, dtype, device, backend=None):
    """A depthwise convolution in a layout; PyTorch's if there is no backend.

    With a backend, 3 x 3 kernels have what the network has: a bias, and the
    input is added.
    """
    channels, dtype = shape[1], DTYPES[dtype]
    x, grad = (draw(shape, device, dtype, LAYOUTS[layout]) for _ in range(2))
    weight = torch.randn(channels, 1, size, size, device=device, dtype=dtype)
    bias = None
    operands = dict(input_gradient=x, weight_gradient=weight)
    if backend is None:
        run = partial(F.conv2d, x, weight, padding=size // 2, groups=channels)
    else:
        if size == 3:
            bias = torch.zeros(channels, device=device, dtype=dtype)
            operands['all_gradients'] = x, weight, bias
        run = partial(
            depthwise_conv2d,
            x,
            weight,
            bias,
            residual=size == 3,
            backend=backend,
        )
    for operand in (x, weight, bias):
        if operand is not None:
            operand.requires_grad_()
    return dict(passes(run, operands, grad, device), map_mb=x.nbytes / MB)


def branches(shape, size, dtype, device, backend):
    """A step of a large convolution and its companions in training mode."""
    module = DilatedReparamConv(
        shape[1], size, dict(type='BN'), backend=backend
    ).to(device)
    x = draw(shape, device, DTYPES[dtype]).requires_grad_()
    grad = draw(shape, device)
    operands = [x, *module.parameters()]

    def ahead():
        with autocast(dtype, device):
            return module(x)

    def step():
        out = ahead()
        torch.autograd.grad(out, operands, grad.to(out.dtype))

    figures = passes(ahead, dict(backward=operands), grad, device)
    return dict(figures, mb=peak(step, device))


def branches_error(shape, size, dtype, device):
    """Errors of the kernels against float64, relative to the norm."""
    modules = []
    for backend in DEPTHWISE_BACKENDS:
        torch.manual_seed(0)
        modules.append(
            DilatedReparamConv(
                shape[1], size, dict(type='BN'), backend=backend
            ).to(device)
        )
    x = draw(shape, device, DTYPES[dtype])
    grad = draw(shape, device, DTYPES[dtype])
    results = []
    for module, kind in zip(modules, (x.dtype, torch.float64), strict=True):
        if kind == torch.float64:
            module.double()
        inputs = x.to(kind).requires_grad_()
        out = module(inputs)
        operands = [inputs, *module.parameters()]
        grads = torch.autograd.grad(out, operands, grad.to(out.dtype))
        results.append((out, *grads))
    errors = _errors(*results)
    return dict(
        output=errors[0], input_gradient=errors[1], largest=max(errors)
    )


def _errors(actual, expected):
    return [
        ((a.double() - e).norm() / e.norm().clamp(min=1e-30)).item()
        for a, e in zip(actual, expected, strict=True)
    ]


def contmix_operands(shape, dtype, device):
    """Operands as under autocast, where maps are in another dtype."""
    batch, height, width, groups, size = shape
    total = groups * 16  # channels of the query
    taps = 25 + size**2
    operands = [
        draw((batch, total, height, width), device, dtype) / 4,
        draw((batch, total, 7, 7), device, dtype),
        draw((batch, 2 * total, height, width), device, dtype),
        0.1 * torch.randn(taps, 49, device=device),
        torch.randn(taps, device=device),
        torch.randn(groups, 9, 9, device=device),
        torch.randn(groups, 2 * size - 1, 2 * size - 1, device=device),
    ]
    return [operand.requires_grad_() for operand in operands]


def mix(operands, backend):
    *rest, small, large = operands
    return contmix(*rest, (small, large), backend)


def contmix_row(shape, dtype, backend, device):
    """ContMix forward and backward."""
    operands = contmix_operands(shape, DTYPES[dtype], device)
    grad = torch.randn_like(operands[2])
    run = partial(mix, operands, backend)
    figures = passes(run, dict(backward=operands), grad, device)

    def step():
        torch.autograd.grad(run(), operands, grad)

    return dict(figures, mb=peak(step, device))


def contmix_error(shape, dtype, device):
    """Errors of the kernels against float64, relative to the norm."""
    operands = contmix_operands(shape, DTYPES[dtype], device)
    exact = [x.detach().double().requires_grad_() for x in operands]
    grad = torch.randn_like(operands[2])
    results = []
    for backend, inputs in (
        (CONTMIX_BACKENDS[0], operands),
        ('reference', exact),
    ):
        out = mix(inputs, backend)
        grads = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        results.append((out, *grads))
    errors = _errors(*results)
    return dict(output=errors[0], largest=max(errors))


def trained(name, backbone, device, iterations=40, options=()):
    """Iterations of ``tools/train.py --amp`` on drawn images.

    Args:
        name (str): A key of ``MODELS``.
        backbone (str): 't' or 'Swin-T'.
        device (torch.device): Where the tool trains.
        iterations (int): Defaults to 40.
        options (Sequence[str]): For ``--cfg-options``. Defaults to none.

    Returns:
        dict: ``ms`` of an iteration, the first ``loss`` and the last one,
        whether all are ``finite``, and ``mb``, the peak of memory.

    Raises:
        RuntimeError: If a tool fails; with the end of its output.
    """
    package, config, (layout, folder, size), heads = MODELS[name]
    importlib.import_module(package)
    from mmoverlock.curves import read_scalars

    model = dict(backbone=dict(init_cfg=None))
    if backbone == 'Swin-T':
        model = dict(heads, backbone=SWIN)
    settings = dict(
        model=model,
        train_cfg=dict(
            _delete_=True,
            type='IterBasedTrainLoop',
            max_iters=iterations,
        ),
        val_cfg=None,
        val_dataloader=None,
        val_evaluator=None,
        param_scheduler=[],
        default_hooks=dict(
            logger=dict(interval=1),
            checkpoint=dict(interval=-1, save_last=False, save_best=None),
        ),
    )
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, 'config.py')
        lines = [f'_base_ = {str(ROOT / "configs" / config)!r}']
        lines += [f'{key} = {value!r}' for key, value in settings.items()]
        file.write_text('\n'.join(lines))
        _run_tool(
            work,
            'make_sample_data',
            *(layout, folder, '--images', '16', '--size', size),
        )
        arguments = [file, '--amp', '--seed', '0', '--work-dir', 'out']
        if options:
            arguments += ['--cfg-options', *options]
        _run_tool(work, 'train', *arguments)
        records, _ = read_scalars(Path(work, 'out'))
    losses = [record['loss'] for record in records]
    later = records[len(records) // 2 :]
    return dict(
        ms=_ms(statistics.median(record['time'] for record in later)),
        loss=[losses[0], losses[-1]],
        finite=all(map(math.isfinite, losses)),
        mb=max(record.get('memory', 0) for record in records),
    )


def _run_tool(folder, name, *arguments):
    process = subprocess.run(
        [sys.executable, ROOT / 'tools' / f'{name}.py', *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f'tools/{name}.py: {process.stdout[-800:]}')


def compile_block(stage, size, dtype, device, arch='t'):
    """Run the last block of a stage, in training and fused, on few images."""
    model = OverLoCK(arch)
    block = getattr(model, stage)[-1].to(device)
    batch, *sides = size
    maps = [min(batch, 16), 0, *(side // STRIDES[stage] for side in sides)]
    widths = getattr(block, 'splits', None) or [
        model.channels[int(stage[-1]) - 1]
    ]
    maps[1] = sum(widths)
    inputs = [draw(maps, device).requires_grad_()]
    if len(widths) > 1:
        maps[1] = widths[-1]
        inputs.append(draw(maps, device))
    with autocast(dtype, device):
        block(*inputs).float().square().mean().backward()
        with torch.inference_mode():
            fuse(block)(*inputs)
    synchronize(device)


def compile_jobs(device):
    """Functions that compile the network's kernels at the rows' shapes."""
    kinds = [
        ('128 x 224 x 224', 'bf16'),
        ('2 x 800 x 1344', 'bf16'),
        ('128 x 224 x 224', 'fp32'),
        ('128 x 224 x 224', 'fp16'),
    ]
    return {
        f'{stage}, {size}, {dtype}': partial(
            compile_block, stage, SIZES[size], dtype, device
        )
        for size, dtype in kinds
        for stage in STRIDES
    }


def rows(device):
    """All rows, the most important first.

    Args:
        device (torch.device): Of the GPU.

    Returns:
        dict: By name, a function without arguments that returns figures in a
        dict, and its limit in seconds; in place of the function, there may be
        a dict of such.
    """
    table = {}

    def add(title, limit, run, *args, **kwargs):
        table[title] = partial(run, *args, **kwargs, device=device), limit

    def add_network(
        name, size, dtype='bf16', train=True, how=None, run=network
    ):
        title = (
            f'{name}, {size}, {dtype}, {"training" if train else "inference"}'
            f'{f", {how}" if how else ""}'
            f'{", by kernel" if run is kernels else ""}'
        )
        limit = 240 if how == 'compiled' else 60
        add(
            title,
            limit,
            run,
            name,
            SIZES[size],
            dtype,
            train,
            how=how,
        )

    add('machine', 60, machine)
    add('copy', 30, copy)
    for dtype in DTYPES:
        add(f'matrix product, {dtype}', 30, matmul, dtype)
    add('matrix product, TF32', 30, matmul, 'fp32', tf32=True)
    table['kernels compiled'] = compile_jobs(device), 240

    small, large = SIZES
    kinds = (small, True), (small, False), (large, True)
    for size, train in kinds:
        for name in ('t', 'ConvNeXt-T'):
            add_network(name, size, train=train)
    for size, train in kinds:
        add_network('t', size, train=train, how='CUDA graphs')
    for size, train in kinds:
        add_network('t', size, train=train, how='no tapes')
    for size, train in kinds:
        add_network('t', size, train=train, run=kernels)
    for batch in (32, 128):
        title = f't, {batch} x 224 x 224, bf16, forward and backward apart'
        add(title, 60, halves, 't', batch)
    for size, train in kinds:
        for name in ('t', 'ConvNeXt-T'):
            add_network(name, size, train=train, how='compiled')
    for name in ('t', 'ConvNeXt-T'):
        add_network(name, large, train=False)
        for dtype in ('fp32', 'fp16'):
            for size, train in kinds:
                add_network(name, size, dtype, train)
    for name in ('Swin-T', 'ResNet-50'):
        for size, train in (*kinds, (large, False)):
            add_network(name, size, train=train)
    add_network('ConvNeXt-T', small, run=kernels)

    for shape in SMALL_MAPS:
        for layout in LAYOUTS:
            for dtype in DTYPES:
                title = f'3 x 3, {shape}, {layout}, {dtype}'
                for backend in (None, 'auto'):
                    add(
                        f'{title}, {"ours" if backend else "PyTorch"}',
                        30,
                        depthwise,
                        shape,
                        3,
                        layout,
                        dtype,
                        backend=backend,
                    )
    for dtype in DTYPES:
        for size, shapes in DEPTHWISE_MAPS.items():
            for shape in shapes:
                title = f'{size} x {size}, {shape}, {dtype}'
                add(
                    f'{title}, errors',
                    60,
                    branches_error,
                    (4, *shape[1:]),
                    size,
                    dtype,
                )
                for backend in DEPTHWISE_BACKENDS:
                    add(
                        f'{title}, branches, {backend}',
                        60,
                        branches,
                        shape,
                        size,
                        dtype,
                        backend=backend,
                    )
                for backend in (None, 'triton'):
                    add(
                        f'{title}, {backend or "PyTorch"}',
                        60,
                        depthwise,
                        shape,
                        size,
                        'channels_last',
                        dtype,
                        backend=backend,
                    )
        for shape in CONTMIX_MAPS:
            title = f'ContMix, {shape}, {dtype}'
            add(f'{title}, errors', 60, contmix_error, (4, *shape[1:]), dtype)
            for backend in CONTMIX_BACKENDS:
                add(
                    f'{title}, {backend}',
                    60,
                    contmix_row,
                    shape,
                    dtype,
                    backend,
                )
    for name in MODELS:
        for backbone in ('t', 'Swin-T'):
            title = f'{name}, {backbone}, tools/train.py --amp'
            add(title, 240, trained, name, backbone)
    return table
