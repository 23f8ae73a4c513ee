"""The promises of operators on maps, all and each, against float64.

Without a GPU, Triton's interpreter runs the kernels.
"""

import inspect
from functools import partial
from operator import mul
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, NHWC, draw, exact, opchecked, relative_error
from torch.fx.experimental import _config as symbols

from mmoverlock.ops import (
    Branch,
    Norm,
    conv_norm,
    depthwise_conv2d,
    feed_forward,
    layer_norm,
    partial_sums,
    residual_conv,
    response_norm,
    scaled_residual,
    squeeze_excite,
    sum_of_branches,
    sync_batch_norm,
    update_prior,
)
from mmoverlock.ops.common import channels_last
from mmoverlock.ops.pointwise import round_parameters, rows

triton = pytest.importorskip('triton', '3.6')
squeeze = pytest.importorskip('mmoverlock.ops.excitation.triton')
responses = pytest.importorskip('mmoverlock.ops.grn.triton')
convolutions = pytest.importorskip('mmoverlock.ops.conv3x3.triton')
pointwise = pytest.importorskip('mmoverlock.ops.pointwise.triton')
networks = pytest.importorskip('mmoverlock.ops.ffn.triton')
batch_norm = pytest.importorskip('mmoverlock.ops.batch_norm.triton')

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {SINGLE: 1e-6, HALF: 1e-3, BRAIN: 1e-2}


def make_norms(scales, shifts):
    """Batch norms that have seen no batch, of rows (N, C)."""
    channels = scales.shape[1]
    new = dict(
        dtype=torch.promote_types(scales.dtype, SINGLE), device=scales.device
    )
    return [
        Norm(
            *pair,
            running_mean=torch.zeros(channels, **new),
            running_var=torch.ones(channels, **new),
            batches=torch.zeros((), dtype=torch.int64, device=scales.device),
            momentum=0.1 * i,
            eps=1e-3 * i,
        )
        for i, pair in enumerate(zip(scales, shifts, strict=True), 1)
    ]


def statistics(norms):
    return [
        torch.cat([n.running_mean, n.running_var, n.batches[None]])
        for n in norms
    ]


def make_branches(weight1, weight2, scales, shifts):
    one, two = make_norms(scales, shifts)
    return [
        Branch(weight1, *one[:5], 1, *one[5:]),
        Branch(weight2, *two[:5], 2, *two[5:]),
    ]


def branches(x, backend='auto', **parameters):
    """A sum of two, and the statistics of their norms."""
    made = make_branches(**parameters)
    return sum_of_branches(x, made, backend), *statistics(made)


def normalize(x, scales, shifts, backend='auto'):
    """By a batch norm, and its statistics."""
    (norm,) = make_norms(scales, shifts)
    run = plain_norm if backend == 'reference' else sync_batch_norm
    return run(x, norm), *statistics([norm])


def plain_norm(x, norm):
    *affine, mean, variance, batches, momentum, eps = norm
    batches += 1
    return F.batch_norm(x, mean, variance, *affine, True, momentum, eps)


def excite(x, y, gate, scales, shifts, backend='auto', **weights):
    """Squeeze and excitation of a norm, or a gated one of two, as in blocks.

    And statistics of the norms.
    """
    maps = [x] if y is None else [x, y, gate]
    norms = make_norms(scales[: len(maps)], shifts[: len(maps)])
    if backend == 'reference':
        x, *others = map(plain_norm, maps, norms)
        gate = None
        if others:
            x, gate = x + others[0], F.silu(others[1])
        out = squeeze_excite(x, **weights, gate=gate, backend=backend)
    else:
        affine = [t for norm in norms for t in norm[:2]]
        out = Excited.apply(norms, *maps, *affine, *weights.values())
    return out, *statistics(norms)


