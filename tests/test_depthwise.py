"""The depthwise convolution on CPUs, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from mmoverlock.ops import Branch, depthwise_conv2d, sum_of_branches
from mmoverlock.ops.depthwise import LARGE

NCHW, NHWC = torch.contiguous_format, torch.channels_last
SIZES = [(13, 1), (5, 1), (7, 2), (3, 4), (9, 2)]


def draw(shape, size, dtype=torch.float64):
    """A map, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (shape[1], 1, size, size), shape[1:2]
    return [
        torch.randn(s, generator=generator, dtype=dtype).requires_grad_()
        for s in shapes
    ]


def draw_branches(sizes, channels, dtype=torch.float64, device='cpu'):
    """Branches with their own parameters and statistics, from one seed."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return [
        Branch(
            weight=draw(channels, 1, size, size).requires_grad_(),
            scale=draw(channels).requires_grad_(),
            shift=draw(channels).requires_grad_(),
            running_mean=draw(channels),
            running_var=draw(channels).exp(),
            batches=torch.ones((), dtype=torch.int64, device=device),
            dilation=dilation,
            momentum=0.1 + 0.1 * i,
            eps=1e-5 * (1 + i),
        )
        for i, (size, dilation) in enumerate(sizes)
    ]


def parameters_of(branches):
    return [p for b in branches for p in (b.weight, b.scale, b.shift)]


def statistics_of(branches):
    return [s for b in branches for s in (b.running_mean, b.running_var)]


def plain_conv2d(x, weight, bias, dilation=1):
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(x, weight, bias, 1, padding, dilation, len(weight))


def plain_sum_of_branches(x, branches):
    return sum(
        F.batch_norm(
            plain_conv2d(x, b.weight, None, b.dilation),
            b.running_mean,
            b.running_var,
            b.scale,
            b.shift,
            True,
            b.momentum,
            b.eps,
        )
        for b in branches
    )


def step(run, x, branches, grad):
    """The sum, gradients and statistics."""
    out = run(x, branches)
    operands = [x, *parameters_of(branches)]
    grads = torch.autograd.grad(out, operands, grad.to(out))
    return [out, *grads, *statistics_of(branches)]


@pytest.mark.parametrize(
    'shape, size, dilation, layout',
    [
        ((2, 3, 9, 11), 5, 1, NCHW),
        ((2, 3, 9, 11), 7, 2, NHWC),
        ((1, 2, 6, 5), 17, 1, NHWC),
        ((2, 3, 8, 9), 3, 1, NHWC),
        ((1, 1, 1, 1), 5, 1, NCHW),
        # Shapes that oneDNN is slow at
        ((2, 2, 9, 14), 13, 1, NHWC),
        ((2, 3, 15, 13), 9, 2, NCHW),
        ((1, 2, 17, 20), 3, 7, NHWC),
        # Weight gradients by bands, of a height that they do not divide
        ((2, 3, LARGE + 5, 6), 5, 1, NHWC),
        ((1, 2, LARGE, 9), 7, 2, NCHW),
    ],
)
@pytest.mark.parametrize('residual', [False, True])
def test_conv2d(shape, size, dilation, layout, residual):
    """With the residual, there is no bias."""
    x, weight, bias = operands = draw(shape, size)
    if residual:
        bias = operands[2] = None
    x = x.contiguous(memory_format=layout)
    out = depthwise_conv2d(x, weight, bias, dilation, residual)
    expected = plain_conv2d(x, weight, bias, dilation)
    if residual:
        expected = x + expected
    grad = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
    operands = [t for t in operands if t is not None]
    torch.testing.assert_close(
        *(
            [result, *torch.autograd.grad(result, operands, grad)]
            for result in (out, expected)
        )
    )


@pytest.mark.parametrize('shape', [(2, 3, 9, 14), (3, 2, 7, 7), (1, 1, 66, 5)])
def test_sum_of_branches(shape):
    """Value, gradients and statistics are those of the plain form."""
    x = draw(shape, 3)[0]
    torch.testing.assert_close(
        *(
            step(run, x, draw_branches(SIZES, shape[1]), x.detach().sin())
            for run in (sum_of_branches, plain_sum_of_branches)
        )
    )


def test_gradcheck():
    x, weight, bias = draw((1, 2, 6, 7), 5)
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight, bias, 2))
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight))


@pytest.mark.parametrize('count', [0, len(SIZES)])
def test_autocast(count):
    """Gradients have the dtype of what they belong to."""
    operands = draw((2, 4, 8, 8), 5, torch.float32)
    run = depthwise_conv2d
    if count:
        branches = draw_branches(SIZES, 4, torch.float32)
        operands = [operands[0], *parameters_of(branches)]

        def run(x, *_):
            return sum_of_branches(x, branches)

    expected = run(*operands)
    with torch.autocast('cpu', torch.bfloat16):
        out = run(*operands)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
    out.float().square().mean().backward()
    for operand in operands:
        assert operand.grad.dtype == torch.float32
        assert operand.grad.isfinite().all()


@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('enabled', [False, True])
def test_few_channels_in_16_bits(enabled, backend, monkeypatch):
    """oneDNN gets them in single precision; in 16 bits it never returned."""
    x, weight, bias = draw((1, 16, 3, 40), 15, torch.bfloat16)
    convolve = F.conv2d

    def check(x, *args):
        assert x.dtype == torch.float32
        assert not torch.is_autocast_enabled('cpu')
        return convolve(x, *args)

    expected = convolve(
        x.double(), weight.double(), bias.double(), 1, 7, 1, 16
    )
    monkeypatch.setattr(F, 'conv2d', check)
    with torch.no_grad(), torch.autocast('cpu', enabled=enabled):
        out = depthwise_conv2d(x, weight, bias, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.05)
