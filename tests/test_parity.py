"""Agreement with the released dense predictors, in float64."""

import golden
import pytest
import torch

from mmoverlock.models import OverLoCK

FILES = golden.files('det', 'seg')


def build(figures, **kwargs):
    task, arch = figures['task'], figures['arch']
    model = OverLoCK(arch, fuse_overview=task == 'det', **kwargs).double()
    keys = golden.load(f'keys_{task}_{arch}')
    model.load_state_dict(golden.state_dict(keys))
    return model.train(figures['train'])


def test_there_are_files():
    assert len(FILES) == 7


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
    [(name, 'tiled') for name in FILES if 'train' not in name]
    + [('det_xt_224x224', 'reference'), ('det_xt_64x64', 'reference')],
)
def test_inference(name, backend):
    figures = golden.load(name)
    model = build(figures, contmix_backend=backend)
    image = golden.image(figures['input'])
    with torch.no_grad():
        golden.assert_outputs_agree(model(image), figures)
        model.switch_to_deploy()
        golden.assert_outputs_agree(model(image), figures)
        # The merged weights are what a model built merged has.
        deployed = OverLoCK(
            figures['arch'],
            fuse_overview=model.fuse_overview,
            deploy=True,
            contmix_backend=backend,
        ).double()
        deployed.load_state_dict(model.state_dict())
        golden.assert_outputs_agree(deployed.eval()(image), figures)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('name', [f for f in FILES if 'train' in f])
def test_training(name, with_cp):
    """Outputs, gradients and buffers of a training step."""
    figures = golden.load(name)
    model = build(figures, with_cp=with_cp)
    image = golden.image(figures['input']).requires_grad_()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    golden.assert_training_agrees(model(image), image, tensors, figures)
