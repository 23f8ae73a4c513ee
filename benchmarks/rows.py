"""The rows of benchmarks/run.py: functions that measure this machine.

Each runs in a process of its own, so that its peak of memory is its own.
Seconds are medians of some runs, with the shortest and the longest.
"""

import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch.profiler import ProfilerActivity, profile

from mmoverlock.allocator import keep_freed_memory
from mmoverlock.models import OverLoCK
from mmoverlock.models.fuse import fuse
from mmoverlock.ops import contmix, depthwise_conv2d
from mmoverlock.ops.dynamic_conv.tiled import _chunks, _plan, _Tiles

keep_freed_memory()  # as the tools do

CONFIGS = Path(__file__).parents[1] / 'configs'
DETECTOR = 'mask_rcnn/overlock_t_1x.py'
SEGMENTOR = 'upernet/overlock_t_160k.py'
# Products: neither form nor number of these calls is up to us, unless the
# network is computed differently.
PRODUCTS = (
    'aten::mkldnn_convolution',
    'aten::convolution_backward',
    'aten::mm',
    'aten::addmm',
    'aten::bmm',
    'aten::baddbmm',
)
# Multiply-adds of an image of 224 x 224 pixels, from the papers.
GMACS = {'t': 5.5, 'xt': 2.6, 'swin-t': 4.5, 'resnet-50': 4.1}


def seconds(run, repeats=7):
    """Median, minimum and maximum of the time that a call takes."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return dict(
        seconds=statistics.median(times), least=min(times), most=max(times)
    )


def products(run):
    """Seconds of a call that are spent in convolutions and matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return 1e-6 * sum(
        event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.key in PRODUCTS
    )


def peak_mb():
    """Peak of the process's memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb():
    """The process's memory now, in MB."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def sgemm():
    """The machine's own rate, in GMAC/s."""
    a, b = torch.randn(2, 2048, 2048)
    return 2.048**3 / seconds(lambda: a @ b)['least']


def build(name, **kwargs):
    """A backbone by name: an arch of OverLoCK, 'swin-t' or 'resnet-50'."""
    if name not in ('swin-t', 'resnet-50'):
        return OverLoCK(name, **kwargs)
    import mmdet.models  # noqa: F401

    init_default_scope('mmdet')
    if name == 'swin-t':
        return MODELS.build(
            dict(
                type='SwinTransformer',
                embed_dims=96,
                depths=[2, 2, 6, 2],
                num_heads=[3, 6, 12, 24],
                window_size=7,
                mlp_ratio=4,
                drop_path_rate=0.0,
            )
        )
    return MODELS.build(dict(type='ResNet', depth=50))


def inference(name, size, dtype=None, compiled=False):
    """One image of size x size, in eval mode; OverLoCK fused."""
    model = build(name)
    model.eval()  # Swin's returns nothing
    if isinstance(model, OverLoCK):
        fuse(model)
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True  # weights are constants
        model.compile(fullgraph=True)
    image = torch.randn(1, 3, size, size)
    before = resident_mb()
    with torch.no_grad(), torch.autocast('cpu', dtype, enabled=bool(dtype)):
        result = seconds(lambda: model(image))
        peak = peak_mb()
        if not compiled:
            result['products'] = products(lambda: model(image))
    gmacs = GMACS[name] * (size / 224) ** 2
    return {
        **result,
        'rate': gmacs / result['seconds'],
        'sgemm': sgemm(),
        'peak_mb': peak,
        'used_mb': peak - before,
        'pixels': size**2,
    }


def training(name, batch, size, compiled=False, **kwargs):
    """Forward and backward of a backbone in training mode."""
    model = build(name, **kwargs)
    model.train()
    if compiled:
        model.compile()
    images = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in model(images)]

    def step():
        model.zero_grad()
        torch.autograd.backward(model(images), grads)

    before = resident_mb()
    result = seconds(step, repeats=5)
    peak = peak_mb()
    if not compiled:
        result['products'] = products(step)
    gmacs = 3 * batch * GMACS[name] * (size / 224) ** 2
    return {
        **result,
        'rate': gmacs / result['seconds'],
        'sgemm': sgemm(),
        'peak_mb': peak,
        'used_mb': peak - before,
    }


