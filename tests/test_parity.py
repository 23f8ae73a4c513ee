"""Agreement with the released models, in float64."""

import golden
import pytest
import torch

from mmoverlock import OverLoCK, OverLoCKClassifier
from mmoverlock.models.fuse import fuse


def build(name, backend='auto'):
    """With exactly the names and shapes of the release."""
    figures = golden.load(name)
    task, arch = figures['task'], figures['arch']
    options = dict(contmix_backend=backend)
    with torch.device('meta'):
        if task == 'cls':
            model = OverLoCKClassifier(arch, aux_head=True, **options)
        else:
            model = OverLoCK(arch, fuse_overview=task == 'det', **options)
    shapes = {k: [*v.shape] for k, v in model.state_dict().items()}
    if arch != 'b':
        assert shapes == golden.load(f'keys_{task}_{arch}')
    model.load_state_dict(golden.state_dict(shapes), assign=True)
    return figures, golden.image(figures['input']), model


@pytest.mark.parametrize(
    'name, backend, fused',
    [
        ('det_xt_64x64', 'reference', False),
        ('det_xt_2x96x160', 'tiled', False),
        ('det_xt_224x224', 'reference', False),
        ('det_t_224x288', 'tiled', False),
        ('seg_xt_128x128', 'tiled', True),
        ('seg_s_96x128', 'tiled', False),
        ('cls_xt_224', 'auto', True),
        ('cls_t_160', 'auto', False),
        ('cls_b_96', 'auto', False),
    ],
)
@torch.no_grad()
def test_inference(name, backend, fused):
    figures, image, model = build(name, backend)
    forms = type(model).eval, type(model).switch_to_deploy, fuse
    for form in forms if fused else forms[:1]:
        outputs = form(model)(image)
        outputs = outputs if isinstance(outputs, tuple) else [outputs]
        golden.assert_outputs_agree(outputs, figures)


@pytest.mark.parametrize('name', ['det_t_train_2x96x64', 'cls_xt_train_4x64'])
def test_training(name):
    """Outputs, gradients and buffers of a training step."""
    figures, image, model = build(name)
    image.requires_grad_()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    golden.assert_training_agrees(model(image), image, tensors, figures)