class Excited(torch.autograd.Function):
    """Operands are one map or three, scales and shifts, and four weights."""

    @staticmethod
    def forward(ctx, norms, *operands):
        maps, weights = operands[: len(norms)], operands[-4:]
        x, other, gate = [*maps, None, None][:3]
        measured = batch_norm.measure(maps, norms)
        out, state = squeeze.forward(x, *weights, gate, True, other, measured)
        ctx.save_for_backward(*maps, *weights, state, measured[1])
        return out

    @staticmethod
    def backward(ctx, grad):
        *maps, w1, b1, w2, b2, state, facts = ctx.saved_tensors
        x, other, gate = [*maps, None, None][:3]
        grad_x, *results, norms = squeeze.backward(
            channels_last(grad),
            *(x, w1, b1, w2, b2, gate, state, True, other, facts),
        )
        weights, others = results[:4], reversed(results[4:])
        return None, grad_x, *others, *norms, *weights


LOOSE = {
    layer_norm: 3,
    residual_conv: 1.2,
    conv_norm: 4,
    feed_forward: 6,
    depthwise_conv2d: 2,
    branches: 5,
    normalize: 2,
    excite: 2,
}
CASTS = residual_conv, conv_norm, feed_forward, depthwise_conv2d, branches


# Names of operands and their shapes. A letter is batch, channels, height or
# width; D, E, O and P are made of the channels. What has no shape is whether
# something is done.
SPECS = {
    layer_norm: 'x BCHW, weight C, bias C, contiguous',
    residual_conv: 'x BCHW, weight C133, bias C, gelu, residual, squares',
    conv_norm: 'x BCHW, weight C133, bias C, scale C, shift C, residual',
    response_norm: 'x BCHW, gamma 1C11, beta 1C11',
    squeeze_excite: 'x BCHW, weight1 DC11, bias1 D, weight2 CD11, bias2 C, '
    'gate BCHW',
    scaled_residual: 'x BCHW, y BCHW, weight C111, bias C, keep B',
    update_prior: 'z BCHW, initial BPHW, weight P111, bias P, '
    'initial_weight P111, initial_bias P',
    feed_forward: 'x BCHW, weight1 EC11, bias1 E, conv_weight E133, '
    'conv_bias E, gamma 1E11, beta 1E11, weight2 OE11, bias2 O, residual, '
    'identity BOHW, gain O111, offset O, keep B',
    depthwise_conv2d: 'x BCHW, weight C133, bias C',
    branches: 'x BCHW, weight1 C133, weight2 C133, scales 2C, shifts 2C',
}
NORMS = {  # not for what their operands may be, which blocks know
    normalize: 'x BCHW, scales 1C, shifts 1C',
    excite: 'x BCHW, y BCHW, gate BCHW, scales 3C, shifts 3C, weight1 DC11, '
    'bias1 D, weight2 CD11, bias2 C',
}


def convolve_and_normalize(x, weight, bias, scale, shift, residual):
    y = residual_conv(x, weight, bias, False, residual, backend='reference')
    return y, layer_norm(y, scale, shift, backend='reference')


def feed(x, residual, identity, gain, offset, keep, **parameters):
    weight1, bias1, *conv, gamma, beta, weight2, bias2 = parameters.values()
    x = F.conv2d(x, weight1, bias1)
    y = residual_conv(x, *conv, True, residual, backend='reference')
    y = response_norm(y, gamma, beta, 'reference')
    y = F.conv2d(y, weight2, bias2)
    if identity is None:
        return y
    return scaled_residual(identity, y, gain, offset, keep, 'reference')


DEFINITIONS = {conv_norm: convolve_and_normalize, feed_forward: feed}


def definition_of(run):
    """In plain PyTorch.

    Networks that run it are compared with the released ones elsewhere.
    """
    return DEFINITIONS.get(run) or partial(run, backend='reference')


