"""Products of maps with matrices, and the network that they are part of."""

import pytest
import torch
from kernels import DEVICE, draw
from test_operators import draw_operands, leaves

from mmoverlock.ops import feed_forward
from mmoverlock.ops.pointwise import round_parameters

pytest.importorskip('triton', '3.6')


def test_dead_maps():
    """Channels that are zero everywhere have finite gradients."""
    operands = draw_operands(feed_forward, (1, 2, 3, 3))
    for name in ('x', 'bias1', 'conv_bias'):  # before the norm
        operands[name] = torch.zeros_like(operands[name], requires_grad=True)
    out = feed_forward(**operands)
    grads = torch.autograd.grad(out.sum(), leaves(operands), create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(NotImplementedError, match="take the backend 'refer"):
        grads[0].sum().backward()  # of gradients, there are none


def test_fused_form():
    """Without a shift of the norm, as :func:`fuse` leaves it."""
    operands = draw_operands(feed_forward, (1, 4, 5, 3))
    operands['beta'] = None
    with torch.no_grad():
        out = feed_forward(**operands)
        operands['beta'] = torch.zeros(1, 12, 1, 1, device=DEVICE)
        assert torch.equal(out, feed_forward(**operands))


def test_hidden_map_that_is_kept(monkeypatch):
    """Wide maps have one; with it, gradients are the same to the bit."""
    results = []
    for most in (4, 3):
        monkeypatch.setattr('mmoverlock.ops.ffn.triton.MAX_REPEATED', most)
        torch.manual_seed(0)
        operands = draw_operands(feed_forward, (1, 4, 3, 2), torch.bfloat16)
        out = feed_forward(**operands)
        kept = [t.shape for t in out.grad_fn.saved_tensors]
        assert kept.count((1, 12, 3, 2)) == (1 if most == 4 else 2)
        results.append(torch.autograd.grad(out.sum(), leaves(operands)))
    assert all(map(torch.equal, *results))


def test_rounding():
    """One dtype is left as it is; others are as PyTorch rounds."""
    x = draw(5)
    assert round_parameters(x.dtype, x)[0].data_ptr() == x.data_ptr()
    for rounded in round_parameters(torch.bfloat16, x, x.bfloat16()):
        assert torch.equal(rounded, x.bfloat16())
