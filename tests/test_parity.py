"""Agreement with the released networks, in float64."""

import golden
import pytest
import torch

from mmoverlock.models import OverLoCK


def build(figures, **kwargs):
    task, arch = figures['task'], figures['arch']
    model = OverLoCK(arch, fuse_overview=task == 'det', **kwargs).double()
    keys = golden.load(f'keys_{task}_{arch}')
    model.load_state_dict(golden.state_dict(keys))
    return model.train(figures['train'])


def assert_outputs_agree(outputs, figures):
    assert len(outputs) == len(figures['outputs'])
    for i, output in enumerate(outputs):
        golden.assert_agrees(f'out{i}', output, figures['outputs'][f'out{i}'])


def test_there_are_files():
    assert len(golden.FILES) == 7


@pytest.mark.parametrize(
    'task, arch', [('det', 'xt'), ('det', 't'), ('seg', 'xt'), ('seg', 's')]
)
def test_names_and_shapes(task, arch):
    """The state dict has exactly the names and shapes of the release."""
    model = OverLoCK(arch, fuse_overview=task == 'det')
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == golden.load(f'keys_{task}_{arch}')


@pytest.mark.parametrize(
    'name, backend',
    [(name, 'tiled') for name in golden.FILES if 'train' not in name]
    + [('det_xt_224x224', 'reference'), ('det_xt_64x64', 'reference')],
)
def test_inference(name, backend):
    figures = golden.load(name)
    model = build(figures, contmix_backend=backend)
    image = golden.image(figures['input'])
    with torch.no_grad():
        assert_outputs_agree(model(image), figures)
        model.switch_to_deploy()
        assert_outputs_agree(model(image), figures)
        # The merged weights are what a model built merged has.
        deployed = OverLoCK(
            figures['arch'],
            fuse_overview=model.fuse_overview,
            deploy=True,
            contmix_backend=backend,
        ).double()
        deployed.load_state_dict(model.state_dict())
        assert_outputs_agree(deployed.eval()(image), figures)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('name', [f for f in golden.FILES if 'train' in f])
def test_training(name, with_cp):
    """Outputs, gradients and buffers of a training step."""
    figures = golden.load(name)
    model = build(figures, with_cp=with_cp)
    image = golden.image(figures['input']).requires_grad_()
    outputs = model(image)
    assert_outputs_agree(outputs, figures)
    loss = sum(
        (output * golden.cotangent(f'out{i}', output)).sum()
        for i, output in enumerate(outputs)
    )
    loss.backward()
    golden.assert_agrees('grad input', image.grad, figures['input_grad'])
    for key, expected in figures['grads'].items():
        gradient = model.get_parameter(key).grad
        golden.assert_agrees(f'grad {key}', gradient, expected)
    for key, expected in figures['buffers'].items():
        golden.assert_agrees(f'buffer {key}', model.get_buffer(key), expected)
