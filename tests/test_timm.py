"""OverLoCK in timm: what timm's own tests ask of every model.

Not among it are TorchScript and symbolic tracing, which the network does not
take. What the classifier does alone is in test_plain.py.
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny import ARCH as TINY
from tiny import randomize

# Where `make env` has it: without it on the path, mmseg does not import it.
sys.path.append(str(Path(sys.prefix, 'timm')))
timm = pytest.importorskip('timm')

import mmoverlock.timm  # noqa: E402
from mmoverlock import OverLoCK, overlock_xt  # noqa: E402
from mmoverlock.models.weights import add_prefixes  # noqa: E402

BLOCKS = dict(overlock_b=54, overlock_s=42, overlock_t=30, overlock_xt=17)


@pytest.fixture
def create(monkeypatch):
    """A function that creates 'overlock_xt', which is tiny here."""
    monkeypatch.setitem(OverLoCK.arch_zoo, ('xt', 'extreme-tiny'), TINY)
    return lambda **kwargs: timm.create_model('overlock_xt', **kwargs)


def test_names_are_registered():
    assert timm.list_models('overlock*') == [*BLOCKS]
    tagged = [f'{name}.in1k' for name in BLOCKS]
    assert timm.list_models('overlock*', pretrained=True) == tagged
    assert {*mmoverlock.timm.__all__} == {*BLOCKS} < {*mmoverlock.__all__}
    for name, blocks in BLOCKS.items():
        model = timm.create_model(name, device='meta')
        assert sum(model.depths) == blocks
        cfg = model.pretrained_cfg
        assert cfg['url'].endswith(f'/{name}_in1k_224.pth')
        assert cfg['interpolation'] == 'bicubic' and cfg['crop_pct'] > 0.9


def test_classifier(create):
    model = create(device='meta').eval()
    cfg = model.default_cfg
    images = torch.empty(1, *cfg['input_size'], device='meta')
    assert model.in_chans == images.shape[1]
    for layer in cfg['first_conv'], cfg['classifier']:
        assert f'{layer}.weight' in model.state_dict()
    assert [info['num_chs'] for info in model.feature_info] == [8, 16, 32, 40]
    features = model.forward_features(images)
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert model(images).shape == (1, 1000)
    maps = create(num_classes=0, global_pool='').eval().to('meta')
    assert maps(images).shape == (1, 1024, 7, 7)


def test_groups_and_recomputation(create):
    from timm.models import group_parameters

    model = create()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['patch_embed1.0.weight'] == 0
    assert groups['head.4.weight'] == max(groups.values())
    assert len(set(groups.values())) == sum(model.depths) + 2
    for enable in True, False:
        model.set_grad_checkpointing(enable)
        assert {*model.checkpointed.values()} == {int(enable)}


@pytest.mark.parametrize('given, expected', [(2, (2, 3)), ([0, -1], (0, 3))])
def test_features_only(create, given, expected):
    unused = dict(num_classes=0, global_pool='')
    model = create(features_only=True, out_indices=given, in_chans=4, **unused)
    widths = [(8, 16, 32, 40)[i] for i in expected]
    strides = [4 * 2**i for i in expected]
    assert model.feature_info.channels() == widths
    assert model.feature_info.reduction() == strides
    maps = model(torch.randn(2, 4, 64, 96))
    assert isinstance(maps, list)
    for item, width, stride in zip(maps, widths, strides, strict=True):
        assert item.shape == (2, width, 64 // stride, 96 // stride)


@pytest.mark.parametrize('change', [dict, add_prefixes])
def test_pretrained(change, create, tmp_path):
    """Files of the release and of MMPretrain, for any channels and classes."""
    state = randomize(overlock_xt(aux_head=True)).state_dict()
    path = str(tmp_path / 'file.pth')
    torch.save({'state_dict': change(state)}, path)
    file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))

    def assert_loaded(model, but=('extra_norm',)):
        own = model.state_dict()
        for name, weight in own.items():
            if not name.startswith(but):
                assert torch.equal(weight, state[name]), name
        return own

    own = assert_loaded(create(**file))
    assert own.keys() == {n for n in state if not n.startswith('aux')}
    assert_loaded(create(**file, features_only=True, out_indices=(0, 1)))
    assert_loaded(create(checkpoint_path=path))
    assert_loaded(create(checkpoint_path=path, features_only=True))

    stem, last = 'patch_embed1.0.weight', ('head.4', 'aux_head.2')
    model = create(**file, num_classes=5, in_chans=1, aux_head=True)
    own = assert_loaded(model, (stem, *last))
    assert {len(own[f'{name}.weight']) for name in last} == {5}
    gray = state[stem].sum(1, keepdim=True)
    torch.testing.assert_close(own[stem], gray)
