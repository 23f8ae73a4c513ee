"""The classifiers in MMPretrain: their names, and their losses.

A training is in test_stock_tools.py, parity with the release in
test_parity.py.
"""

from unittest import mock

import golden
import numpy as np
import pytest
import torch
from networks import noise
from tiny import ARCH
from torch.nn.functional import cross_entropy

from mmoverlock.models import OverLoCK
from mmoverlock.models.plain import RELEASE, OverLoCKClassifier
from mmoverlock.models.weights import add_prefixes

pytest.importorskip('mmpretrain')

from mmpretrain import get_model, inference_model, list_models
from mmpretrain.structures import DataSample

from mmoverlock import hub
from mmoverlock.models.classification import OverLoCKClsHead


def test_hub(monkeypatch):
    """Every weight of the released file arrives, and images are classified.

    With its two prefixes, the state dict is exactly the release's.
    """
    hub.register()
    hub.register()  # changes nothing
    names = [f'overlock_{arch}_300e' for arch in ('b', 's', 't', 'xt')]
    assert list_models('overlock*') == names
    state = golden.state_dict(golden.load('keys_cls_xt'))
    read = mock.Mock(return_value={'state_dict': state})
    monkeypatch.setattr(hub, 'read', read)
    model = get_model('overlock_xt_300e', pretrained=True)
    read.assert_called_once_with(f'{RELEASE}overlock_xt_in1k_224.pth')
    own, wanted = model.state_dict(), add_prefixes(state)
    assert own.keys() == wanted.keys()
    for name, value in own.items():
        assert torch.equal(value, wanted[name].to(value)), name
    plain = OverLoCKClassifier('xt', aux_head=True).eval()
    plain.load_state_dict(state)
    x = noise(2, 3, 64, 96)
    with torch.no_grad():
        logits = model.eval().head(model.extract_feat(x))
        torch.testing.assert_close(logits, plain(x))
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    result = inference_model(model, image)
    assert result['pred_scores'].shape == (1000,)
    classes = model._dataset_meta['classes']
    assert result['pred_class'] == classes[result['pred_label']]


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
def test_inference(parts):
    """It does without the auxiliary head, whose weights are drawn alike."""
    _, head, feats = parts
    weights = [weight for weight in head.parameters() if weight.ndim > 1]
    assert len(weights) == 3
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.02, rel=0.3)
    del head.eval().aux_head
    first, _ = head.predict(feats)
    hidden = head.pre_logits(feats)[..., None, None]
    logits = head.head[-1](hidden).flatten(1)
    torch.testing.assert_close(first.pred_score, logits[0].softmax(0))
