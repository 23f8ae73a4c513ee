"""The depthwise convolution against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from mmoverlock.ops import Branch, depthwise_conv2d, sum_of_branches
from mmoverlock.ops.depthwise import LARGE

CASES = [
    # (batch, channels, height, width), kernel size, dilation
    ((2, 3, 9, 11), 5, 1),
    ((2, 3, 9, 11), 7, 2),
    ((1, 2, 6, 5), 17, 1),
    ((2, 2, 7, 7), 9, 2),
    ((2, 3, 8, 9), 3, 7),
    ((2, 3, 8, 9), 3, 1),
    ((1, 1, 1, 1), 5, 1),
    # What oneDNN is slow at.
    ((2, 2, 9, 14), 13, 1),
    ((2, 3, 15, 13), 9, 2),
    ((1, 2, 17, 20), 3, 7),
    # Weight gradients by bands, of a height that they do not divide.
    ((2, 1, LARGE + 5, 6), 5, 1),
    ((1, 2, LARGE, 9), 7, 2),
]


def draw(shape, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (shape[1], 1, size, size), shape[1:2]
    return [
        torch.randn(s, generator=generator, dtype=dtype).requires_grad_()
        for s in shapes
    ]


@pytest.mark.parametrize('shape, size, dilation', CASES)
@pytest.mark.parametrize(
    'layout', [torch.contiguous_format, torch.channels_last]
)
def test_agrees_with_conv2d(shape, size, dilation, layout):
    operands = draw(shape, size)
    x = operands[0].contiguous(memory_format=layout)
    results = [
        run(x, *operands[1:], dilation=dilation)
        for run in (depthwise_conv2d, plain_conv2d)
    ]
    cotangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(shape)
    for actual, expected in zip(
        *(
            [out, *torch.autograd.grad(out, operands, cotangent)]
            for out in results
        ),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('size, dilation', [(3, 1), (5, 1), (3, 2)])
def test_residual(size, dilation):
    operands = draw((2, 3, 6, 7), size)
    results = [
        depthwise_conv2d(*operands, dilation=dilation, residual=True),
        operands[0] + depthwise_conv2d(*operands, dilation=dilation),
    ]
    for actual, expected in zip(
        *(
            [out, *torch.autograd.grad(out.sin().sum(), operands)]
            for out in results
        ),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


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


def plain_conv2d(x, weight, bias, dilation):
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


SIZES = [(13, 1), (5, 1), (7, 2), (3, 4), (9, 2)]


@pytest.mark.parametrize('shape', [(2, 3, 9, 14), (3, 2, 7, 7), (1, 1, 66, 5)])
def test_sum_of_branches(shape):
    """Value, gradients and statistics are those of the plain form."""
    x = draw(shape, 3)[0]
    results = []
    for run in (sum_of_branches, plain_sum_of_branches):
        branches = draw_branches(SIZES, shape[1])
        out = run(x, branches)
        parameters = [p for b in branches for p in b[:3]]
        cotangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(shape)
        results.append(
            [
                out,
                *torch.autograd.grad(out, [x, *parameters], cotangent),
                *(s for b in branches for s in b[3:5]),
            ]
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_sum_of_branches_under_autocast():
    x = draw((2, 4, 8, 8), 3, torch.float32)[0]
    branches = draw_branches(SIZES, 4, torch.float32)
    expected = sum_of_branches(x, branches)
    with torch.autocast('cpu', torch.bfloat16):
        out = sum_of_branches(x, branches)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
    out.float().square().mean().backward()
    for tensor in (x, *(p for b in branches for p in b[:3])):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all()


def test_gradcheck():
    x, weight, bias = draw((1, 2, 6, 7), 5)
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight, bias, 2))
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight))


def test_autocast():
    """Gradients have the dtype of what they belong to."""
    operands = draw((1, 4, 8, 8), 5, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = depthwise_conv2d(*operands)
    assert out.dtype == torch.bfloat16
    expected = depthwise_conv2d(*operands)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.float().square().mean().backward()
    for operand in operands:
        assert operand.grad.dtype == torch.float32
        assert operand.grad.isfinite().all()
