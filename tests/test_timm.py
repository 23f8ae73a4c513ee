"""OverLoCK in timm: what timm's own tests ask of every model.

Not among it are TorchScript and symbolic tracing, which the network does not
take.
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

CHANNELS = {
    'overlock_b': [80, 160, 528, 720],
    'overlock_s': [64, 128, 448, 640],
    'overlock_t': [64, 128, 384, 640],
    'overlock_xt': [56, 112, 340, 420],
}
WIDTHS = [8, 16, 32, 40]  # of the tiny one


@pytest.fixture
def create(monkeypatch):
    """A function that creates 'overlock_xt', which is tiny here."""
    monkeypatch.setitem(OverLoCK.arch_zoo, ('xt', 'extreme-tiny'), TINY)
    return lambda **kwargs: timm.create_model('overlock_xt', **kwargs)


@pytest.fixture
def state(create):
    """A classifier's weights by the release's names."""
    return randomize(overlock_xt(aux_head=True)).state_dict()


def test_names_are_registered():
    names = [*CHANNELS]
    assert timm.list_models('overlock*') == names
    tagged = [f'{name}.in1k' for name in names]
    assert timm.list_models('overlock*', pretrained=True) == tagged
    assert {*mmoverlock.timm.__all__} == {*names} < {*mmoverlock.__all__}


@pytest.mark.parametrize('name', CHANNELS)
def test_default_cfg(name):
    model = timm.create_model(f'{name}.in1k', device='meta')
    cfg = model.default_cfg
    assert model.in_chans == cfg['input_size'][0]
    for layer in cfg['first_conv'], cfg['classifier']:
        assert f'{layer}.weight' in model.state_dict()
    arch = name.removeprefix('overlock_')
    crops = dict(xt=0.925, t=0.95, s=0.95, b=0.975)
    assert cfg['crop_pct'] == crops[arch]
    assert cfg['interpolation'] == 'bicubic'
    assert cfg['url'].endswith(f'/overlock_{arch}_in1k_224.pth')
    infos = [info['num_chs'] for info in model.feature_info]
    assert infos == CHANNELS[name]


def test_heads(create):
    model = create(device='meta').eval()
    images = torch.empty(1, 3, 224, 224, device='meta')
    features = model.forward_features(images)
    pool_size = model.default_cfg['pool_size']
    assert features.shape == (1, model.num_features, *pool_size)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (1, model.head_hidden_size)
    assert model(images).shape == (1, 1000)
    assert model.get_classifier().out_channels == 1000
    for num_classes, pool, shape in [
        (0, None, (1, 1024)),
        (0, '', (1, 1024, 7, 7)),
        (5, 'avg', (1, 5)),
    ]:
        model.reset_classifier(num_classes, pool)
        assert model(images).shape == shape
        assert model.num_classes == num_classes
        assert not any(module.training for module in model.modules())
        if pool is not None:
            again = create(num_classes=num_classes, global_pool=pool)
            assert again.eval().to('meta')(images).shape == shape


@pytest.mark.parametrize(
    'given, expected', [(2, (2, 3)), ([-1], (3,)), ((0, 1), (0, 1))]
)
def test_features_only(create, given, expected):
    model = create(features_only=True, out_indices=given, in_chans=4)
    assert model.out_indices == expected
    widths = [WIDTHS[i] for i in expected]
    strides = [4 * 2**i for i in expected]
    assert model.feature_info.channels() == widths
    assert model.feature_info.reduction() == strides
    maps = model(torch.randn(2, 4, 64, 96))
    assert isinstance(maps, list)
    for item, width, stride in zip(maps, widths, strides, strict=True):
        assert item.shape == (2, width, 64 // stride, 96 // stride)


def test_training(create):
    with pytest.raises(TypeError, match='not_an_argument'):
        create(not_an_argument=1)
    model = create(num_classes=42, drop_rate=0.0, drop_path_rate=0.0)
    model(torch.rand(2, 3, 64, 64)).mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
    model.set_grad_checkpointing()
    assert all(model.checkpointed.values())
    model.set_grad_checkpointing(False)
    assert not any(model.checkpointed.values())


def test_groups_of_parameters(create):
    from timm.models import group_parameters

    model = create()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['patch_embed1.0.weight'] == 0
    assert len(set(groups.values())) == sum(model.depths) + 2
    assert groups['head.4.weight'] == max(groups.values())


@pytest.mark.parametrize('change', [dict, add_prefixes])
def test_pretrained(change, create, state, tmp_path):
    """Files of the release and of MMPretrain, for any channels and classes."""
    path = str(tmp_path / 'file.pth')
    torch.save({'state_dict': change(state)}, path)

    def load(**kwargs):
        overlay = dict(file=path)
        return create(
            pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
        ).state_dict()

    own = load()
    assert own.keys() == {n for n in state if not n.startswith('aux')}
    assert all(torch.equal(own[name], state[name]) for name in own)

    own = load(num_classes=5, in_chans=1, aux_head=True)
    assert own['head.4.weight'].shape[0] == 5
    assert own['aux_head.2.weight'].shape[0] == 5
    assert torch.equal(own['aux_head.0.weight'], state['aux_head.0.weight'])
    stem = state['patch_embed1.0.weight'].sum(1, keepdim=True)
    torch.testing.assert_close(own['patch_embed1.0.weight'], stem)

    own = load(features_only=True, out_indices=(0, 1))
    for name in own:
        assert name.startswith('extra_norm') or torch.equal(
            own[name], state[name]
        )
    assert 'blocks2.0.dwconv.weight' in own

    for features_only in False, True:
        own = create(checkpoint_path=path, features_only=features_only)
        name = 'sub_blocks4.0.proj.1.weight'
        assert torch.equal(own.state_dict()[name], state[name])