WITHOUT = {  # which operands an operator gets none of, case by case
    layer_norm: ['contiguous'],
    residual_conv: ['bias gelu squares', 'gelu residual'],
    conv_norm: ['bias residual'],
    squeeze_excite: ['gate'],
    scaled_residual: ['keep', 'bias keep', 'weight bias', 'weight bias keep'],
    update_prior: ['bias'],
    feed_forward: [
        'offset',
        'gain offset',
        'identity gain offset keep residual',
    ],
    depthwise_conv2d: ['bias'],
}
CASES = [
    (run, without) for run in SPECS for without in ['', *WITHOUT.get(run, ())]
]
NORM_CASES = (normalize, ''), (excite, ''), (excite, 'y gate')
EVERY_OPERATOR = pytest.mark.parametrize('run', SPECS)


def kernels_of(run):
    """The operator with its kernels."""
    return partial(run, backend='triton') if has_backend(run) else run


def has_backend(run):
    return 'backend' in inspect.signature(run).parameters


def draw_operands(run, shape, dtype=SINGLE, without='', other=None):
    """Operands by name; ``other`` is the dtype of the second map."""
    torch.manual_seed(0)
    channels = shape[1]
    sizes = dict(
        zip('BCHW', shape, strict=True),
        D=max(16, channels // 8),
        E=3 * channels,
        O=2 * channels,
        P=(channels + 1) // 2,
    )
    operands = {}
    for operand in (SPECS | NORMS)[run].split(', '):
        name, *letters = operand.split()
        if name in without.split():
            operands[name] = None if letters else False
        elif not letters:
            operands[name] = True
        elif name == 'keep':
            operands[name] = 1.5 - 0.75 * torch.arange(shape[0], device=DEVICE)
        else:
            dims = [sizes[n] if n in sizes else int(n) for n in letters[0]]
            is_map = letters[0].endswith('HW')
            tensor = draw(*dims, dtype=dtype if is_map else SINGLE)
            if not operands:  # with a mean that is no small one
                tensor += 3 if run in (branches, *NORMS) else 1
            elif is_map:
                tensor = tensor.to(other or dtype)
            elif len(dims) == 4:
                tensor *= dims[1] ** -0.5
            operands[name] = tensor.requires_grad_()
    return operands


def leaves(operands):
    return [
        t for t in operands.values() if torch.is_tensor(t) and t.requires_grad
    ]


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def assert_close(actual, expected, tolerance):
    """Within a share of the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        atol = tolerance * max(1, e.abs().max().item())
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol)


def assert_right(run, operands, call=None, used=(0, 1), lay_out=torch.clone):
    """Values and every gradient; their dtypes and layouts."""
    # What is saved is there once, as in checkpoints
    with torch.autograd.graph.saved_tensors_hooks(lambda t: [t], list.pop):
        results = outputs((call or kernels_of(run))(**operands))
    others = exact(operands)
    expected = outputs(definition_of(run)(**others))
    x = next(iter(operands.values()))
    first = operands.get('identity')
    assert results[0].dtype == (x if first is None else first).dtype
    layout = torch.contiguous_format if operands.get('contiguous') else NHWC
    for y in results:
        assert y.dim() != 4 or y.is_contiguous(memory_format=layout)
    used = [i for i in used if results[i:] and results[i].requires_grad]
    weights = [torch.randn(results[i].shape).to(results[i]) for i in used]
    weights = [*map(lay_out, weights)]  # by default, they arrive in NCHW
    grads = torch.autograd.grad(
        [results[i] for i in used],
        leaves(operands),
        weights,
        materialize_grads=True,
    )
    expected_grads = torch.autograd.grad(
        [expected[i] for i in used],
        leaves(others),
        [weight.double() for weight in weights],
        materialize_grads=True,
    )
    tolerance = TOLERANCES[x.dtype]
    assert_close(results, expected, tolerance * LOOSE.get(run, 1))
    for operand, *pair in zip(
        leaves(operands), grads, expected_grads, strict=True
    ):
        assert operand.dtype == pair[0].dtype
        limit = max(tolerance, TOLERANCES[operand.dtype]) * LOOSE.get(run, 1)
        assert_close(pair[:1], pair[1:], limit)


SHAPES = dict.fromkeys(
    SPECS,
    [
        ((1, 2, 1, 1), SINGLE),
        ((3, 70, 5, 9), SINGLE),  # two blocks of channels
        ((2, 17, 19, 17), HALF),  # many positions
        ((2, 16, 2, 3), BRAIN),
    ],
) | {
    residual_conv: [
        ((1, 67, 1, 8), SINGLE),  # two blocks of channels; a row
        ((3, 3, 17, 9), SINGLE),  # many strips
        ((2, 7, 5, 1), HALF),  # a column
        ((2, 16, 6, 7), BRAIN),
    ],
    conv_norm: [
        ((2, 20, 5, 8), SINGLE),  # two launches
        ((3, 48, 11, 9), SINGLE),  # several programs
        ((1, 384, 4, 3), HALF),
        ((1, 1024, 2, 1), SINGLE),
        ((5, 112, 3, 2), BRAIN),
    ],
    feed_forward: [
        ((2, 4, 9, 8), SINGLE),  # several tiles of pixels
        ((1, 24, 3, 2), SINGLE),  # and blocks of channels
        ((2, 6, 3, 2), HALF),
        ((3, 5, 1, 4), BRAIN),
    ],
    depthwise_conv2d: [
        ((2, 9, 11, 7), SINGLE),  # several tiles
        ((1, 33, 3, 2), SINGLE),  # and blocks of channels
        ((1, 6, 9, 7), HALF),
        ((1, 6, 4, 3), BRAIN),
    ],
    branches: [],  # which test_depthwise_triton.py has
}
SHAPES[layer_norm] = [
    *SHAPES[layer_norm],
    ((1, 1024, 1, 3), SINGLE),
    ((5, 260, 3, 1), BRAIN),  # rows of several images
    ((2, 600, 4, 8), HALF),
]
# More images than the gradients of the weights of SE take at a time
SHAPES[squeeze_excite] = [*SHAPES[squeeze_excite], ((17, 3, 1, 2), SINGLE)]
NORM_SHAPES = [
    ((3, 70, 2, 3), SINGLE),  # two blocks of channels
    ((2, 5, 33, 31), SINGLE),  # images in parts
    ((17, 3, 1, 2), SINGLE),  # more than are summed at a time
    ((1, 2, 1, 2), SINGLE),
    ((5, 3, 1, 2), BRAIN),
]


def shapes_of(run, without):
    """All of an operator, and one or two where it lacks an operand."""
    if run in NORMS:
        return NORM_SHAPES
    if not without:
        return SHAPES[run]
    return SHAPES[run][-1:] if run in CASTS else SHAPES[run][1:3]


@pytest.mark.parametrize(
    'run, without, shape, dtype',
    [
        (*case, *form)
        for case in (*CASES, *NORM_CASES)
        for form in shapes_of(*case)
    ],
)
def test_values_and_gradients(run, without, shape, dtype, poison):
    assert_right(run, draw_operands(run, shape, dtype, without))


@pytest.mark.parametrize('run', [conv_norm, residual_conv])
@pytest.mark.parametrize('used', [0, 1])
def test_one_of_two_outputs_has_a_gradient(run, used, poison):
    operands = draw_operands(run, (2, 3, 4, 5))
    assert_right(run, operands, used=[used])


@pytest.mark.parametrize(
    'run', [squeeze_excite, scaled_residual, update_prior, feed_forward]
)
def test_maps_of_two_dtypes(run, poison):
    """Gradients have their own."""
    shape = 2, 6, 3, 4
    assert_right(run, draw_operands(run, shape, BRAIN, other=SINGLE))
    operands = draw_operands(run, shape, SINGLE, other=BRAIN)
    y = kernels_of(run)(**operands)
    if run is not feed_forward:  # whose result has the dtype of the second
        assert y.dtype == SINGLE
        assert_close([y], [definition_of(run)(**exact(operands))], 1e-5)
    y.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in leaves(operands))


@EVERY_OPERATOR
def test_other_layouts_and_half_weights(run, poison):
    """Maps in NCHW, weights in half precision and of other strides."""
    operands = draw_operands(run, (2, 3, 2, 4))
    for name, operand in operands.items():
        if torch.is_tensor(operand):
            tensor = operand.detach()
            if tensor.shape[2:] == (2, 4):
                tensor = tensor.contiguous()
            else:
                step = 2 if operand.requires_grad else 1  # others: in place
                tensor = torch.stack([tensor.half()] * step, -1)[..., 0]
            operands[name] = tensor.requires_grad_(operand.requires_grad)
    assert_right(run, operands)


@pytest.mark.parametrize('run', [*SPECS, *NORMS])
def test_deterministic(monkeypatch, run, poison):
    """Equal bits twice; close ones with other numbers of programs."""
    monkeypatch.setitem(squeeze.KNOBS, 'few', 50)
    monkeypatch.setitem(responses.KNOBS, 'few', 50)
    shape = (2, 3, 3, 40) if run in CASTS else (2, 20, 9, 8)
    if run in (depthwise_conv2d, branches):
        shape = 1, 3, 3, 4
    # Of other convolutions, the kernels or their numbers are the same.
    slots = (3, 3, 1) if run not in CASTS or run is residual_conv else (3, 3)
    results = []
    for number in slots:
        monkeypatch.setattr(partial_sums, 'programs', lambda *_, n=number: n)
        operands = draw_operands(run, shape)
        out = outputs(kernels_of(run)(**operands))
        sum(y.sin().sum() for y in out).backward()
        results.append([*out, *(t.grad for t in leaves(operands))])
    for first, second, *others in zip(*results, strict=True):
        assert torch.equal(first, second)
        for other in others:
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


@EVERY_OPERATOR
def test_autocast(run):
    """It casts the maps of convolutions, and no weights."""
    operands = draw_operands(run, (2, 3, 2, 3))
    with torch.autocast(DEVICE, BRAIN):
        results = outputs(kernels_of(run)(**operands))
    last = [y for y in results if y.requires_grad][-1]
    grads = torch.autograd.grad(last.sum(), leaves(operands))
    assert {grad.dtype for grad in grads} == {SINGLE}
    if run in CASTS:
        operands['x'] = operands['x'].to(BRAIN)
    expected = outputs(kernels_of(run)(**operands))
    for actual, value in zip(results, expected, strict=True):
        assert actual.dtype == value.dtype
        assert torch.equal(actual, value)


@pytest.mark.parametrize(
    'run',
    [  # test_compile.py has these in blocks
        pytest.param(run, marks=pytest.mark.slow)
        if run in (conv_norm, feed_forward, branches)
        else run
        for run in SPECS
    ],
)
@symbols.patch(use_duck_shape=False)  # equal sizes need not stay equal
def test_compile(run):
    """The graph has no breaks, and sizes may change without a new one."""
    torch.compiler.reset()
    compiled = torch.compile(
        kernels_of(run), fullgraph=True, backend='aot_eager', dynamic=True
    )
    for shape, stance in (
        ((2, 4, 2, 3), 'default'),
        ((3, 4, 3, 2), 'fail_on_recompile'),
    ):
        operands = draw_operands(run, shape)
        with torch.compiler.set_stance(stance):
            assert_right(run, operands, compiled)


@pytest.mark.parametrize(
    'run, without',
    dict.fromkeys([*((run, '') for run in SPECS), *dict(CASES).items()]),
)
def test_registered(never_the_same, run, without):
    operands = draw_operands(run, (1, 2, 2, 3), without=without)
    with opchecked() as calls:
        results = outputs(kernels_of(run)(**operands))
        sum(y.sum() for y in results).backward()
    # Nothing runs backward where all gradients are that of the sum.
    both_ways = 1 + (without != 'weight bias keep')
    assert len(calls) == both_ways + (run is branches)  # which are measured


@pytest.mark.parametrize('run', [run for run in SPECS if run is not branches])
@pytest.mark.parametrize(
    'shape, dtype', [((0, 3, 4, 5), BRAIN), ((2, 3, 0, 5), SINGLE)]
)
def test_empty_map(run, shape, dtype):
    operands = draw_operands(run, shape, dtype)
    results = outputs(kernels_of(run)(**operands))
    assert results[0].shape[2:] == shape[2:]
    assert not any(y.any() for y in results)
    sum(y.sum() for y in results).backward()
    for tensor in leaves(operands):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    'run, without',
    [
        case
        for case in CASES
        if case[0] in (squeeze_excite, scaled_residual, update_prior)
    ],
)
def test_reference_under_autocast(run, without):
    """Maps stay in half precision, whatever the weights are in."""
    operands = draw_operands(run, (2, 6, 5, 4), BRAIN, without)
    with torch.autocast(DEVICE, BRAIN):
        y = run(**operands, backend='reference')
    assert y.dtype == BRAIN
    assert_close([y], [definition_of(run)(**exact(operands))], 2e-2)


def test_the_sum_is_in_single_precision():
    """Addends that vanish in half precision one by one do not together."""
    x = torch.full((1, 1, 1, 1), 256.0, device=DEVICE).bfloat16()
    y, weight, bias = x / 256, x.float() / 256, x.new_ones(1).float()
    y = scaled_residual(x, y, weight, bias, backend='triton')
    assert y.item() == 258  # 256 + 1 is 256


@pytest.mark.parametrize('run', filter(has_backend, SPECS))
def test_what_kernels_do_not_take(run, monkeypatch):
    operands = draw_operands(run, (1, 2, 3, 3))
    with pytest.raises(ValueError, match="'cudnn'.*'auto'.*'triton'"):
        run(**operands, backend='cudnn')
    with pytest.raises(ValueError, match='float64'):
        run(**exact(operands), backend='triton')
    monkeypatch.setattr(triton, 'JITFunction', object)  # not interpreted
    if DEVICE == 'cpu':
        with pytest.raises(ValueError, match='maps on a GPU, got one on cpu'):
            run(**operands, backend='triton')


def test_shapes_that_disagree():
    x, c = torch.ones(1, 2, 3, 3), torch.ones(2)
    one = torch.ones(2, 1, 1, 1)
    two = torch.ones(2, 2, 1, 1)
    taps, beta = torch.ones(3, 1, 3, 3), torch.ones(1, 1, 1, 1)
    for run, *operands, message in (
        (squeeze_excite, x, two, c, one, c, r'weight2.*\(2, 2, 1, 1\)'),
        (squeeze_excite, x, one, c, two, c, r'weight1.*\(2, 2, 1, 1\)'),
        (squeeze_excite, x, two, c, two, c, x[:, :1], 'gate'),
        (scaled_residual, x, x[:, :1], 'y has shape'),
        (scaled_residual, x, x, two, r'weight.*\(2, 1, 1, 1\)'),
        (scaled_residual, x, x, None, c, 'a bias needs a weight'),
        (scaled_residual, x, x, None, None, c, r'keep.*\(1,\)'),
        (update_prior, x, x[:, :, :2], one, c, one, c, 'initial'),
        (update_prior, x, x, one, c, one, c[:1], 'initial_bias'),
        (response_norm, x, one, one, r'gamma.*\(1, 2, 1, 1\)'),
        (response_norm, x, one.view(1, 2, 1, 1), beta, 'beta'),
        (residual_conv, x, taps, r'\(3, 1, 3, 3\).*\(2, 1, 3, 3\)'),
    ):
        with pytest.raises(ValueError, match=message):
            run(*operands)


@pytest.mark.parametrize('contiguous', [False, True])
@pytest.mark.parametrize(
    'lay_out',
    [
        channels_last,
        lambda grad: grad.mT.contiguous().mT,
        lambda grad: grad[:, :, :1, :1].expand_as(grad),
    ],
)
def test_layouts_of_gradients(contiguous, lay_out, poison):
    """Those of layer norms, which kernels read in two layouts."""
    operands = draw_operands(layer_norm, (3, 260, 5, 9))
    operands['contiguous'] = contiguous
    assert_right(layer_norm, operands, lay_out=lay_out)


@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_gelu_of_residual_conv():
    """The polynomial, from end to end."""
    x = torch.cat((torch.linspace(-12, 12, 97), torch.tensor([-1e30, 1e30])))
    x = x.to(DEVICE).view(1, 1, 1, -1).requires_grad_()
    weight = torch.zeros(1, 1, 3, 3, device=DEVICE)
    y = residual_conv(x, weight, gelu=True, backend='triton')
    (grad,) = torch.autograd.grad(y.sum(), x)
    other = x.detach().double().requires_grad_()
    expected = F.gelu(other)
    (slope,) = torch.autograd.grad(expected.sum(), other)
    for actual, value in ((y, expected), (grad, slope)):
        torch.testing.assert_close(
            actual.double(), value, rtol=4e-7, atol=4e-7
        )


@pytest.mark.parametrize(
    'kernel, most', [('forward', 64), ('backward', 64), ('forward', 512)]
)
def test_plan_of_residual_conv(kernel, most):
    """Multiprocessors are busy, which no result would tell."""
    for shape in ((128, 64, 56, 56), (2, 64, 200, 336), (128, 2048, 7, 7)):
        form = convolutions.KNOBS[kernel].of_channels(min(most, shape[1]))
        assert form.registers * 32 * form.warps * form.resident <= 65536
        slots = 132 * form.resident
        plan = convolutions.plan(shape, form, slots, most)
        lanes, _, strips, blocks, splits = plan
        assert splits * blocks <= slots
        tiles = -(-shape[0] * strips // lanes[0])
        turns = -(-tiles // splits)
        assert tiles * blocks / slots / turns > 0.75, shape


def test_dead_maps_of_feed_forward():
    """Channels that are zero everywhere have finite gradients."""
    operands = draw_operands(feed_forward, (1, 2, 3, 3))
    for name in ('x', 'bias1', 'conv_bias'):  # before the norm
        operands[name] = torch.zeros_like(operands[name], requires_grad=True)
    out = feed_forward(**operands)
    grads = torch.autograd.grad(out.sum(), leaves(operands), create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(NotImplementedError, match="take the backend 'refer"):
        grads[0].sum().backward()  # of gradients, there are none


@pytest.mark.parametrize('width, parts', [(7, 1), (28, 1), (40, 3), (70, 5)])
def test_parts_of_squares(width, parts, poison):
    """One of all strips that a program of 4 has, of the rounded map."""
    torch.manual_seed(0)
    x, weight = draw(3, 64, 2, width, dtype=BRAIN), draw(64, 1, 3, 3)
    y, sums = convolutions.forward(x, weight, squares=True)
    assert sums.shape == (3, parts, 64)
    torch.testing.assert_close(sums.sum(1), y.float().square().sum((2, 3)))


@pytest.mark.parametrize(
    'run, kernels, settings, shape, dtype',
    [
        # A few pixels at a time, or two launches
        (response_norm, responses, dict(values=128), (2, 20, 6, 5), SINGLE),
        (response_norm, responses, dict(few=29), (2, 20, 6, 5), SINGLE),
        # The hidden map is kept; others add up several parts, or launches do
        (feed_forward, networks, dict(repeated=3), (1, 4, 3, 2), SINGLE),
        (feed_forward, networks, dict(parts=3), (2, 22, 2, 40), SINGLE),
        (feed_forward, networks, dict(parts=2), (2, 50, 2, 40), HALF),
        (feed_forward, networks, dict(parts=1), (2, 50, 2, 40), HALF),
    ],
)
def test_forms(run, kernels, settings, shape, dtype, poison):
    """Of large maps, and of small ones, whichever their size is here."""
    assert settings.keys() <= kernels.KNOBS.keys()
    with mock.patch.dict(kernels.KNOBS, settings):
        assert_right(run, draw_operands(run, shape, dtype))


@pytest.mark.parametrize('dtype', [SINGLE, BRAIN])
def test_products_and_gradients_of_weights(dtype, poison):
    """Of GELU, of a part of a map, and what has a scale for each image."""
    torch.manual_seed(0)
    double = torch.Tensor.double
    x, y = draw(3, 70, 6, 5, dtype=dtype), draw(3, 35, 6, 5, dtype=dtype)
    weight, bias = draw(35, 70, 1, 1, dtype=dtype), draw(35)
    scale, shift, keep = draw(3, 70), draw(70), draw(3)
    out, _ = pointwise.product(x, weight, bias, gelu=True)
    expected = F.conv2d(F.gelu(double(x)), double(weight), bias.double())
    assert relative_error(out, expected) < TOLERANCES[dtype]

    scaled = double(x) * scale[..., None, None] + shift.view(-1, 1, 1)
    expected, products = [], []
    for map_, channels, others in (
        (double(x), 70, ()),
        (double(x)[:, :33], 33, ()),
        (F.gelu(double(x)), 70, (None, None, None, True)),
        (scaled * keep.view(-1, 1, 1, 1), 70, (scale, shift, keep)),
    ):
        outs = [draw(35, channels), draw(35)]
        operands = rows(y), rows(x[:, :channels])
        products.append(pointwise.WeightGrad(outs, *operands, *others))
        expected.append(rows(double(y)).mT @ rows(map_))
    partial_sums.add(make=pointwise.weight_grads, operands=products)
    for product, value in zip(products, expected, strict=True):
        assert relative_error(product.outs[0], value) < TOLERANCES[dtype]
        factor = 1 if product.keep is None else keep.view(-1, 1, 1, 1)
        value = (y.double() * factor).sum((0, 2, 3))
        assert relative_error(product.outs[1], value) < TOLERANCES[dtype]


def test_shares_of_gradients_of_weights():
    """Their programs run at a time; none has much more than another."""
    for items, blocks in (
        ((512, *[392] * 5, 98), (36, 12, 8, 8, 12, 4, 2)),  # 14 x 14
        ((128, *[98] * 6), (48, 16, 12, 12, 16, 6, 4)),  # 7 x 7
        ((6272,), (4,)),
        ((1,), (300,)),
    ):
        splits = pointwise._splits(items, blocks)
        assert all(1 <= s <= n for s, n in zip(splits, items, strict=True))
        programs = sum(map(mul, splits, blocks))
        assert programs <= max(pointwise.KNOBS['programs'], sum(blocks))
        longest = max(-(-n // s) for s, n in zip(splits, items, strict=True))
        work = sum(map(mul, items, blocks))
        assert longest <= 1.4 * max(1, work / pointwise.KNOBS['programs'])


def test_large_mean():
    """Differences are counted; parts are combined a few at a time."""
    operands = draw_operands(normalize, (5, 3, 4, 5))
    operands['x'] = (operands['x'].detach() + 3000).requires_grad_()
    with mock.patch.dict(batch_norm.KNOBS, PARTS=2):
        results = normalize(**operands)
    expected = normalize(**exact(operands), backend='reference')
    assert_close(results[:1], expected[:1], 1e-3)


def test_what_batch_norms_do_not_take():
    x, ones = draw(2, 3, 4, 5), torch.ones(1, 3)
    for other, message in (
        (x[:0], r'no empty map, got one of shape \(0, 3, 4, 5\)'),
        (x.double(), 'takes float32, float16 and bfloat16, got torch.float64'),
    ):
        (norm,) = make_norms(ones, ones)
        with pytest.raises(ValueError, match=message):
            sync_batch_norm(other, norm)
        assert norm.batches == 0


def test_rounding():
    """One dtype is left as it is; others are as PyTorch rounds."""
    x = draw(5)
    assert round_parameters(x.dtype, x)[0].data_ptr() == x.data_ptr()
    for rounded in round_parameters(BRAIN, x, x.bfloat16()):
        assert torch.equal(rounded, x.bfloat16())
