"""Agreement with the released dense predictors, in float64."""

import golden
import pytest
import torch

from mmoverlock.models import OverLoCK


def build(name, **kwargs):
    """With exactly the names and shapes of the release."""
    figures = golden.load(name)
    task, arch = figures['task'], figures['arch']
    with torch.device('meta'):
        model = OverLoCK(arch, fuse_overview=task == 'det', **kwargs)
    shapes = golden.load(f'keys_{task}_{arch}')
    assert {k: [*v.shape] for k, v in model.state_dict().items()} == shapes
    model.load_state_dict(golden.state_dict(shapes), assign=True)
    return figures, golden.image(figures['input']), model


@pytest.mark.parametrize(
    'name, backend, merged',
    [
        ('det_xt_64x64', 'reference', False),
        ('det_xt_2x96x160', 'tiled', False),
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
