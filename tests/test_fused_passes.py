"""Passes over maps with what stands around them, against float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, NHWC

from mmoverlock.models.layers import LayerScale, SEModule
from mmoverlock.ops import partial_sums
from mmoverlock.ops.excitation import squeeze_excite
from mmoverlock.ops.grn import response_norm
from mmoverlock.ops.prior import update_prior
from mmoverlock.ops.residual import scaled_residual

squeeze, responses, *_ = (
    pytest.importorskip(f'mmoverlock.ops.{name}.triton', exc_type=ImportError)
    for name in (
        'excitation',
        'grn',
        'residual',
        'prior',
    )
)

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
CASES = [  # an operator, and which of its optional operands it gets
    (squeeze_excite, ''),
    (squeeze_excite, 'gate'),
    (squeeze_excite, 'gate silu'),
    (scaled_residual, ''),
    (scaled_residual, 'weight'),
    (scaled_residual, 'keep'),
    (scaled_residual, 'weight bias'),
    (scaled_residual, 'weight bias keep'),
    (update_prior, ''),
    (update_prior, 'bias'),
    (response_norm, ''),
]
CASE = pytest.mark.parametrize(
    'run, options', CASES, ids=[f'{c[0].__name__} {c[1]}' for c in CASES]
)


def draw(*shape, dtype=torch.float32):
    x = torch.randn(shape).to(DEVICE, dtype)
    if len(shape) == 4 and shape[-1] > 1:
        return x.contiguous(memory_format=NHWC)
    return x


def draw_operands(run, options, shape, dtype=torch.float32, other=None):
    """Operands by position; ``other`` is the dtype of the second map."""
    torch.manual_seed(0)
    batch, channels, *size = shape
    x = draw(*shape, dtype=dtype) + 1
    other = other or dtype
    if run is squeeze_excite:
        hidden = max(16, channels // 8)
        operands = [
            x,
            draw(hidden, channels, 1, 1) * channels**-0.5,
            draw(hidden),
            draw(channels, hidden, 1, 1) * hidden**-0.5,
            draw(channels),
            draw(*shape, dtype=other) if 'gate' in options else None,
            'silu' in options,
        ]
    elif run is scaled_residual:
        keep = torch.rand(batch, device=DEVICE).bernoulli() / 0.75
        operands = [
            x,
            draw(*shape, dtype=other),
            draw(channels, 1, 1, 1) if 'weight' in options else None,
            draw(channels) if 'bias' in options else None,
            keep if 'keep' in options else None,
        ]
    elif run is response_norm:
        operands = [x, draw(1, channels, 1, 1), draw(1, channels, 1, 1)]
    else:
        priors = max(1, channels // 3)
        operands = [
            x,
            draw(batch, priors, *size, dtype=other),
            draw(priors, 1, 1, 1),
            draw(priors) if options else None,
            draw(priors, 1, 1, 1),
            draw(priors),
        ]
    without = operands[4:] if run is scaled_residual else ()  # keep
    for tensor in operands:
        if is_tensor(tensor) and not any(tensor is t for t in without):
            tensor.requires_grad_()
    return operands


def is_tensor(operand):
    return isinstance(operand, torch.Tensor)


def exact(operands):
    return [
        t
        if not is_tensor(t)
        else t.detach().double().clone().requires_grad_(t.requires_grad)
        for t in operands
    ]


def define(run, operands):
    if run is squeeze_excite:
        x, weight1, bias1, weight2, bias2, gate, silu = operands
        a = F.conv2d(x.mean((2, 3), keepdim=True), weight1, bias1)
        y = x * torch.sigmoid(F.conv2d(F.gelu(a), weight2, bias2))
        if gate is None:
            return y
        return (F.silu(gate) if silu else gate) * y
    if run is scaled_residual:
        x, y, weight, bias, keep = operands
        if weight is not None:
            x = F.conv2d(x, weight, bias, groups=len(weight))
        return x + (y if keep is None else y * keep[:, None, None, None])
    if run is response_norm:
        x, gamma, beta = operands
        norm = x.square().sum((2, 3), keepdim=True).sqrt()
        response = norm / (norm.mean(1, keepdim=True) + 1e-6)
        return x * (gamma * response + 1) + beta
    z, initial, weight, bias, *others = operands
    priors = initial.shape[1]
    z, prior = z[:, :-priors], z[:, -priors:]
    prior = F.conv2d(prior, weight, bias, groups=priors)
    return torch.cat([z, prior + F.conv2d(initial, *others, groups=priors)], 1)


def leaves(operands):
    return [t for t in operands if is_tensor(t) and t.requires_grad]


def assert_right(run, operands, call=None):
    """Value and every gradient; their dtypes and layouts."""
    y = (call or partial(run, backend='triton'))(*operands)
    others = exact(operands)
    expected = define(run, others)
    grad = torch.randn(y.shape).to(y)  # in NCHW
    grads = torch.autograd.grad(y, leaves(operands), grad)
    expected_grads = torch.autograd.grad(
        expected, leaves(others), grad.double()
    )
    assert y.dtype == operands[0].dtype
    assert y.is_contiguous(memory_format=NHWC)
    for operand, result in zip(leaves(operands), grads, strict=True):
        assert operand.dtype == result.dtype
    tolerance = TOLERANCES[operands[0].dtype]
    for actual, value in zip(
        (y, *grads), (expected, *expected_grads), strict=True
    ):
        assert actual.shape == value.shape
        atol = tolerance * max(1, value.abs().max().item())
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=atol)


pytestmark = pytest.mark.usefixtures('poison')


@CASE
@pytest.mark.parametrize(
    'shape, dtype',
    [
        ((1, 2, 1, 1), torch.float32),
        ((3, 70, 5, 9), torch.float32),  # two blocks of channels
        ((2, 17, 19, 17), torch.float16),  # many positions
        ((2, 16, 2, 3), torch.bfloat16),
    ],
)
def test_value_and_gradients(run, options, shape, dtype):
    operands = draw_operands(run, options, shape, dtype)
    assert_right(run, operands)


def test_many_images(monkeypatch):
    """More than the gradients of the weights of SE take at a time."""
    monkeypatch.setitem(squeeze.WEIGHTS, 'BATCH', 16)
    operands = draw_operands(squeeze_excite, 'gate', (17, 3, 1, 2))
    assert_right(squeeze_excite, operands)


@CASE
def test_maps_of_two_dtypes(run, options):
    """The result has the dtype of the first, gradients have their own."""
    shape, half = (2, 6, 3, 4), torch.bfloat16
    if run is response_norm or (run is squeeze_excite and not options):
        pytest.skip('There is one map.')
    assert_right(run, draw_operands(run, options, shape, half, torch.float32))
    operands = draw_operands(run, options, shape, torch.float32, half)
    y = run(*operands, backend='triton')
    expected = define(run, exact(operands))
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in leaves(operands))


@CASE
def test_other_layouts_and_half_weights(run, options):
    """Maps in NCHW, weights in half precision and of other strides."""
    operands = draw_operands(run, options, (2, 6, 3, 4))
    others = []
    for tensor in operands:
        if not is_tensor(tensor):
            others.append(tensor)
        elif tensor.dim() == 4 and tensor.shape[-1] > 1:
            others.append(tensor.detach().contiguous())
        else:
            halves = tensor.detach().half()
            others.append(torch.stack([halves, halves], -1)[..., 0])
    for tensor, operand in zip(others, operands, strict=True):
        if is_tensor(tensor):
            tensor.requires_grad_(operand.requires_grad)
    y = run(*others, backend='triton')
    assert y.is_contiguous(memory_format=NHWC)
    expected = define(run, exact(others))
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(y.sin().sum(), leaves(others))
    exacts = exact(others)
    expected = torch.autograd.grad(
        define(run, exacts).sin().sum(), leaves(exacts)
    )
    for tensor, grad, value in zip(
        leaves(others), grads, expected, strict=True
    ):
        assert grad.dtype == tensor.dtype
        tolerance = 1e-5 if grad.dtype == torch.float32 else 1e-3
        atol = tolerance * max(1, value.abs().max().item())
        torch.testing.assert_close(grad.double(), value, rtol=0, atol=atol)


@CASE
def test_deterministic(monkeypatch, run, options):
    """Equal bits twice; close ones with other numbers of programs."""
    results = []
    monkeypatch.setattr(squeeze, 'FEW', 50)
    monkeypatch.setitem(responses.KNOBS, 'few', 50)
    for slots in (3, 3, 1, 17):
        monkeypatch.setattr(partial_sums, 'programs', lambda *_, n=slots: n)
        operands = draw_operands(run, options, (2, 20, 9, 8))
        y = run(*operands, backend='triton')
        y.sin().sum().backward()
        results.append([y, *(t.grad for t in leaves(operands))])
    for first, second, *others in zip(*results, strict=True):
        assert torch.equal(first, second)
        for other in others:
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


def test_the_sum_is_in_single_precision():
    """Addends that vanish in half precision one by one do not together."""
    x = torch.full((1, 1, 1, 1), 256.0, device=DEVICE).bfloat16()
    y, weight, bias = x / 256, x.float() / 256, x.new_ones(1).float()
    y = scaled_residual(x, y, weight, bias, backend='triton')
    assert y.item() == 258  # 256 + 1 is 256


@pytest.mark.parametrize('options', ['', 'weight'])
def test_gradients_that_are_that_of_the_sum(options):
    """Nothing is written for them."""
    operands = draw_operands(scaled_residual, options, (2, 3, 4, 5))
    y = scaled_residual(*operands, backend='triton')
    grad = draw(2, 3, 4, 5)
    grads = torch.autograd.grad(y, operands[: 1 if options else 2], grad)
    same = [g.data_ptr() == grad.data_ptr() for g in grads]
    assert same == ([False] if options else [True, True])
    y = scaled_residual(*operands, backend='triton')
    (grad_y,) = torch.autograd.grad(y, operands[1], grad)
    assert grad_y.data_ptr() == grad.data_ptr()


@CASE
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(run, options, dtype):
    operands = draw_operands(run, options, (2, 5, 3, 4), dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = run(*operands, backend='triton')
    assert y.dtype == dtype
    assert torch.equal(y, run(*operands, backend='triton'))


@CASE
def test_compile(monkeypatch, run, options):
    """The graph has no breaks, and sizes may change without a new one."""
    monkeypatch.undo()  # tracing makes empty tensors, too
    torch.compiler.reset()

    compiled = torch.compile(
        partial(run, backend='triton'),
        fullgraph=True,
        backend='aot_eager',
        dynamic=True,
    )
    for shape, stance in (
        ((2, 5, 4, 6), 'default'),
        ((3, 5, 7, 3), 'fail_on_recompile'),
    ):
        operands = draw_operands(run, options, shape)
        with torch.compiler.set_stance(stance):
            assert_right(run, operands, compiled)


@CASE
def test_operators_are_registered_rightly(
    monkeypatch, never_the_same, run, options
):
    monkeypatch.undo()
    operands = draw_operands(run, options, (1, 2, 2, 3))
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    check = torch.library.opcheck
    operators = torch.ops.mmoverlock
    name = run.__name__
    check(getattr(operators, name), operands, test_utils=checks)
    x, *others = (t.detach() if is_tensor(t) else t for t in operands)
    if run is squeeze_excite:
        _, state = squeeze.forward(x, *others)
        others.insert(-1, state)
    elif run is scaled_residual:
        others[0] = others[0].dtype
    elif run is response_norm:
        _, *state = responses.forward(x, *others)
        others[1:] = state
    operator = getattr(operators, f'{name}_backward')
    check(operator, (x, x, *others), test_utils=checks)


@CASE
@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty_map(run, options, shape):
    operands = draw_operands(run, options, shape)
    y = run(*operands, backend='triton')
    assert y.shape == shape
    y.sum().backward()
    for tensor in leaves(operands):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@CASE
def test_reference(run, options):
    operands = exact(draw_operands(run, options, (2, 6, 5, 4)))
    y, expected = run(*operands), define(run, operands)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), leaves(operands)),
        torch.autograd.grad(expected.sin().sum(), leaves(operands)),
    )


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_reference_is_what_layers_run(dtype):
    """On a CPU, bit for bit, under autocast too."""
    torch.manual_seed(0)
    x, y, z = (torch.randn(2, 5, 6, 7, dtype=dtype) for _ in range(3))
    se, scale, other = SEModule(5), LayerScale(5), LayerScale(2)
    with torch.no_grad():
        for layer in (scale, other):
            layer.weight.normal_()
            layer.bias.normal_()
    weights = [se.proj[i] for i in (1, 3)]
    weights = [t for layer in weights for t in (layer.weight, layer.bias)]
    scales = other.weight, other.bias
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype is not None):
        pairs = [
            (squeeze_excite(x, *weights), se(x)),
            (squeeze_excite(x, *weights, y), y * se(x)),
            (squeeze_excite(x, *weights, y, True), F.silu(y) * se(x)),
            (scaled_residual(x, y, scale.weight, scale.bias), scale(x, y)),
            (scaled_residual(x, y), x + y),
            (
                update_prior(z, x[:, :2], *scales, *scales),
                torch.cat([z[:, :3], other(z[:, 3:], other(x[:, :2]))], 1),
            ),
        ]
        if dtype is None:
            scale.bias = None
            pairs.append((scaled_residual(x, y, scale.weight), scale(x, y)))
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_what_cannot_run():
    x, c = torch.ones(1, 2, 3, 3), torch.ones(2)
    one = torch.ones(2, 1, 1, 1)
    two = torch.ones(2, 2, 1, 1)
    for run, message in (
        (
            lambda: squeeze_excite(x, two, c, one, c),
            r'weight2.*\(2, 2, 1, 1\)',
        ),
        (
            lambda: squeeze_excite(x, one, c, two, c),
            r'weight1.*\(2, 2, 1, 1\)',
        ),
        (lambda: squeeze_excite(x, two, c, two, c, x[:, :1]), 'gate'),
        (lambda: scaled_residual(x, x[:, :1]), 'y has shape'),
        (lambda: scaled_residual(x, x, two), r'weight.*\(2, 1, 1, 1\)'),
        (lambda: scaled_residual(x, x, None, c), 'a bias needs a weight'),
        (lambda: scaled_residual(x, x, None, None, c), r'keep.*\(1,\)'),
        (lambda: update_prior(x, x[..., :2], one, c, one, c), 'no part of'),
        (lambda: update_prior(x, x[:, :1], one, c, one, c), 'weight'),
        (lambda: update_prior(x, x, one, c, one, one), 'initial_bias'),
        (lambda: response_norm(x, one, c), r'gamma.*\(1, 2, 1, 1\)'),
        (lambda: scaled_residual(x, x, backend='cudnn'), "'cudnn'.*'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
