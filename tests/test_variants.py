"""Variants for ablations: what each one changes, and that it is a network."""

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from fusion import assert_fuses, far
from networks import noise, step
from torch import nn

from mmoverlock.checkpoint import CheckpointError
from mmoverlock.models import OverLoCK, OverLoCKVariant
from mmoverlock.models.blocks import FocusBlock
from mmoverlock.models.layers import DropPath
from mmoverlock.models.reparam import BRANCHES
from mmoverlock.models.variants import MIXERS, REMOVALS, attend
from mmoverlock.ops import contmix

ARCH = tiny.ARCH | dict(focus_depths=(2, 2), kernel_sizes=(5, 7, 7, 5))
VARIANTS = {
    **{f'no {name}': dict(remove=[name]) for name in REMOVALS},
    **{name: dict(mixer=name) for name in MIXERS},
    'K and S': dict(mixer=dict(type='contmix', kernel_size=5, num_regions=3)),
    'plain': dict(
        remove=['overview', 'gate', 'se', 'lepe', 'dilated'], mixer='static'
    ),
    'some': dict(
        remove=['kernel_guidance', 'prior_update', 'small_kernel'],
        mixer=dict(type='contmix', num_regions=5),
    ),
    'one map': dict(remove=['overview'], out_indices=(0,)),
    'two maps': dict(remove=['overview'], out_indices=(1, 2)),
}
IMAGES = noise(2, 3, 64, 64)
SILU_IS_1, SIGMOID_IS_1 = 1.2784645427610738, 50


def build(**kwargs):
    if 'auxiliary_loss' in kwargs.get('remove', ()):
        kwargs['classifier'] = True
    needed = dict(window_attention='mmpretrain', deformable='mmcv._ext')
    for name, package in needed.items():
        if name in str(kwargs.get('mixer')):
            pytest.importorskip(package)
    torch.manual_seed(0)
    return OverLoCKVariant(ARCH, **kwargs)


def test_nothing_removed():
    """It is the full network, and runs its kernels."""
    assert type(build().sub_blocks3[0]) is FocusBlock
    full = OverLoCK(ARCH, drop_path_rate=0.2)
    mixer = dict(type='contmix', num_regions=7)
    same = build(mixer=mixer, drop_path_rate=0.2)
    same.load_state_dict(full.state_dict())
    torch.testing.assert_close(step(same, IMAGES), step(full, IMAGES))


@pytest.mark.parametrize('name', VARIANTS)
def test_trains(name):
    """Every parameter gets a gradient, and a step changes every weight."""
    model = build(**VARIANTS[name]).train()
    for parameter in model.parameters():
        if parameter.dim() < 4 or parameter.shape[1:] != (1, 1, 1):
            nn.init.normal_(parameter, std=0.3)
    maps = model(IMAGES)
    for x, channels, stride in zip(
        maps, model.out_channels, model.out_strides, strict=True
    ):
        assert x.shape == (2, channels, 64 // stride, 64 // stride)
        assert x.is_contiguous()
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not name.endswith('weight') or parameter.grad.any(), name


def load(state, folder, **options):
    """A variant with weights from a file of these."""
    path = str(folder / 'weights.pth')
    torch.save(state, path)
    cfg = dict(type='Pretrained', checkpoint=path)
    model = build(**options, init_cfg=cfg)
    model.init_weights()
    return model


@pytest.mark.parametrize('name', ['plain', 'some', 'involution'])
@torch.no_grad()
def test_deploy_and_fused(name, tmp_path):
    """The forms for inference compute the same; a file is merged for them."""
    model, x = far(build(**VARIANTS[name])), IMAGES.double()
    state, expected = model.state_dict(), model(x)
    merged = load(state, tmp_path, **VARIANTS[name], deploy=True)
    merged.double().eval()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.switch_to_deploy()(x), expected)
    # A mixer's own sequence gets a copy, as in a head; all else is in place.
    copies = 4 if name == 'involution' else 0
    assert assert_fuses(merged, x) == copies
    norms = [m for m in merged.modules() if type(m) is nn.BatchNorm2d]
    assert len(norms) == copies