def gather_sum(height, width):
    """The 13 x 13 kernels of ContMix: 8 groups of 16 channels.

    ``seconds`` and ``both`` are for sums over windows with kernels that exist,
    forward, and forward and backward. ``op`` and ``op_both`` are for the whole
    operator (both kernels, logits, softmax).
    """
    groups, channels, size = 8, 16, 13
    plan = _plan(height, width, size, torch.device('cpu'), True)
    kernels = torch.rand(1, groups, len(plan.positions), size**2)
    values = torch.randn(1, groups, height * width, channels)
    grad_sums = torch.randn_like(values)

    def gather():
        out = torch.empty_like(values)
        tiles = _Tiles(plan)
        for chunk in _chunks(values.shape, plan):
            out[chunk] = tiles.sums(kernels[chunk], values[chunk])
        return out

    def gather_backward():
        tiles = _Tiles(plan)
        for chunk in _chunks(values.shape, plan):
            tiles.grads(grad_sums[chunk], kernels[chunk], values[chunk])

    with torch.no_grad():
        result = seconds(gather)
        result['both'] = seconds(lambda: (gather(), gather_backward()))[
            'seconds'
        ]

    def maps(channels):
        draw = torch.randn(1, channels, height, width)
        draw = draw.contiguous(memory_format=torch.channels_last)
        return draw.requires_grad_()

    total = 2 * groups * channels
    operands = [
        maps(total // 2),
        torch.randn(1, total // 2, 7, 7),
        maps(total),
        (0.02 * torch.randn(25 + size**2, 49)).requires_grad_(),
        torch.zeros(25 + size**2, requires_grad=True),
    ]
    tables = [torch.zeros(groups, 2 * k - 1, 2 * k - 1) for k in (5, size)]
    grad = torch.randn(1, total, height, width)
    result['op_both'] = seconds(
        lambda: contmix(*operands, tables).backward(grad)
    )['seconds']
    with torch.no_grad():
        result['op'] = seconds(lambda: contmix(*operands, tables))['seconds']
    return result


def weight_gradient(channels, size, kernel_size):
    """Of a depthwise convolution; PyTorch's where maps are contiguous."""
    x, grad = torch.randn(2, 1, channels, size, size)
    weight = torch.randn(
        channels, 1, kernel_size, kernel_size, requires_grad=True
    )

    def backward(out, grad):
        return seconds(
            lambda: torch.autograd.grad(out, weight, grad, retain_graph=True)
        )

    plain = F.conv2d(x, weight, padding=kernel_size // 2, groups=channels)
    plain = backward(plain, grad)['seconds']
    x, grad = (
        maps.contiguous(memory_format=torch.channels_last)
        for maps in (x, grad)
    )
    return {**backward(depthwise_conv2d(x, weight), grad), 'plain': plain}


def whole_model(config, train):
    """A model of ``configs``: inference of one image of 512 x 512 pixels, or
    an iteration of training on two, without the optimizer.

    Images and annotations are random.
    """
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    size = 512, 512
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        batch = demo_mm_inputs(1, [(3, *size)], num_items=[10], with_mask=True)
        image, samples = batch['inputs'][0], batch['data_samples']
    else:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, *size))),
            metainfo=dict(img_shape=size, ori_shape=size),
        )
        samples = [sample]
    images = 1 + train  # two, for the batch norms of a head
    data = dict(inputs=[image] * images, data_samples=samples * images)
    if not train:
        fuse(model)
        with torch.no_grad():
            return seconds(lambda: model.test_step(data), repeats=5)
    model.train()

    def step():
        model.zero_grad()
        losses = model(**model.data_preprocessor(data, True), mode='loss')
        model.parse_losses(losses)[0].backward()

    return {**seconds(step, repeats=5), 'peak_mb': peak_mb()}


ROWS = {
    't, 512, inference': lambda: inference('t', 512),
    'Swin-T, 512, inference': lambda: inference('swin-t', 512),
    'ResNet-50, 512, inference': lambda: inference('resnet-50', 512),
    't, 512, inference in bf16': lambda: inference('t', 512, torch.bfloat16),
    't, 512, inference, compiled': lambda: inference('t', 512, compiled=True),
    't, 512, inference in bf16, compiled': lambda: inference(
        't', 512, torch.bfloat16, compiled=True
    ),
    't, 1024, inference': lambda: inference('t', 1024),
    't, 2048, inference': lambda: inference('t', 2048),
    't, 2 x 224, training': lambda: training('t', 2, 224),
    'Swin-T, 2 x 224, training': lambda: training('swin-t', 2, 224),
    'xt, 2 x 224, training': lambda: training('xt', 2, 224),
    't, 2 x 224, training, compiled': lambda: training(
        't', 2, 224, compiled=True
    ),
    'xt, 2 x 224, training, compiled': lambda: training(
        'xt', 2, 224, compiled=True
    ),
    't, 1 x 512, training': lambda: training('t', 1, 512),
    't, 1 x 512, training, with_cp': lambda: training(
        't', 1, 512, with_cp=True
    ),
    'Mask R-CNN, t, 2 x 512, training': lambda: whole_model(DETECTOR, True),
    'Mask R-CNN, t, 512, inference': lambda: whole_model(DETECTOR, False),
    'UperNet, t, 2 x 512, training': lambda: whole_model(SEGMENTOR, True),
    'UperNet, t, 512, inference': lambda: whole_model(SEGMENTOR, False),
    'gather-sum, 14 x 14': lambda: gather_sum(14, 14),
    'gather-sum, 32 x 32': lambda: gather_sum(32, 32),
    'gather-sum, 50 x 84': lambda: gather_sum(50, 84),
    'weight gradient, 17 x 17': lambda: weight_gradient(64, 128, 17),
}
