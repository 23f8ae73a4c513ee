"""Measure a GPU: ``python -m benchmarks.gpu``.

First the kernels are compared with the definition; if they are wrong, nothing
is measured. Then come the rates of the device itself, the operators, with
their share of the bound that these rates set, and whole networks. Times are
medians of single calls, with the shortest and the longest; memory is the peak
above what the operands or the network take. ``--out`` keeps all figures as
JSON.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from mmoverlock.models import OverLoCK
from mmoverlock.ops import contmix

WARM_UPS = 3
REPEATS = 20
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
BACKENDS = 'triton', 'tiled', 'reference'
# Largest errors, relative to the largest number.
TOLERANCES = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def seconds(run, device):
    """Median, minimum and maximum of the time that a call takes."""
    on_gpu = device.type == 'cuda'
    for _ in range(WARM_UPS):
        run()
    times = []
    for _ in range(REPEATS):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return dict(
        seconds=statistics.median(times), least=min(times), most=max(times)
    )


def seconds_on_device(run, device):
    """The same without the time that Python takes to launch kernels."""
    if device.type != 'cuda':
        return seconds(run, device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return dict(
        seconds=statistics.median(times), least=min(times), most=max(times)
    )


def peak(run, device):
    """Bytes that a call takes at most, beside what is there already."""
    if device.type != 'cuda':
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy(device, size=2**30):
    """Bytes a second of a copy, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    result = seconds_on_device(lambda: target.copy_(source), device)
    return {**result, 'rate': 2 * size / result['seconds']}


def matmul(device, dtype, tf32=False, size=8192):
    """Operations a second of a matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        result = seconds(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {**result, 'rate': 2 * size**3 / result['seconds']}


def contmix_operands(
    device,
    dtype,
    batch,
    height,
    width,
    groups=8,
    channels=16,
    kernel_size=13,
):
    """Operands as in sub_blocks3 of t, under autocast for other dtypes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0, dtype=torch.float32):
        numbers = scale * torch.randn(shape, generator=generator)
        return numbers.to(device, dtype).requires_grad_()

    taps = 25 + kernel_size**2
    return [
        draw(batch, groups * channels, height, width, scale=0.5, dtype=dtype),
        draw(batch, groups * channels, 7, 7, dtype=dtype),
        draw(batch, 2 * groups * channels, height, width, dtype=dtype),
        draw(taps, 49, scale=0.1),
        draw(taps),
        draw(groups, 9, 9),
        draw(groups, 2 * kernel_size - 1, 2 * kernel_size - 1),
    ]


def call_contmix(operands, backend):
    *rest, small, large = operands
    return contmix(*rest, (small, large), backend)


def contmix_error(device, dtype, **shape):
    """Largest error of the output or a gradient, relative to its largest
    number, of the kernels against the definition in double precision.
    """
    operands = contmix_operands(device, dtype, **shape)
    exact = [x.detach().double().requires_grad_() for x in operands]
    results = []
    for backend, inputs in (('reference', exact), ('triton', operands)):
        out = call_contmix(inputs, backend)
        grad = torch.linspace(-1, 1, out.numel(), device=device)
        grad = grad.view(out.shape).to(dtype).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    return max(
        ((actual.double() - expected).abs().amax() / expected.abs().amax())
        for expected, actual in zip(*results, strict=True)
    ).item()


def contmix_row(device, dtype, backend, backward, **shape):
    """Forward alone, without gradients, or forward and backward."""
    operands = contmix_operands(device, dtype, **shape)
    query, _, value, _, bias, small, _ = operands
    grad = torch.randn_like(value)

    def run():
        with torch.set_grad_enabled(backward):
            out = call_contmix(operands, backend)
            if backward:
                torch.autograd.grad(out, operands, grad)

    figures = seconds(run, device)
    figures['peak'] = peak(run, device)
    if backend == 'triton':
        figures['device'] = seconds_on_device(run, device)['seconds']
        # Every map read or written once: query, value and output; and all
        # that again, with the three gradients, for the backward pass. Two
        # products forward and five backward.
        maps = query.nbytes + 2 * value.nbytes
        products = 7 if backward else 2
        positions = query.shape[0] * query.shape[2:].numel()
        pairs = positions * len(small) * len(bias)
        channels = query.shape[1] // len(small)
        figures['bytes'] = maps * (3 if backward else 1)
        figures['operations'] = 2 * pairs * channels * products
    return figures


def network_row(device, dtype, backend, train, batch, size, arch='t'):
    """Forward and backward in training mode, or inference, of a backbone."""
    model = OverLoCK(
        arch,
        contmix_backend=backend,
        depthwise_backend='triton' if backend == 'triton' else 'auto',
    )
    model.to(device).train(train)
    images = torch.randn(batch, 3, *size, device=device)

    def run():
        with (
            torch.set_grad_enabled(train),
            torch.autocast(device.type, dtype, dtype != torch.float32),
        ):
            maps = model(images)
        if train:
            sum(x.float().mean() for x in maps).backward()
            model.zero_grad()

    return {**seconds(run, device), 'peak': peak(run, device)}


