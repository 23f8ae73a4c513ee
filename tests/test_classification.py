"""The classifiers: parity with the release, and their losses.

A training is in test_stock_tools.py.
"""

import golden
import pytest
import torch
from mmengine.config import Config
from networks import noise
from tiny import ARCH, ROOT
from torch.nn.functional import cross_entropy

from mmoverlock.models import OverLoCK

pytest.importorskip('mmpretrain')

from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmoverlock.models.classification import OverLoCKClsHead
from mmoverlock.models.weights import remove_prefixes


def classifier(arch):
    """That of a config, in float64, with the weights of the golden figures.

    With its two prefixes, the state dict is exactly the release's.
    """
    init_default_scope('mmpretrain')
    path = ROOT / f'configs/imagenet/overlock_{arch}_300e.py'
    cfg = Config.fromfile(path).model
    cfg.backbone.drop_path_rate = 0.0
    with torch.device('meta'):
        model = MODELS.build(cfg)
    state = model.state_dict()
    assert all(name.startswith(('backbone.', 'head.')) for name in state)
    shapes = {k: [*v.shape] for k, v in remove_prefixes(state).items()}
    if arch != 'b':
        assert shapes == golden.load(f'keys_cls_{arch}')
    drawn = golden.state_dict(shapes).values()
    model.load_state_dict(dict(zip(state, drawn, strict=True)), assign=True)
    return model


@pytest.mark.parametrize('name', ['cls_t_160', 'cls_b_96'])
@torch.no_grad()
def test_inference(name):
    """That of xt, and of its merged form, is in test_plain.py."""
    figures = golden.load(name)
    model = classifier(figures['arch']).eval()
    logits = model(golden.image(figures['input']))
    golden.assert_outputs_agree([logits], figures)


def test_training():
    """Both logits, gradients and buffers of a training step."""
    figures = golden.load('cls_xt_train_4x64')
    model = classifier('xt').train()
    x = golden.image(figures['input']).requires_grad_()
    feats = model.extract_feat(x)
    logits = model.head(feats), model.head.aux_logits(feats)
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = remove_prefixes(dict(named))
    golden.assert_training_agrees(logits, x, tensors, figures)


@pytest.fixture
def parts():
    """A backbone, a head and what the head reads of two images."""
    torch.manual_seed(0)
    backbone = OverLoCK(ARCH, classifier=True)
    head = OverLoCKClsHead(5, backbone.out_channels)
    head.init_weights()
    return backbone, head, backbone(noise(2, 3, 64, 64))


def test_losses(parts):
    """Cross entropies, from which every parameter gets a gradient."""
    backbone, head, feats = parts
    assert backbone.out_strides == (32, 32)
    samples = [DataSample().set_gt_label(label) for label in (1, 3)]
    losses = head.loss(feats, samples)
    main, aux = (
        cross_entropy(logits, torch.tensor([1, 3]))
        for logits in (head(feats), head.aux_logits(feats))
    )
    expected = dict(loss_cls=main, loss_aux=0.4 * aux)
    torch.testing.assert_close(losses, expected)
    sum(losses.values()).backward()
    for module in (backbone, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad.isfinite().all(), name
    # They are in single precision, whatever the head is in.
    feats = [output.bfloat16() for output in feats]
    losses = head.bfloat16().loss(feats, samples)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match='classifier=True.*got 4'):
        head([*feats, *feats])


@torch.no_grad()
def test_inference_does_without_the_auxiliary_head(parts):
    _, head, feats = parts
    del head.eval().aux_head
    first, _ = head.predict(feats)
    hidden = head.pre_logits(feats)[..., None, None]
    logits = head.head[-1](hidden).flatten(1)
    torch.testing.assert_close(first.pred_score, logits[0].softmax(0))


def test_initialization(parts):
    _, head, _ = parts
    weights = [weight for weight in head.parameters() if weight.ndim > 1]
    assert len(weights) == 3
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.02, rel=0.3)