@pytest.mark.parametrize(
    'name, removed, neutral',  # weights, and those by which it does nothing
    [
        ('gate', r'\.gate\.', {r'gate\.1\.w': 0, r'gate\.1\.b': SILU_IS_1}),
        ('lepe', r'\.lepe\.', {r'\.lepe\.1\.': 0}),
        (
            *('se', r'\.se_layer\.|\.proj\.3\.proj\.'),
            {r'\.proj\.3\.w': 0, r'\.proj\.3\.b': SIGMOID_IS_1},
        ),
        ('dilated', r'\.dil_', {r'\.dil_bn_': 0}),
        (
            *('initial_prior', r'\.[xh]_scale\.'),
            {r'\.x_scale\.w': 1, r'\.h_scale\.w': 0},
        ),
        (
            *('prior_update', r'\.([xh]_scale|h_proj)\.'),
            {r'\.x_scale\.w': 0, r'\.h_scale\.w': 1},
        ),
    ],
)
@torch.no_grad()
def test_removed_part(name, removed, neutral):
    """As the full network with that part doing nothing, and without it."""
    full, x = far(OverLoCK(ARCH)), IMAGES.double()
    model = build(remove=[name]).double().eval()
    before = full(x)
    for key, parameter in full.named_parameters():
        for pattern, value in neutral.items():
            if re.search(pattern, key):
                nn.init.constant_(parameter, value)
    state = full.state_dict()
    assert not model.load_state_dict(state, strict=False).missing_keys
    left = state.keys() - model.state_dict().keys()
    assert left == {key for key in state if re.search(removed, key)}
    expected = full(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    # It had done something.
    assert not torch.allclose(before[-1], expected[-1], rtol=1e-3)


@pytest.mark.parametrize(
    'name', ['overview', 'feature_guidance', 'kernel_guidance']
)
@torch.no_grad()
def test_what_keys_are_made_from(name):
    """Features, or P0 at their size, which is not joined to them then."""
    model, given = build(remove=[name]).eval(), {}
    for module in model.modules():
        module.register_forward_hook(
            lambda module, args, out: given.update({module: args})
        )
    model(IMAGES)
    for block in (*model.sub_blocks3, *model.sub_blocks4):
        [query], [key] = given[block.weight_query], given[block.weight_key]
        _, initial = given[block]
        assert (initial is None) == (name == 'overview')
        joined = given[block.norm1][0].shape[1] - query.shape[1]
        assert joined == (8 if name == 'kernel_guidance' else 0)
        wanted = query
        if name == 'feature_guidance':
            wanted = F.interpolate(initial, key.shape[-2:], mode='bilinear')
        assert torch.equal(key, wanted)


def test_without_overview():
    """Its place in depth and drop path is not left."""
    model = build(remove=['overview'], drop_path_rate=0.6)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([i / 10 for i in range(7)])
    assert model.get_layer_depth('sub_blocks3.0.dwconv.weight') == (4, 9)
    with pytest.raises(ValueError, match='no overview to add'):
        build(remove=['overview'], fuse_overview=True)


def test_without_small_kernel():
    """All channels are mixed with the K x K kernel."""
    block = build(remove=['small_kernel']).double().sub_blocks4[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    weight, bias = block.weight_proj.weight.flatten(1), block.weight_proj.bias
    assert len(weight) == 5**2
    query, key = noise(1, 16, 7, 9).double(), noise(1, 16, 7, 7).double()
    value = noise(1, 24, 7, 9).double()
    expected = contmix(
        *(query, key, value.repeat(1, 2, 1, 1)),
        *(weight.repeat(2, 1), bias.repeat(2)),
        *((block.rpb2, block.rpb2), 'reference', block.scale),
    )[:, 24:]
    for backend in ('tiled', 'reference', 'triton'):
        block.contmix_backend = backend
        torch.testing.assert_close(block.mix(query, key, value), expected)


def test_classifier_without_auxiliary_loss():
    """The same map alone, and one loss."""
    pytest.importorskip('mmpretrain')
    from mmpretrain.structures import DataSample

    from mmoverlock.models.classification import OverLoCKFocusClsHead

    full = OverLoCK(ARCH, classifier=True).eval()
    model = build(remove=['auxiliary_loss']).eval()
    model.load_state_dict(full.state_dict())
    [out] = feats = model(IMAGES)
    assert torch.equal(out, full(IMAGES)[1])
    assert model.out_channels == (40,) and model.out_strides == (32,)
    assert build(remove=['overview'], classifier=True).out_channels == (32,)
    head = OverLoCKFocusClsHead(5, [40])
    losses = head.loss(feats, [DataSample().set_gt_label(i) for i in (1, 3)])
    expected = F.cross_entropy(head(feats), torch.tensor([1, 3]))
    torch.testing.assert_close(losses, dict(loss_cls=expected))
    with pytest.raises(ValueError, match='takes the one map .* got 2'):
        head((*feats, *feats))


def test_neighborhood_attention():
    """On a map of one window, attention with biases; both forms agree."""

    def draw(*size):
        shapes = (2, 6, *size), (2, 6, *size), (2, 4, *size), (2, 9, 9)
        return [noise(*s, seed=i).double() for i, s in enumerate(shapes)]

    *maps, table = operands = draw(5, 5)
    y, x = torch.arange(25) // 5, torch.arange(25) % 5
    bias = table[:, 4 + y - y[:, None], 4 + x - x[:, None]]
    maps = (m.flatten(2).unflatten(1, (2, -1)).mT for m in maps)
    expected = F.scaled_dot_product_attention(*maps, bias, scale=1.0)
    expected = expected.mT.reshape(2, 4, 5, 5)
    for exact in (False, True):
        torch.testing.assert_close(attend(*operands, exact), expected)
    tiled, exact = (attend(*draw(17, 9), exact) for exact in (False, True))
    torch.testing.assert_close(tiled, exact)  # of several tiles


def involution(mixer, x):
    """With kernels that are the same everywhere."""
    nn.init.zeros_(mixer.kernel[-1].weight)
    kernels = nn.init.normal_(mixer.kernel[-1].bias).view(4, 1, 7, 7)
    kernels = kernels.repeat_interleave(6, 0)
    return F.conv2d(x, kernels, padding=3, groups=24)


def deformable(mixer, x):
    """Offsets start at zero and masks at a half."""
    mixed = F.conv2d(x, mixer.weight, padding=1, groups=4) / 2
    return mixed + mixer.bias[:, None, None]


@pytest.mark.parametrize('convolve', [involution, deformable])
def test_convolutions(convolve):
    """In all layouts."""
    block = build(mixer=convolve.__name__).sub_blocks3[0]
    x = torch.randn(2, 24, 8, 9)
    expected = convolve(block.mixer, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        mixed = block.dynamic_conv(None, x.contiguous(memory_format=layout))
        torch.testing.assert_close(mixed, expected)


def test_large_convolutions():
    """As large as the stage's kernels, or as given."""
    for mixer, size, branches in (
        ('static', 7, 0),
        ('dilated_reparam', 7, len(BRANCHES[7]) + 1),
        (dict(type='static', kernel_size=9), 9, 0),
    ):
        mixer = build(mixer=mixer).sub_blocks3[0].mixer
        assert mixer.lk_origin.kernel_size == (size, size)
        assert len(mixer.branches) == branches


def test_window_attention():
    """Every other block shifts, unless a window is as large as the map."""
    model = build(mixer='window_attention').eval()
    plain, shifted = model.sub_blocks3
    assert model.sub_blocks4[1].mixer.shift_size == 3
    assert plain.mixer.w_msa.num_heads == 2
    shifted.mixer.w_msa.load_state_dict(plain.mixer.w_msa.state_dict())
    for size, same in (((14, 7), True), ((14, 9), False)):
        x = torch.randn(1, 24, *size)
        a, b = (block.dynamic_conv(None, x) for block in (plain, shifted))
        assert torch.allclose(a, b, atol=1e-6) == same


@pytest.mark.parametrize(
    'remove, mixer, words',
    [
        (['gates'], 'contmix', 'any of .*gate.*got'),
        ('gate', 'contmix', 'must be a list'),
        ((), dict(kernel_size=3), 'mixer must be one of'),
        ((), dict(type='static', num_regions=3), 'takes .*kernel_s'),
        ((), dict(type='contmix', kernel_size=6), 'odd and at least 5'),
        ((), dict(type='contmix', num_regions=0), 'must be at least 1'),
        (['prior_update', 'overview'], 'contmix', 'no prior'),
        (['auxiliary_loss', 'overview'], 'contmix', 'no such loss'),
        (['feature_guidance', 'initial_prior'], 'contmix', 'not updated'),
        (['kernel_guidance', 'feature_guidance'], 'contmix', 'the overview'),
        (['initial_prior', 'prior_update'], 'contmix', 'the prior is P0'),
        (['auxiliary_loss'], 'contmix', 'is for classifier=True'),
        (['dilated'], 'dilated_reparam', "'static'"),
        (['kernel_guidance'], 'static', 'nothing from the prior'),
        (['small_kernel'], 'neighborhood_attention', 'attention.*has none'),
    ],
)
def test_mistakes(remove, mixer, words):
    with pytest.raises(ValueError, match=words):
        OverLoCKVariant(ARCH, remove, mixer)


def test_no_kernels_to_show():
    tool = tiny.load_tool('visualize')
    args = SimpleNamespace(stage=3, block=-1)
    with pytest.raises(tool.cli.UserError, match='kernels of two sizes'):
        tool.draw_kernels(build(mixer='static'), [], args)


@pytest.mark.parametrize('name', ['no overview', 'static', 'K and S'])
def test_full_weights_load(name, tmp_path):
    """Weights that fit are loaded; for the log see test_weights.py."""
    full = OverLoCK(ARCH).state_dict()
    own = load(full, tmp_path, **VARIANTS[name]).state_dict()
    fitting = {
        k for k, v in full.items() if k in own and own[k].shape == v.shape
    }
    assert len(full) > len(fitting) > 450
    assert all(torch.equal(own[key], full[key]) for key in fitting)


def test_other_weights_do_not_load(tmp_path):
    """Only what a variant changes may be missing or of another shape."""
    other = OverLoCK(ARCH | dict(channels=(8, 16, 48, 32)))
    with pytest.raises(CheckpointError, match='does not fit the model'):
        load(other.state_dict(), tmp_path, remove=['kernel_guidance'])
