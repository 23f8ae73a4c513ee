"""The depthwise convolution against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from mmoverlock.ops import depthwise_conv2d

CASES = [
    # (batch, channels, height, width), kernel size, dilation
    ((2, 3, 9, 11), 5, 1),
    ((2, 3, 9, 11), 7, 2),
    ((1, 2, 6, 5), 17, 1),
    ((2, 2, 7, 7), 9, 2),
    ((2, 3, 8, 9), 3, 7),
    ((2, 3, 8, 9), 3, 1),
    ((1, 1, 1, 1), 5, 1),
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
    padding = size // 2 * dilation
    results = [
        depthwise_conv2d(x, *operands[1:], dilation=dilation),
        F.conv2d(x, *operands[1:], 1, padding, dilation, shape[1]),
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
