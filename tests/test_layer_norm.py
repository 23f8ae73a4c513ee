"""Layer norm over the channels in one pass, against float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import json

import pytest
import torch
from kernels import DEVICE, NHWC, python
from torch import nn

from mmoverlock.models.layers import LayerNorm2d
from mmoverlock.ops.layernorm import layer_norm

kernels = pytest.importorskip(
    'mmoverlock.ops.layernorm.triton', exc_type=ImportError
)
partial_sums = kernels.partial_sums

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw_operands(shape, dtype=torch.float32):
    """Map, whose mean is large beside its deviation, weight and bias."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 3).to(DEVICE, dtype)
    operands = x.contiguous(memory_format=NHWC), *torch.randn(2, shape[1])
    return [tensor.to(DEVICE).requires_grad_() for tensor in operands]


def exact(*tensors):
    return [t.detach().double().clone().requires_grad_() for t in tensors]


def define(x, weight, bias, eps):
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    x = (x - mean) / (var + eps).sqrt()
    return x * weight[:, None, None] + bias[:, None, None]


pytestmark = pytest.mark.usefixtures('poison')


@pytest.mark.parametrize(
    'shape, dtype, eps',
    [
        ((1, 2, 1, 1), torch.float32, 1e-2),
        ((2, 5, 1, 7), torch.float32, 1e-6),
        ((1, 64, 9, 5), torch.float32, 1e-6),  # several rows of a program
        ((2, 16, 17, 13), torch.float32, 1e-6),  # several turns
        ((1, 300, 5, 1), torch.float32, 1e-6),
        ((1, 1024, 1, 3), torch.float32, 1e-6),
        ((2, 24, 3, 5), torch.float16, 1e-6),
        ((2, 24, 3, 5), torch.bfloat16, 1e-6),
    ],
)
def test_value_and_gradients(shape, dtype, eps):
    operands = draw_operands(shape, dtype)
    others = exact(*operands)
    y = layer_norm(*operands, eps, 'triton')
    assert y.dtype == dtype and y.stride() == operands[0].stride()
    grad = torch.randn(shape).to(y)  # in NCHW
    grads = torch.autograd.grad(y, operands, grad)
    expected = define(*others, eps)
    expected_grads = torch.autograd.grad(expected, others, grad.double())
    for operand, result in zip(operands, grads, strict=True):
        assert operand.dtype == result.dtype
        assert operand.shape == result.shape
    for actual, value in zip(
        (y, *grads), (expected, *expected_grads), strict=True
    ):
        atol = TOLERANCES[dtype] * max(1, value.abs().max().item())
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=atol)


def test_other_layouts_and_half_weights():
    """NCHW, a part of a map, weights in half precision."""
    x, *parameters = draw_operands((2, 6, 3, 4))
    for part in (x.contiguous(), x[:, 1:4]):
        part = part.detach().requires_grad_()
        halves = [p.detach()[: part.shape[1]].half() for p in parameters]
        halves = [p.requires_grad_() for p in halves]
        y = layer_norm(part, *halves, backend='triton')
        assert y.is_contiguous(memory_format=NHWC)
        expected = define(part.double(), *exact(*halves), 1e-6)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        assert [p.grad.dtype for p in halves] == [torch.float16] * 2


def test_deterministic(monkeypatch):
    """Equal bits twice; close ones with another number of programs."""
    results = []
    for slots in (3, 3, 1):
        monkeypatch.setattr(partial_sums, 'programs', lambda *_, n=slots: n)
        operands = draw_operands((2, 16, 17, 13))
        y = layer_norm(*operands, backend='triton')
        y.sin().sum().backward()
        results.append([y, *(t.grad for t in operands)])
    for first, second, other in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    operands = draw_operands((2, 5, 3, 4), dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer_norm(*operands, backend='triton')
    assert y.dtype == dtype
    assert torch.equal(y, layer_norm(*operands, backend='triton'))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = LayerNorm2d(5)

    def forward(self, x):
        weight, bias = self.norm.weight, self.norm.bias
        return layer_norm(x.sin(), weight, bias, backend='triton').sin()


def test_compile(monkeypatch):
    """The graph has no breaks, and sizes may change without a new one."""
    monkeypatch.undo()  # tracing makes empty tensors, too
    module = Norm().to(DEVICE)
    compiled = torch.compile(
        module, fullgraph=True, backend='aot_eager', dynamic=True
    )
    for shape in ((2, 5, 4, 5), (3, 5, 3, 6)):
        x, *_ = draw_operands(shape)
        results = compiled(x), module(x)
        assert results[0].stride() == results[1].stride()
        grads = [
            torch.autograd.grad(y.square().sum(), (x, *module.parameters()))
            for y in results
        ]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads)


def test_operators_are_registered_rightly(monkeypatch, never_the_same):
    monkeypatch.undo()
    operands = draw_operands((1, 2, 2, 3))
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    torch.library.opcheck(
        torch.ops.mmoverlock.layer_norm, (*operands, 1e-6), test_utils=checks
    )
    x, weight, _ = (t.detach() for t in operands)
    torch.library.opcheck(
        torch.ops.mmoverlock.layer_norm_backward,
        (x, x, weight, 1e-6),
        test_utils=checks,
    )


def test_empty_map():
    operands = draw_operands((0, 3, 4, 5))
    layer_norm(*operands, backend='triton').sum().backward()
    for tensor in operands:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_reference():
    """The definition; on a CPU it is what the layer always ran."""
    operands = exact(*draw_operands((2, 3, 6, 5)))
    torch.testing.assert_close(layer_norm(*operands), define(*operands, 1e-6))
    layer = LayerNorm2d(5)
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(layer_norm(x, layer.weight, layer.bias), layer(x))


def test_maps_on_a_cpu_are_refused():
    python("""
import torch
from mmoverlock.ops.layernorm import layer_norm
from mmoverlock.ops.conv3x3 import residual_conv
from mmoverlock.ops.residual import scaled_residual
from mmoverlock.ops.excitation import squeeze_excite
from mmoverlock.ops.prior import update_prior
x, c = torch.ones(1, 1, 3, 3), torch.ones(1)
one = torch.ones(1, 1, 1, 1)
for run in (
    lambda: residual_conv(x, x, backend='triton'),
    lambda: layer_norm(x, c, c, backend='triton'),
    lambda: scaled_residual(x, x, backend='triton'),
    lambda: squeeze_excite(x, one, c, one, c, backend='triton'),
    lambda: update_prior(x, x, one, c, one, c, backend='triton'),
):
    try:
        run()
    except ValueError as error:
        assert 'takes maps on a GPU, got one on cpu' in str(error)
    else:
        raise AssertionError
""")


@pytest.mark.parametrize(
    'capability, dtype', [(80, 'float32'), (90, 'bfloat16')]
)
def test_kernels_compile_without_spills(capability, dtype, tmp_path):
    """Those of the other passes, too. See the module for more of them."""
    out = python(
        'import json, torch\n'
        'from compile_launches import compile_fused_passes, compile_passes\n'
        f'uses = compile_passes({capability}, torch.{dtype}, 384)\n'
        f'uses += compile_fused_passes({capability}, torch.{dtype}, 640)\n'
        'print(json.dumps(uses))',
        TRITON_CACHE_DIR=str(tmp_path),
    )
    uses = json.loads(out.splitlines()[-1])
    assert len(uses) == 28
    for name, use in uses:
        assert use['spills'] == 0, (name, use)
        assert use['registers'] <= 168, (name, use)
