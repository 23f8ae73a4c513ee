"""Large depthwise convolutions on a GPU: PyTorch's and the Triton kernels.

``rows(device)`` gives the rows of the table: functions that return figures
by name. Seconds are medians and have the time in them that a call takes on
the CPU where that is longer. The bound of a convolution is the larger one of
the times that its multiply-adds and its memory traffic take at the rates in
``PEAKS``, the data sheet's of an H100 SXM.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
import triton

from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.ops import depthwise_conv2d

PEAKS = dict(macs=33.5e12, bytes=3.35e12)  # a second, in single precision
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
LAYOUTS = {
    'NCHW': torch.contiguous_format,
    'channels_last': torch.channels_last,
}
# Kernel size: the map of t, (B, C, H, W), in detection and classification.
DETECTION = {
    17: (2, 64, 200, 336),
    15: (2, 128, 100, 168),
    13: (2, 256, 50, 84),
    7: (2, 512, 25, 42),
}
CLASSIFICATION = {
    17: (128, 64, 56, 56),
    15: (128, 128, 28, 28),
    13: (128, 256, 14, 14),
    7: (128, 512, 7, 7),
}
# The sizes between, which the network does not have, on maps that it has.
BETWEEN = {11: (2, 256, 50, 84), 9: (2, 512, 25, 42)}
STEPS = ('forward', 'input gradient', 'weight gradient')


def median_seconds(run, device):
    """Median time of a call, with a cold cache on a GPU."""
    if torch.device(device).type == 'cuda':
        return triton.testing.do_bench(run, return_mode='median') / 1e3
    start = time.perf_counter()  # only to see that it runs
    run()
    return time.perf_counter() - start


def peak_bytes(run, device):
    """Memory that a call takes beyond what is there, or None on a CPU."""
    if torch.device(device).type != 'cuda':
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def convolution(shape, size, layout, dtype, step, device):
    """One step of a convolution: PyTorch against Triton.

    Args:
        shape (tuple): (B, C, H, W).
        size (int): Of the kernel.
        layout (str): A key of ``LAYOUTS``.
        dtype (str): A key of ``DTYPES``.
        step (str): One of ``STEPS``.
        device (str): Such as 'cuda'.

    Returns:
        dict: Seconds of ``torch`` and ``triton``, and the ``share`` that the
        bound is of the latter.
    """
    x = torch.randn(shape, device=device, dtype=DTYPES[dtype])
    x = x.contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(shape[1], 1, size, size, device=device, dtype=x.dtype)
    grad = torch.randn_like(x)
    operand = {'input gradient': x, 'weight gradient': weight}.get(step)
    if operand is not None:
        operand.requires_grad_()
    runs = dict(
        torch=partial(F.conv2d, padding=size // 2, groups=shape[1]),
        triton=partial(depthwise_conv2d, backend='triton'),
    )
    result = {}
    for name, convolve in runs.items():
        run = partial(convolve, x, weight)
        if operand is not None:
            run = partial(
                torch.autograd.grad, run(), operand, grad, retain_graph=True
            )
        result[name] = median_seconds(run, device)
    bound = max(
        x.numel() * size**2 / PEAKS['macs'],
        2 * x.numel() * x.element_size() / PEAKS['bytes'],
    )
    return dict(result, share=bound / result['triton'])


def branches(shape, size, layout, dtype, device):
    """A training step of a large convolution with its companions.

    Args:
        shape (tuple): (B, C, H, W).
        size (int): Of the large kernel.
        layout (str): A key of ``LAYOUTS``.
        dtype (str): A key of ``DTYPES``; of autocast unless 'fp32'.
        device (str): Such as 'cuda'.

    Returns:
        dict: Seconds of ``torch`` (plain modules) and ``triton``, and the
        memory that forward and backward take beyond the input, in bytes,
        ``torch_bytes`` and ``triton_bytes``; these are None on a CPU.
    """
    x = torch.randn(shape, device=device)
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    autocast = torch.autocast(
        torch.device(device).type, DTYPES[dtype], enabled=dtype != 'fp32'
    )
    result = {}
    for name, backend in (('torch', 'auto'), ('triton', 'triton')):
        module = DilatedReparamConv(
            shape[1], size, dict(type='BN'), backend=backend
        ).to(device)

        def step(module=module):
            with autocast:
                out = module(x)
            operands = [x, *module.parameters()]
            torch.autograd.grad(out, operands, torch.ones_like(out))

        result[name] = median_seconds(step, device)
        result[f'{name}_bytes'] = peak_bytes(step, device)
    return result


def rows(device):
    """All rows, by name.

    Args:
        device (str): Such as 'cuda'.

    Returns:
        dict: Functions without arguments that return figures, see
        :func:`convolution` and :func:`branches`.
    """
    table = {}
    cases = [
        (size, shape)
        for maps in (DETECTION, CLASSIFICATION, BETWEEN)
        for size, shape in maps.items()
    ]
    for size, shape in cases:
        for layout in LAYOUTS:
            for dtype in DTYPES:
                title = f'{size} x {size}, {shape}, {layout}, {dtype}'
                for step in STEPS:
                    table[f'{title}, {step}'] = partial(
                        convolution, shape, size, layout, dtype, step, device
                    )
                table[f'{title}, branches'] = partial(
                    branches, shape, size, layout, dtype, device
                )
    return table
