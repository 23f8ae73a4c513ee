"""Batch norms as kernels, by themselves and before squeeze and excitation."""

import pytest
import torch
import torch.nn.functional as F
from kernels import draw, exact
from test_operators import assert_close, make_norms

from mmoverlock.ops import Norm, partial_sums, squeeze_excite, sync_batch_norm

kernels = pytest.importorskip(
    'mmoverlock.ops.batch_norm.triton', exc_type=ImportError
)
excitation = pytest.importorskip('mmoverlock.ops.excitation.triton')
pytestmark = pytest.mark.usefixtures('poison')

SINGLE, BRAIN = torch.float32, torch.bfloat16


class Excited(torch.autograd.Function):
    """Squeeze and excitation of a norm, or a gated one of two, as in blocks.

    Operands are one map or three, scales and shifts, and four weights.
    """

    @staticmethod
    def forward(ctx, norms, *operands):
        maps, weights = operands[: len(norms)], operands[-4:]
        x, other, gate = [*maps, None, None][:3]
        measured = kernels.measure(maps, norms)
        out, state = excitation.forward(
            x, *weights, gate, True, other, measured
        )
        ctx.save_for_backward(*maps, *weights, state, measured[1])
        return out

    @staticmethod
    def backward(ctx, grad):
        *maps, w1, b1, w2, b2, state, facts = ctx.saved_tensors
        x, other, gate = [*maps, None, None][:3]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, *results, norms = excitation.backward(
            grad, x, w1, b1, w2, b2, gate, state, True, other, facts
        )
        weights, others = results[:4], reversed(results[4:])
        return None, grad_x, *others, *norms, *weights


def leaves(maps, norms, weights):
    return [*maps, *(t for norm in norms for t in norm[:2]), *weights]


def run_kernels(maps, norms, weights):
    if not weights:
        return sync_batch_norm(*maps, *norms)
    return Excited.apply(norms, *leaves(maps, norms, weights))


def define(maps, norms, weights):
    """The same in plain PyTorch."""
    x, *others = (
        F.batch_norm(x, mean, variance, *affine, True, momentum, eps)
        for x, (*affine, mean, variance, _, momentum, eps) in zip(
            maps, norms, strict=True
        )
    )
    if not weights:
        return x
    gate = None
    if others:
        x, gate = x + others[0], F.silu(others[1])
    return squeeze_excite(x, *weights, gate, backend='reference')


def draw_operands(form, shape, dtype):
    """Maps, whose means are not small, norms and weights."""
    torch.manual_seed(0)
    count, channels = max(form, 1), shape[1]
    maps = [draw(*shape, dtype=dtype) + 3 - i for i in range(count)]
    norms = make_norms(draw(count, channels), draw(count, channels))
    sizes = (4, channels, 1, 1), (4,), (channels, 4, 1, 1), (channels,)
    weights = [draw(*size) for size in sizes if form]
    for tensor in leaves(maps, norms, weights):
        tensor.requires_grad_()
    return maps, norms, weights


def exact_norm(norm):
    """In double precision; what is changed in place is copied."""
    *floats, batches, momentum, eps = norm
    scale, shift, mean, variance = map(exact, floats)
    statistics = mean.detach(), variance.detach(), batches.clone()
    return Norm(scale, shift, *statistics, momentum, eps)


def step(run, operands):
    """The output, gradients and statistics."""
    out = run(*operands)
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, leaves(*operands), grad)
    return [out, *grads, *(s for norm in operands[1] for s in norm[2:4])]


FORMS = 0, 1, 3  # a norm; maps before squeeze and excitation


@pytest.mark.parametrize(
    'shape, dtype',
    [
        ((3, 70, 2, 3), SINGLE),  # two blocks of channels
        ((2, 5, 33, 31), SINGLE),  # images in parts
        ((17, 3, 1, 2), SINGLE),  # more than are summed at a time
        ((1, 2, 1, 2), SINGLE),
        ((5, 3, 1, 2), BRAIN),
    ],
)
@pytest.mark.parametrize('form', FORMS)
def test_values_gradients_and_statistics(form, shape, dtype):
    operands = draw_operands(form, shape, dtype)
    kinds = exact, exact_norm, exact
    others = [[*map(*pair)] for pair in zip(kinds, operands, strict=True)]
    tolerance = 2e-5 if dtype == SINGLE else 2e-2
    assert_close(step(run_kernels, operands), step(define, others), tolerance)
    assert all(norm.batches == 1 for norm in operands[1])


@pytest.mark.parametrize('form', FORMS[::2])
def test_deterministic(form, monkeypatch):
    """Equal bits twice; close ones with another number of programs."""
    results = []
    for number in (3, 3, 1):
        monkeypatch.setattr(partial_sums, 'programs', lambda *_, n=number: n)
        operands = draw_operands(form, (2, 20, 9, 8), SINGLE)
        results.append(step(run_kernels, operands))
    first, second, other = results
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_take():
    (x,), (norm,), _ = draw_operands(0, (2, 3, 4, 5), SINGLE)
    for other, message in (
        (x[:0], r'no empty map, got one of shape \(0, 3, 4, 5\)'),
        (x.double(), 'takes float32, float16 and bfloat16, got torch.float64'),
    ):
        with pytest.raises(ValueError, match=message):
            sync_batch_norm(other, norm)
    assert norm.batches == 0
