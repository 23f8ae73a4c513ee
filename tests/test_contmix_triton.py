"""ContMix as Triton kernels, against the definition.

Without a GPU they run in Triton's interpreter (see conftest.py), where they
take double precision too.
"""

from unittest import mock

import pytest
import torch
from kernels import DEVICE, opchecked, relative_error
from test_contmix import call, differentiate, draw

triton = pytest.importorskip('triton', '3.6')
tl = pytest.importorskip('triton.language')
contmix_triton = pytest.importorskip('mmoverlock.ops.dynamic_conv.triton')
common, windows = contmix_triton.common, contmix_triton.windows

EXACT = torch.float64 if DEVICE == 'cpu' else torch.float32
# Errors relative to the largest number
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def here(operands, dtype=EXACT, maps=None):
    """Operands on the device, in a dtype, query and value in another one."""
    return {
        name: tensor.detach()
        .to(DEVICE, maps or dtype if name in ('query', 'value') else dtype)
        .requires_grad_()
        for name, tensor in operands.items()
    }


def check(actual, operands, tolerance, layout='contiguous'):
    expected = differentiate(operands, 'reference', layout)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        if one.numel() == 0:
            continue
        error = (one.cpu().double() - other).abs()
        assert (error <= tolerance * other.abs().amax()).all()


@pytest.mark.parametrize(
    'shape, kernel_size, groups, channels, layout, rows',
    [
        ((1, 7, 7), 7, 1, (3, 2), 'contiguous', 4),  # as small as the kernel
        ((2, 5, 12), 5, 2, (3, 2), 'channels_last', 8),
        ((1, 11, 5), 5, 1, (16, 16), 'strided', 4),
        ((1, 3, 37), 3, 1, (20, 9), 'contiguous', 4),  # two tiles of pixels
        ((1, 14, 19), 13, 1, (8, 8), 'channels_last', 16),
        pytest.param(  # wider rows of taps
            *((1, 17, 17), 17, 1, (1, 1), 'contiguous', 16),
            marks=pytest.mark.slow,
        ),
        ((2, 5, 6), 5, 2, (3, 2), 'strided', 4),  # the large one by 2 classes
        ((3, 5, 5), 5, 1, (3, 2), 'channels_last', 4),  # the small one by 9
        ((0, 9, 9), 7, 2, (3, 2), 'contiguous', 4),
        ((1, 3, 3), 3, 1, (3, 2), 'expanded', 4),
    ],
)
def test_agrees_with_reference(
    shape, kernel_size, groups, channels, layout, rows, monkeypatch, poison
):
    """Outputs and all gradients; taller tiles take the interpreter less."""
    if DEVICE == 'cpu':
        monkeypatch.setitem(windows.KNOBS, 'ROWS', rows)
    if shape[0] > 1:  # programs go through several images
        monkeypatch.setitem(contmix_triton.classes.KNOBS, 'PROGRAMS', 1)
        monkeypatch.setitem(contmix_triton.mix.KNOBS, 'PROGRAMS', 1)
        monkeypatch.setitem(contmix_triton.mix.KNOBS, 'IMAGES', 2)
    operands = draw(*shape, kernel_size, groups, channels)
    actual = differentiate(here(operands), 'triton', layout)
    check(actual, operands, TOLERANCES[EXACT], layout)


@pytest.mark.parametrize(
    'maps', [torch.float32, torch.float16, torch.bfloat16]
)
def test_formats(maps):
    """Maps in a format, the rest in single precision; equal bits twice."""
    operands = draw(1, 5, 6, 3, groups=1, channels=(4, 3))
    rounded = here(operands, torch.float32, maps)
    actual = differentiate(rounded, 'triton')
    assert all(map(torch.equal, actual, differentiate(rounded, 'triton')))
    assert actual[0].dtype == actual[1].dtype == actual[3].dtype == maps
    operands = {k: v.detach().cpu().double() for k, v in rounded.items()}
    operands = {k: v.requires_grad_() for k, v in operands.items()}
    check(actual, operands, TOLERANCES[maps])


def test_logits_are_made_in_single_precision():
    """Some are hundreds, whose differences TF32 rounds off."""
    operands = draw(1, 5, 6, 3, groups=1, channels=(16, 2))
    for name in ('query', 'key'):
        operands[name] = 10 * operands[name]
    expected = call(operands, 'reference')
    actual = call(here(operands, torch.float32), 'triton').cpu()
    assert relative_error(actual, expected) < 1e-3


SIZES = [
    (3, 4, 3),  # both by classes
    (9, 5, 5),  # the larger one by classes
    (6, 9, 5),  # both by windows
]


@pytest.mark.parametrize('size', SIZES)
def test_gradient_of_the_value_added_to_another_one(size):
    query, key, value, *weights = here(draw(1, *size)).values()
    inputs = [t.detach() for t in (query, key, *weights, value)]
    outputs = contmix_triton._mix(*inputs, 1.0)
    grad, other = torch.randn_like(value), torch.randn_like(value)
    results = torch.empty_like(other), other.clone()
    for result, adds in zip(results, (False, True), strict=True):
        contmix_triton.backward(grad, inputs, 1.0, outputs, result, adds)
    torch.testing.assert_close(results[1], results[0] + other)


@pytest.mark.parametrize('size', SIZES)
def test_custom_operator_is_well_formed(never_the_same, size):
    operands = here(draw(1, *size, groups=1, channels=(1, 1)))
    with opchecked() as calls:
        call(operands, 'triton').sum().backward()
    assert len(calls) == 2


@triton.jit
def _write_offsets(p_out, strides):
    image = tl.program_id(0)
    tl.store(p_out + image, common.map_offset(image, image, strides))


def test_offsets_of_images_have_64_bits():
    """Even if indices and strides have 32."""
    strides = 2**31 - 1, 2**30
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _write_offsets[(4,)](out, strides)
    assert out.tolist() == [image * sum(strides) for image in range(4)]


def test_offsets_within_an_image():
    """They have 32 bits: a map that is too wide is copied."""
    narrow, wide = (
        torch.empty_strided((2, 3, 5, 6), (2**40, 1, 2**k, 7), device='meta')
        for k in (28, 29)
    )
    assert contmix_triton._narrow(narrow) is narrow
    with mock.patch.object(
        contmix_triton, 'channels_last', lambda x: 'copied'
    ):
        assert contmix_triton._narrow(wide) == 'copied'


def test_cpu(monkeypatch):
    monkeypatch.setattr(contmix_triton, 'INTERPRET', False)
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        call(draw(1, 3, 4, 3), 'triton')
