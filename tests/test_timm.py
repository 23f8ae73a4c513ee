"""OverLoCK in timm: what timm's own tests ask of every model.

Not among it are TorchScript and symbolic tracing, which the network does not
take.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from golden import load, state_dict

# Where `make env` has it: without it on the path, mmseg does not import it.
sys.path.append(str(Path(sys.prefix, 'timm')))
timm = pytest.importorskip('timm')

import mmoverlock.timm  # noqa: E402
from mmoverlock.models.weights import add_prefixes  # noqa: E402

NAMES = [f'overlock_{arch}' for arch in ('b', 's', 't', 'xt')]
CHANNELS = {
    'overlock_xt': [56, 112, 340, 420],
    'overlock_t': [64, 128, 384, 640],
    'overlock_s': [64, 128, 448, 640],
    'overlock_b': [80, 160, 528, 720],
}


@pytest.fixture(scope='module')
def state():
    return OrderedDict(
        (name, value.float() if value.is_floating_point() else value)
        for name, value in state_dict(load('keys_cls_xt')).items()
    )


def create(**kwargs):
    """The smallest model, without values."""
    return timm.create_model('overlock_xt', device='meta', **kwargs)


def test_names_are_registered():
    assert timm.list_models('overlock*') == NAMES
    tagged = [f'{name}.in1k' for name in NAMES]
    assert timm.list_models('overlock*', pretrained=True) == tagged


@pytest.mark.parametrize('name', NAMES)
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


def test_heads():
    model = create().eval()
    images = torch.empty(1, 3, 224, 224, device='meta')
    features = model.forward_features(images)
    assert features.shape == (
        1,
        model.num_features,
        *model.default_cfg['pool_size'],
    )
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
            assert again.eval()(images).shape == shape


def test_features_only():
    model = create(features_only=True)
    assert model.feature_info.channels() == CHANNELS['overlock_xt']
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.empty(2, 3, 64, 96, device='meta'))
    assert isinstance(maps, list)
    for i, (width, item) in enumerate(
        zip(CHANNELS['overlock_xt'], maps, strict=True)
    ):
        assert item.shape == (2, width, 16 // 2**i, 24 // 2**i)


@pytest.mark.parametrize(
    'given, expected', [(2, (2, 3)), ([-1], (3,)), ((0, 1), (0, 1))]
)
def test_out_indices(given, expected):
    model = create(features_only=True, out_indices=given, in_chans=4)
    assert model.out_indices == expected
    channels = [CHANNELS['overlock_xt'][i] for i in expected]
    assert model.feature_info.channels() == channels
    maps = model(torch.empty(2, 4, 64, 64, device='meta'))
    assert [item.shape[1] for item in maps] == channels


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match='not_an_argument'):
        create(not_an_argument=1)


def test_gradients_and_recomputation():
    model = timm.create_model(
        'overlock_xt', num_classes=42, drop_rate=0.0, drop_path_rate=0.0
    )
    images = torch.rand(2, 3, 64, 64)
    model(images).mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
    model.set_grad_checkpointing()
    assert all(model.checkpointed.values())
    model.set_grad_checkpointing(False)
    assert not any(model.checkpointed.values())


def test_groups_of_parameters():
    from timm.models import group_parameters

    model = create()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['patch_embed1.0.weight'] == 0
    assert len(set(groups.values())) == sum(model.depths) + 2
    assert groups['head.4.weight'] == max(groups.values())


@pytest.mark.parametrize('change', [dict, add_prefixes])
def test_pretrained(change, state, tmp_path):
    """Files of the release and of MMPretrain, for any channels and classes."""
    path = str(tmp_path / 'file.pth')
    torch.save({'state_dict': change(state)}, path)
    overlay = dict(file=path)

    def load_it(**kwargs):
        return timm.create_model(
            'overlock_xt',
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )

    own = load_it().state_dict()
    assert {
        n: v for n, v in state.items() if not n.startswith('aux')
    }.keys() == own.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)

    own = load_it(num_classes=5, in_chans=1, aux_head=True).state_dict()
    assert own['head.4.weight'].shape[0] == 5
    assert own['aux_head.2.weight'].shape[0] == 5
    assert torch.equal(own['aux_head.0.weight'], state['aux_head.0.weight'])
    stem = state['patch_embed1.0.weight'].sum(1, keepdim=True)
    torch.testing.assert_close(own['patch_embed1.0.weight'], stem)

    own = load_it(features_only=True, out_indices=(0, 1)).state_dict()
    for name in own:
        assert name.startswith('extra_norm') or torch.equal(
            own[name], state[name]
        )
    assert 'blocks2.1.dwconv.weight' in own


def test_checkpoint_path(state, tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save({'state_dict': add_prefixes(state)}, path)
    for features_only in False, True:
        model = timm.create_model(
            'overlock_xt', checkpoint_path=path, features_only=features_only
        )
        own = model.state_dict()
        name = 'sub_blocks4.1.proj.1.weight'
        assert torch.equal(own[name], state[name])


def test_names_are_those_of_the_plain_models():
    assert {*mmoverlock.timm.__all__} == {*NAMES} < {*mmoverlock.__all__}
