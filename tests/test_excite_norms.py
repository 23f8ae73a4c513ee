"""Squeeze and excitation behind batch norms, against float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, draw, exact, relative_error
from torch import nn

from mmoverlock.ops import Norm, excite_norms

kernels = pytest.importorskip(
    'mmoverlock.ops.excitation.triton', exc_type=ImportError
)
pytestmark = pytest.mark.usefixtures('poison')


def draw_norm(channels, i):
    norm = nn.BatchNorm2d(channels, 1e-3 * i, 0.1 * i).to(DEVICE)
    norm.num_batches_tracked += i
    for tensor in (*norm.parameters(), norm.running_mean):
        nn.init.normal_(tensor)
    return norm


def as_operand(norm):
    return Norm(
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        norm.momentum,
        norm.eps,
    )


def draw_operands(count, shape, dtype=torch.float32):
    torch.manual_seed(0)
    channels, hidden = shape[1], 3
    # Means that are large beside the deviations.
    maps = [draw(*shape) * 2 + 3 + i for i in range(count)]
    maps = [x.to(dtype).requires_grad_() for x in maps]
    norms = [draw_norm(channels, 1 + i) for i in range(count)]
    shapes = (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1)
    weights = [draw(*size) for size in (*shapes, (channels,))]
    return maps, norms, [weight.requires_grad_() for weight in weights]


def define(maps, norms, weights):
    x, *others = (norm(y) for norm, y in zip(norms, maps, strict=True))
    gate = 1
    if others:
        x = x + others[0]
        gate = F.silu(others[1])
    mean = x.mean((2, 3), keepdim=True)
    hidden = F.gelu(F.conv2d(mean, *weights[:2]))
    return gate * x * F.conv2d(hidden, *weights[2:]).sigmoid()


def run(backend, maps, norms, weights):
    norms = [as_operand(norm) for norm in norms]
    return excite_norms(maps, norms, *weights, backend)


def leaves(maps, norms, weights):
    return [*maps, *(p for n in norms for p in n.parameters()), *weights]


@pytest.mark.parametrize('count', [1, 3])
@pytest.mark.parametrize(
    'backend, shape, dtype, tolerance',
    [
        ('triton', (3, 70, 3, 5), torch.float32, 5e-6),  # two blocks
        ('triton', (2, 5, 33, 31), torch.float32, 5e-6),  # images in parts
        ('triton', (34, 3, 1, 2), torch.bfloat16, 1e-2),  # many images
        ('reference', (3, 7, 3, 5), torch.float32, 5e-6),
    ],
)
def test_value_gradients_and_statistics(
    backend, count, shape, dtype, tolerance
):
    operands = draw_operands(count, shape, dtype)
    maps, norms, weights = draw_operands(count, shape, dtype)
    others = [*map(exact, maps)], [n.double() for n in norms]
    others = *others, [*map(exact, weights)]
    expected = define(*others)
    out = run(backend, *operands)
    assert out.dtype == dtype
    grad = draw(*shape).to(dtype)
    grads = torch.autograd.grad(out, leaves(*operands), grad)
    expected_grads = torch.autograd.grad(
        expected, leaves(*others), grad.double()
    )
    for actual, value in zip(
        (out, *grads), (expected, *expected_grads), strict=True
    ):
        assert relative_error(actual, value) < tolerance
    for norm, other in zip(operands[1], others[1], strict=True):
        torch.testing.assert_close(
            dict(norm.named_buffers()),
            dict(other.named_buffers()),
            check_dtype=False,
        )


def test_equal_operands_give_equal_bits():
    results = []
    for _ in range(2):
        operands = draw_operands(3, (2, 5, 33, 31))
        out = run('triton', *operands)
        out.backward(torch.ones_like(out))
        buffers = [b for norm in operands[1] for b in norm.buffers()]
        results.append([*(t.grad for t in leaves(*operands)), *buffers, out])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_operators_are_registered_rightly():
    maps, norms, weights = draw_operands(3, (2, 4, 3, 5))
    maps = [kernels.channels_last(x) for x in maps]
    fields = [
        list(field) for field in zip(*map(as_operand, norms), strict=True)
    ]
    inputs = [[t.detach() for t in group] for group in (maps, *fields[:2])]
    inputs += fields[2:]
    names = torch.ops.mmoverlock
    torch.library.opcheck(names.measure_norms, inputs)
    measured = names.measure_norms(*inputs)
    torch.library.opcheck(
        names.excite_norms,
        (maps, *fields[:2], *weights, *measured),
        test_utils=(
            'test_schema',
            'test_faketensor',
            'test_aot_dispatch_dynamic',
        ),
    )


@pytest.mark.parametrize(
    'shapes', [[(2, 3, 4, 5)] * 2, [(2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 1)]]
)
def test_maps_that_cannot_be(shapes):
    maps = [torch.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match='one map or three of one shape'):
        excite_norms(maps, [], *[torch.ones(1)] * 4)
