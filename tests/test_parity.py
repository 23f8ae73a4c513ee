"""Agreement with the released dense predictors, in float64."""

import golden
import pytest
import torch

from mmoverlock.models import OverLoCK


def build(name, **kwargs):
    figures = golden.load(name)
    task, arch = figures['task'], figures['arch']
    with torch.device('meta'):
        model = OverLoCK(arch, fuse_overview=task == 'det', **kwargs)
    state = golden.state_dict(golden.load(f'keys_{task}_{arch}'))
    model.load_state_dict(state, assign=True)
    return figures, golden.image(figures['input']), model


@pytest.mark.parametrize(
    'task, arch', [('det', 'xt'), ('det', 't'), ('seg', 'xt'), ('seg', 's')]
)
def test_names_and_shapes(task, arch):
    """The state dict has exactly the names and shapes of the release."""
    with torch.device('meta'):
        model = OverLoCK(arch, fuse_overview=task == 'det')
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == golden.load(f'keys_{task}_{arch}')


@pytest.mark.parametrize(
    'name, backend, merged',
    [
        ('det_xt_64x64', 'reference', False),
        ('det_xt_2x96x160', 'tiled', True),
        ('det_xt_224x224', 'reference', False),
        ('det_t_224x288', 'tiled', False),
        ('seg_xt_128x128', 'tiled', True),
        ('seg_s_96x128', 'tiled', False),
    ],
)
@torch.no_grad()
def test_inference(name, backend, merged):
    figures, image, model = build(name, contmix_backend=backend)
    golden.assert_outputs_agree(model.eval()(image), figures)
    if merged:
        outputs = model.switch_to_deploy()(image)
        golden.assert_outputs_agree(outputs, figures)


def test_training():
    """Outputs, gradients and buffers of a training step."""
    figures, image, model = build('det_t_train_2x96x64')
    image.requires_grad_()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    golden.assert_training_agrees(model(image), image, tensors, figures)
