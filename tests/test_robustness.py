"""Any input that is an image works; anything else is an error that says so."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import backbone, loss_of, noise, step

repeatable = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # looking for the smallest failure takes minutes
)

sides = st.integers(1, 80)
images = st.tuples(st.integers(1, 2), st.integers(1, 4), sides, sides)
options = st.fixed_dictionaries(
    dict(
        out_indices=st.sets(st.integers(0, 3), min_size=1).map(sorted),
        drop_path_rate=st.sampled_from([0.0, 0.5]),
        frozen_stages=st.integers(-1, 4),
        norm_eval=st.booleans(),
        with_cp=st.booleans()
        | st.lists(st.integers(0, 2), min_size=6, max_size=6),
        norm_cfg=st.none() | st.just(dict(type='BN', requires_grad=False)),
        contmix_backend=st.sampled_from(['auto', 'tiled', 'reference']),
    )
)


def assert_maps(model, outputs, shape):
    for output, channels, stride in zip(
        outputs, model.out_channels, model.out_strides, strict=True
    ):
        size = (math.ceil(n / stride) for n in shape[2:])
        assert output.shape == (shape[0], channels, *size)
        assert output.is_contiguous() and output.isfinite().all()


@repeatable
@given(images, options)
def test_training(shape, kwargs):
    """All sizes, channels and options; gradients are finite."""
    model = backbone(in_channels=shape[1], **kwargs).train()
    x = noise(*shape).requires_grad_()
    try:
        outputs = model(x)
    except ValueError as error:  # see test_one_small_image
        assert 'use larger images' in str(error)
        assert shape[0] == 1 and max(shape[2:]) <= 32
        return
    assert_maps(model, outputs, shape)
    loss_of(outputs).backward()
    assert x.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_weights_from_outside():
    """As functional_call gives them: outputs, gradients and statistics."""
    model, x = backbone().train(), noise(2, 3, 40, 52)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    other = backbone().requires_grad_(False).train()
    for weight in (*other.parameters(), *other.buffers()):
        weight.zero_()
    maps, grads, statistics = step(model, x)
    for name in grads:
        state[name].requires_grad_()
    outs = torch.func.functional_call(other, state, (x,))
    loss_of(outs).backward()
    own = [state[name] for name in statistics]
    given = [*outs, *(state[name].grad for name in grads), *own]
    expected = [*maps, *grads.values(), *statistics.values()]
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


@repeatable
@given(images, options, st.sampled_from(['columns', 'part', 'last']))
def test_inference(shape, kwargs, layout):
    """Equal in every memory layout, and after merging; in double precision."""
    model = backbone(in_channels=shape[1], **kwargs).double().eval()
    x = noise(*shape).double()
    expected = model(x)
    assert_maps(model, expected, shape)
    around = torch.zeros(*shape[:2], 90, 90).double()
    part = around[..., 1 : shape[2] + 1, 1 : shape[3] + 1]
    other = {
        'columns': x.mT.contiguous().mT,
        'part': part.copy_(x),
        'last': x.contiguous(memory_format=torch.channels_last),
    }[layout]
    with torch.no_grad():
        torch.testing.assert_close(model(other), expected)
        model.switch_to_deploy()
        torch.testing.assert_close(model(other), expected)


@pytest.mark.parametrize(
    'shape, dtype',
    [
        ((2, 3, 16, 400), torch.float),
        ((2, 3, 1, 1), torch.half),
        ((1, 3, 33, 40), torch.bfloat16),
    ],
)
def test_extreme_sizes(shape, dtype, poison):
    """And a batch of nothing, as from a filter that leaves nothing.

    Gradients are finite, of a scaled loss in mixed precision.
    """
    model = backbone(fuse_overview=True).train()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float):
        outputs = model(noise(*shape))
        assert_maps(model, outputs, shape)
        loss = loss_of(outputs)
    (loss * 2.0**10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    empty = 0, *shape[1:]
    assert_maps(model, model.eval()(noise(*empty)), empty)


def test_one_small_image():
    """It trains where batch norms do not count it."""
    backbone().train()(noise(1, 3, 33, 32))
    backbone(out_indices=(0,)).train()(noise(1, 3, 5, 1))
    backbone(norm_eval=True).train()(noise(1, 3, 32, 32))


@pytest.mark.parametrize(
    'shape, dtype, message',
    [
        ((3, 64, 64), torch.float, r'\(B, 3, H, W\).*got \(3, 64, 64\)'),
        ((1, 4, 64, 64), torch.float, r'got \(1, 4, 64, 64\)'),
        ((1, 3, 0, 64), torch.float, r'at least 1, got \(1, 3, 0, 64\)'),
        ((1, 3, 64, 64), torch.uint8, 'floating.*uint8'),
        ((1, 3, 32, 32), torch.float, r'\(1, 3, 32, 32\).*stride 32.*norm'),
        ((0, 3, 64, 64), torch.float, r'\(0, 3, 64, 64\) is 0 at'),
    ],
)
def test_bad_input(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        backbone().train()(torch.zeros(shape, dtype=dtype))
