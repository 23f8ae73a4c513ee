"""Outputs of the released networks, as numbers: `tests/data`.

`keys_<task>_<arch>.json` has the names and shapes of the released model's
parameters and buffers, `heads_<task>.json` the names of what the release's
mmdet or mmseg has beside it, the other files its outputs (in training mode
also gradients and buffers) for the weights and input that are drawn here, in
float64. Every tensor is drawn from a generator seeded by its name.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / 'data'


def load(name):
    return json.loads((DATA / f'{name}.json').read_text())


def _generator(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def _draw(name, shape):
    rng = _generator(name)
    if name.endswith('running_mean'):
        return 0.1 * rng.standard_normal(shape)
    if name.endswith('running_var'):
        return rng.uniform(0.5, 1.5, shape)
    if 'rpb' in name:
        return 0.5 * rng.standard_normal(shape)
    if name.endswith(('gamma', 'beta')):
        return 0.3 * rng.standard_normal(shape)
    if len(shape) == 4 and shape[1:] == (1, 1, 1):  # layer scale
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) == 4:  # convolution
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    if name.endswith('weight'):  # norm
        return rng.uniform(0.3, 0.6, shape)
    return 0.05 * rng.standard_normal(shape)


def state_dict(shapes):
    """A state dict of drawn weights, for shapes by name."""
    return {
        name: torch.tensor(0)
        if name.endswith('num_batches_tracked')
        else torch.from_numpy(_draw(name, tuple(shape)))
        for name, shape in shapes.items()
    }


def _normal(name, shape):
    shape = tuple(shape)
    draw = _generator(f'{name}{shape}').standard_normal(shape)
    return torch.from_numpy(draw)


def image(shape):
    return _normal('image', shape)


def assert_agrees(name, tensor, figures):
    """Norm and sampled values agree to a relative 1e-9."""
    assert list(tensor.shape) == figures['shape'], name
    flat = tensor.detach().flatten()
    sampled = _generator(f'sample {name} {len(flat)}').integers(
        0, len(flat), len(figures['values'])
    )
    # A gradient that is zero but for rounding has no relative error.
    scale = 1 if figures['norm'] < 1e-12 else flat.abs().max().item()
    expected = torch.tensor(figures['values'], dtype=torch.float64)
    error = (flat[sampled] - expected).abs().max().item()
    assert error <= 1e-9 * scale, f'{name}: values differ by {error}'
    error = abs(flat.norm().item() - figures['norm'])
    assert error <= 1e-9 * max(scale, figures['norm']), f'{name}: norm'


def assert_outputs_agree(outputs, figures):
    assert len(outputs) == len(figures['outputs'])
    for output, name in zip(outputs, figures['outputs'], strict=True):
        assert_agrees(name, output, figures['outputs'][name])


def assert_training_agrees(outputs, image, tensors, figures):
    """Outputs, gradients and buffers of a training step agree.

    Args:
        outputs (Sequence[Tensor]): The outputs.
        image (Tensor): The input, which requires a gradient.
        tensors (dict[str, Tensor]): Parameters and buffers.
        figures (dict): What a training file holds.
    """
    assert_outputs_agree(outputs, figures)
    loss = sum(
        (output * _normal(f'cotangent {name} ', output.shape)).sum()
        for output, name in zip(outputs, figures['outputs'], strict=True)
    )
    loss.backward()
    assert_agrees('grad input', image.grad, figures['input_grad'])
    for key, expected in figures['grads'].items():
        assert_agrees(f'grad {key}', tensors[key].grad, expected)
    for key, expected in figures['buffers'].items():
        assert_agrees(f'buffer {key}', tensors[key], expected)
