"""The classifiers by name in MMPretrain's functions."""

from unittest import mock

import numpy as np
import pytest
import torch
from golden import load, state_dict

pytest.importorskip('mmpretrain')

from mmpretrain import get_model, inference_model, list_models  # noqa: E402

from mmoverlock import hub  # noqa: E402

RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'


def test_pretrained(monkeypatch):
    """Every weight of the released file arrives, and images are classified."""
    hub.register()
    hub.register()  # changes nothing
    names = [f'overlock_{arch}_300e' for arch in ('b', 's', 't', 'xt')]
    assert list_models('overlock*') == names
    state = state_dict(load('keys_cls_xt'))
    read = mock.Mock(return_value={'state_dict': state})
    monkeypatch.setattr(hub, 'read', read)
    model = get_model('overlock_xt_300e', pretrained=True)
    read.assert_called_once_with(f'{RELEASE}overlock_xt_in1k_224.pth')
    own = model.state_dict()
    assert len(own) == len(state)
    for name, value in hub.add_prefixes(state).items():
        assert torch.equal(own[name], value.to(own[name])), name
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    result = inference_model(model, image)
    assert result['pred_scores'].shape == (1000,)
    classes = model._dataset_meta['classes']
    assert result['pred_class'] == classes[result['pred_label']]