CHECKS = {
    f'ContMix, {batch} x {height} x {width}, {name}': (
        dtype,
        dict(batch=batch, height=height, width=width),
    )
    for name, dtype in (*DTYPES.items(), ('fp16', torch.float16))
    for batch, height, width in ((2, 14, 14), (1, 13, 61), (1, 50, 84))
}
DEVICE_ROWS = {
    'copy': copy,
    'matrix product, bf16': partial(matmul, dtype=torch.bfloat16),
    'matrix product, fp32': partial(matmul, dtype=torch.float32),
    'matrix product, TF32': partial(matmul, dtype=torch.float32, tf32=True),
}
CONTMIX_ROWS = {
    f'ContMix, {batch} x {height} x {width}, {name}, {what}, {backend}': (
        partial(
            contmix_row,
            dtype=dtype,
            backend=backend,
            backward=backward,
            batch=batch,
            height=height,
            width=width,
        )
    )
    for batch, height, width in ((128, 14, 14), (2, 50, 84), (1, 100, 168))
    for name, dtype in DTYPES.items()
    for what, backward in (('forward', False), ('with backward', True))
    for backend in BACKENDS
}
NETWORK_ROWS = {
    f't, {batch} x {size[0]} x {size[1]}, {name}, {what}, {backend}': partial(
        network_row,
        dtype=dtype,
        backend=backend,
        train=train,
        batch=batch,
        size=size,
    )
    for batch, size in ((128, (224, 224)), (2, (800, 1344)))
    for name, dtype in DTYPES.items()
    for what, train in (('inference', False), ('training', True))
    for backend in BACKENDS
}


def rows(device):
    """All rows by name: functions of a device that return figures."""
    from . import gpu_depthwise  # which needs triton

    depthwise = {
        name: lambda _, run=run: run()
        for name, run in gpu_depthwise.rows(device).items()
    }
    return {**DEVICE_ROWS, **CONTMIX_ROWS, **depthwise, **NETWORK_ROWS}


def bound(figures, results, name):
    """Seconds that the device's own rates allow for."""
    product = 'matrix product, ' + ('bf16' if 'bf16' in name else 'fp32')
    return max(
        figures['bytes'] / results['copy']['rate'],
        figures['operations'] / results[product]['rate'],
    )


def describe(name, results):
    """A line of the table."""
    figures = results[name]
    if 'failed' in figures:
        return f'{name:55} {figures["failed"]}'
    if 'torch' in figures:
        return describe_depthwise(name, figures)
    text = (
        f'{name:55} {figures["seconds"] * 1e3:9.3f} ms '
        f'({figures["least"] * 1e3:.3f} to {figures["most"] * 1e3:.3f})'
    )
    if 'rate' in figures:
        unit = 'TB/s' if name == 'copy' else 'TFLOP/s'
        text += f'  {figures["rate"] / 1e12:.2f} {unit}'
    if 'peak' in figures:
        text += f'  {figures["peak"] / 2**20:.0f} MB'
    if 'device' in figures:
        share = bound(figures, results, name) / figures['device']
        text += (
            f'  on the device {figures["device"] * 1e3:.3f} ms, '
            f'{share:.0%} of the bound'
        )
    return text


def describe_depthwise(name, figures):
    """A line of the table, of a row of gpu_depthwise.py."""
    text = (
        f'{name:55} {figures["triton"] * 1e3:9.3f} ms, '
        f'PyTorch {figures["torch"] * 1e3:.3f} ms'
    )
    if 'share' in figures:
        return f'{text}, {figures["share"]:.0%} of the bound'
    return (
        f'{text}, {figures["triton_bytes"] / 2**20:.0f} MB, '
        f'PyTorch {figures["torch_bytes"] / 2**20:.0f} MB'
    )


def check(device):
    """Whether all kernels are right; prints their errors."""
    right = True
    for name, (dtype, shape) in CHECKS.items():
        error = contmix_error(device, dtype, **shape)
        good = error <= TOLERANCES[dtype]  # not with NaN
        right &= good
        print(f'{name:55} error {error:.1e} {"" if good else "WRONG"}')
    return right


def measure(run, device):
    try:
        return run(device)
    except torch.OutOfMemoryError:
        return dict(failed='out of memory')
    finally:
        if device.type == 'cuda':
            torch.cuda.empty_cache()


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rows',
        nargs='+',
        metavar='TEXT',
        default=[''],
        help='rows whose names contain any of these; default: all. The '
        "device's own are always measured",
    )
    parser.add_argument('--out', type=Path, help='JSON file to write')
    return parser


def main(args=None):
    args = build_parser().parse_args(args)
    if not torch.cuda.is_available():
        print('benchmarks.gpu needs a GPU that torch sees', file=sys.stderr)
        return 2
    import triton

    device = torch.device('cuda')
    print(
        f'{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, '
        f'Triton {triton.__version__}'
    )
    if not check(device):
        return 1
    results = {}
    for name, run in rows(device).items():
        if name in DEVICE_ROWS or any(text in name for text in args.rows):
            results[name] = measure(run, device)
            print(describe(name, results), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == '__main__':
    sys.exit(main())
