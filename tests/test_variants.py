"""Variants for ablations: what each one changes, and that it is a network."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fusion import assert_fuses, far
from tiny import load_tool
from torch import nn

from mmoverlock.checkpoint import CheckpointError
from mmoverlock.models import OverLoCK, OverLoCKVariant, weights
from mmoverlock.models.blocks import FocusBlock, RepConvBlock
from mmoverlock.models.layers import DropPath
from mmoverlock.models.reparam import DilatedReparamConv
from mmoverlock.models.variants import (
    MIXERS,
    REMOVALS,
    Involution,
    attend,
)
from mmoverlock.ops import contmix
from mmoverlock.ops.dynamic_conv.reference import bias_starts, window_starts

ARCH = dict(
    depths=(1, 1, 1, 1),
    channels=(8, 16, 24, 32),
    focus_depths=(2, 2),
    focus_heads=(2, 2),
    kernel_sizes=(5, 7, 7, 5),
)
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
}
# Parts that leave nothing unread; 'plain' has none of them.
ALONE = [f'no {name}' for name in ('gate', 'se', 'lepe', 'dilated')]


def build(seed=0, **kwargs):
    if 'auxiliary_loss' in kwargs.get('remove', ()):
        kwargs['classifier'] = True
    mixer = str(kwargs.get('mixer'))
    if mixer == 'window_attention':
        pytest.importorskip('mmpretrain')
    elif mixer == 'deformable':
        pytest.importorskip('mmcv._ext')
    torch.manual_seed(seed)
    return OverLoCKVariant(ARCH, **kwargs)


def image(*size):
    torch.manual_seed(1)
    return torch.randn(2, 3, *(size or (64, 64)))


# ----------------------------------------------------------- every variant


def test_nothing_removed():
    """It is the full network, bit for bit."""
    torch.manual_seed(0)
    full = OverLoCK(ARCH, drop_path_rate=0.2)
    same = build(remove=[], mixer='contmix', drop_path_rate=0.2)
    state = same.state_dict()
    torch.testing.assert_close(state, full.state_dict(), rtol=0, atol=0)
    outputs = []
    for model in (same, full):
        kinds = {type(block) for block in model.sub_blocks3}
        kinds |= {type(block) for block in model.blocks1}
        assert kinds == {FocusBlock, RepConvBlock}
        torch.manual_seed(2)
        maps = model.train()(image())
        sum(x.square().sum() for x in maps).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        outputs.append([*maps, *grads])
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    'name', [name for name in VARIANTS if name not in ('contmix', *ALONE)]
)
def test_trains(name):
    """Every parameter gets a gradient, and a step changes every weight."""
    model = build(**VARIANTS[name], drop_path_rate=0.1).train()
    for parameter in model.parameters():
        if parameter.dim() < 4 or parameter.shape[1:] != (1, 1, 1):
            nn.init.normal_(parameter, std=0.3)
    maps = model(image())
    assert [x.shape for x in maps] == [
        (2, channels, 64 // stride, 64 // stride)
        for channels, stride in zip(
            model.out_channels, model.out_strides, strict=True
        )
    ]
    assert all(x.is_contiguous() for x in maps)
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not name.endswith('weight') or parameter.grad.any(), name


@pytest.mark.parametrize(
    'name',
    [
        *('no se', 'no prior_update', 'plain', 'some', 'dilated_reparam'),
        *('neighborhood_attention', 'window_attention', 'involution'),
    ],
)
def test_deploy_and_fused(name):
    """The forms for inference compute the same."""
    model = far(build(**VARIANTS[name]))
    x = image().double()
    deployed = build(**VARIANTS[name], deploy=True).double().eval()
    with torch.no_grad():
        expected = model(x)
        model.switch_to_deploy()
        deployed.load_state_dict(model.state_dict())
        torch.testing.assert_close(deployed(x), expected)
    # A mixer's own sequence gets a copy, as in a head; all else is in place.
    copies = 4 if name == 'involution' else 0
    assert assert_fuses(deployed, x) == copies
    norms = [m for m in deployed.modules() if type(m) is nn.BatchNorm2d]
    assert len(norms) == copies


@pytest.mark.parametrize(
    'name, out_indices',
    [('overview', (0,)), ('overview', (1, 2)), ('feature_guidance', (3,))],
)
def test_some_outputs(name, out_indices):
    """Others are neither built nor computed."""
    model = build(remove=[name], out_indices=out_indices).train()
    maps = model(image())
    widths = [ARCH['channels'][i] for i in out_indices]
    assert [x.shape[1] for x in maps] == widths
    sum(x.square().sum() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


# ---------------------------------------------------------------- removals


def constant(conv, value):
    nn.init.zeros_(conv.weight)
    nn.init.constant_(conv.bias, value)


def neutralize(block, name):
    """Make a part of a full block do nothing, by its weights."""
    if name == 'gate':
        constant(block.gate[1], 1.2784645427610738)  # where SiLU is 1
    elif name == 'lepe':
        constant(block.lepe[1], 0.0)
    elif name == 'se':
        for part in block.modules():
            if hasattr(part, 'scale_and_shift') and hasattr(part, 'proj'):
                constant(part.proj[3], 50.0)  # where a sigmoid is 1
    elif name == 'dilated':
        for part in block.modules():
            if isinstance(part, DilatedReparamConv):
                for _, norm in part.branches[1:]:
                    constant(getattr(part, norm), 0.0)
    elif isinstance(block, FocusBlock) and not block.first:
        scales = (1.0, 0.0) if name == 'initial_prior' else (0.0, 1.0)
        nn.init.constant_(block.x_scale.weight, scales[0])
        nn.init.constant_(block.h_scale.weight, scales[1])


PARTS = {  # what the names of their weights have
    'gate': ('.gate.',),
    'lepe': ('.lepe.',),
    'se': ('.se_layer.', '.proj.3.proj.'),
    'dilated': ('.dil_',),
    'initial_prior': ('.x_scale.', '.h_scale.'),
    'prior_update': ('.x_scale.', '.h_scale.', '.h_proj.'),
}


@pytest.mark.parametrize('name', PARTS)
def test_removed_part(name):
    """As the full network with that part doing nothing, and without it."""
    full = far(OverLoCK(ARCH))
    model = build(remove=[name]).double().eval()
    blocks = [*full.sub_blocks3, *full.sub_blocks4]
    if name in ('se', 'dilated'):
        for i in range(1, 5):
            blocks += getattr(full, f'blocks{i}')
    x = image().double()
    with torch.no_grad():
        before = full(x)
        for block in blocks:
            neutralize(block, name)
        state = full.state_dict()
        assert not model.load_state_dict(state, strict=False).missing_keys
        left = state.keys() - model.state_dict().keys()
        assert left == {
            key for key in state if any(part in key for part in PARTS[name])
        }
        expected = full(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    # It had done something.
    assert not torch.allclose(before[-1], expected[-1], rtol=1e-3)


@pytest.mark.parametrize(
    'name, source',
    [
        ('overview', 'features'),
        ('feature_guidance', 'P0'),
        ('kernel_guidance', 'features'),
        ('gate', 'prior'),
    ],
)
def test_what_keys_are_made_from(name, source):
    model, given = build(remove=[name]).eval(), {}
    for module in model.modules():
        module.register_forward_hook(
            lambda module, args, out: given.update({module: args})
        )
    with torch.no_grad():
        model(image())
    for block in (*model.sub_blocks3, *model.sub_blocks4):
        [query], [key] = given[block.weight_query], given[block.weight_key]
        _, initial = given[block]
        joined = 8 if name in ('kernel_guidance', 'gate') else 0
        total = given[block.norm1][0].shape[1]
        assert total == query.shape[1] + joined
        if source == 'features':
            assert torch.equal(key, query)
        elif source == 'P0':  # enlarged as the features are
            size = key.shape[-2:]
            wanted = F.interpolate(initial, size, mode='bilinear')
            assert torch.equal(key, wanted)
        else:
            assert key.shape[1] == 8
        assert (initial is None) == (name == 'overview')


def test_without_overview():
    """Neither its parts nor its place in depth and drop path are left."""
    model = build(remove=['overview'], drop_path_rate=0.6)
    names = {name.partition('.')[0] for name, _ in model.named_parameters()}
    assert not names & {'patch_embed4', 'blocks4', 'high_level_proj'}
    assert [*model.patch_embedx] == ['x_proj']
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([i / 10 for i in range(7)])
    layers = [
        model.get_layer_depth(f'{name}.0.dwconv.weight')[0]
        for name in ('blocks3', 'sub_blocks3')
    ]
    assert layers == [3, 4]


def test_without_small_kernel():
    """All channels are mixed with the K x K kernel."""
    block = build(remove=['small_kernel']).double().sub_blocks4[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    weight, bias = block.weight_proj.weight.flatten(1), block.weight_proj.bias
    assert len(weight) == 5**2
    torch.manual_seed(0)
    query, key = (torch.randn(1, 16, *s).double() for s in ((7, 9), (7, 7)))
    value = torch.randn(1, 24, 7, 9).double()
    expected = contmix(
        *(query, key, torch.cat([value, value], dim=1)),
        *(torch.cat([x, x]) for x in (weight, bias)),
        *((block.rpb2, block.rpb2), 'reference', block.scale),
    )[:, 24:]
    for backend in ('tiled', 'reference', 'triton'):
        block.contmix_backend = backend
        torch.testing.assert_close(block.mix(query, key, value), expected)


def test_classifier_without_auxiliary_loss():
    full = OverLoCK(ARCH, classifier=True).eval()
    model = build(remove=['auxiliary_loss']).eval()
    model.load_state_dict(full.state_dict())
    assert model.out_channels == (40,) and model.out_strides == (32,)
    (out,) = model(image())
    assert torch.equal(out, full(image())[1])
    plain = build(remove=['overview'], classifier=True)
    assert plain.out_channels == (32,)
    assert [x.shape for x in plain(image())] == [(2, 32, 2, 2)]


def test_head():
    pytest.importorskip('mmpretrain')
    from mmpretrain.structures import DataSample

    from mmoverlock.models import classification

    head = classification.OverLoCKFocusClsHead(5, [40])
    feats = build(remove=['auxiliary_loss'])(image())
    losses = head.loss(feats, [DataSample().set_gt_label(i) for i in (1, 3)])
    expected = F.cross_entropy(head(feats), torch.tensor([1, 3]))
    torch.testing.assert_close(losses, dict(loss_cls=expected))
    expected.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
    with pytest.raises(ValueError, match='takes the one map .* got 2'):
        head((*feats, *feats))


# ------------------------------------------------------------------ mixers


def naive_attention(query, key, value, table):
    size = (table.shape[-1] + 1) // 2
    q, k, v = (m.unflatten(1, (len(table), -1)) for m in (query, key, value))
    out = torch.empty_like(v)
    height, width = v.shape[-2:]
    for y, x in itertools.product(range(height), range(width)):
        rows, cols, up, left = (
            slice(first(n, size)[i], first(n, size)[i] + size)
            for first in (window_starts, bias_starts)
            for n, i in ((height, y), (width, x))
        )
        logits = (q[..., y, x, None, None] * k[..., rows, cols]).sum(2)
        logits = logits + table[:, up, left]
        kernel = logits.flatten(2).softmax(-1).view_as(logits)
        window = kernel[:, :, None] * v[..., rows, cols]
        out[..., y, x] = window.sum((-1, -2))
    return out.flatten(1, 2)


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('height, width, size', [(5, 7, 5), (17, 9, 5)])
def test_neighborhood_attention(height, width, size, exact):
    """Both forms, on a map of one tile and on one of several."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 6, height, width).double()
    value = torch.randn(2, 4, height, width).double()
    table = torch.randn(2, 2 * size - 1, 2 * size - 1).double()
    torch.testing.assert_close(
        attend(query, key, value, table, exact),
        naive_attention(query, key, value, table),
    )


def test_contmix_sizes():
    """Those of the network are the network; others have other shapes."""
    full = far(OverLoCK(ARCH))
    same = build(mixer=dict(type='contmix', num_regions=7)).double().eval()
    same.load_state_dict(full.state_dict())
    with torch.no_grad():
        x = image().double()
        torch.testing.assert_close(same(x), full(x))
    block = build(**VARIANTS['K and S']).sub_blocks3[0]
    assert block.weight_proj.weight.shape == (25 + 25, 9, 1, 1)
    assert block.rpb2.shape == (4, 9, 9)
    assert block.lepe[0].lk_origin.kernel_size == (7, 7)


def test_involution():
    """A kernel that is the same everywhere is a depthwise convolution."""
    torch.manual_seed(0)
    layer = Involution(8, 2, 3, dict(type='BN'))
    last = layer.kernel[-1]
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 8, 6, 7)
    kernels = last.bias.view(2, 1, 3, 3).repeat_interleave(4, 0)
    expected = F.conv2d(x, kernels, padding=1, groups=8)
    torch.testing.assert_close(layer(x), expected)


def test_static():
    model = build(mixer='static').eval()
    for kind, blocks in ((7, model.sub_blocks3), (5, model.sub_blocks4)):
        conv = blocks[0].mixer.lk_origin
        x = torch.randn(1, len(conv.weight), 8, 9)
        expected = F.conv2d(
            x, conv.weight, conv.bias, padding=kind // 2, groups=x.shape[1]
        )
        mixed = blocks[0].dynamic_conv(None, x)
        torch.testing.assert_close(mixed, expected)
    other = build(mixer=dict(type='static', kernel_size=9))
    assert other.sub_blocks3[0].mixer.lk_origin.kernel_size == (9, 9)
    block = build(mixer='dilated_reparam').sub_blocks3[0]
    assert block.mixer.branches == block.lepe[0].branches


def test_window_attention():
    """Every other block shifts, unless a window is as large as the map."""
    model = build(mixer='window_attention').eval()
    blocks = [*model.sub_blocks3, *model.sub_blocks4]
    assert [block.mixer.shift_size for block in blocks] == [0, 3, 0, 3]
    assert blocks[0].mixer.w_msa.num_heads == 2
    plain, shifted = blocks[:2]
    shifted.mixer.w_msa.load_state_dict(plain.mixer.w_msa.state_dict())
    for size, same in (((7, 7), True), ((14, 7), True), ((14, 9), False)):
        x = torch.randn(1, 24, *size)
        a, b = (block.dynamic_conv(None, x) for block in (plain, shifted))
        assert torch.allclose(a, b, atol=1e-6) == same


def test_deformable():
    """Offsets start at zero and masks at a half; any layout is read."""
    block = build(mixer='deformable').sub_blocks3[0]
    conv = block.mixer
    x = torch.randn(2, 24, 6, 7)
    expected = 0.5 * F.conv2d(x, conv.weight, padding=1, groups=4)
    expected += conv.bias[:, None, None]
    for layout in (torch.contiguous_format, torch.channels_last):
        mixed = block.dynamic_conv(None, x.contiguous(memory_format=layout))
        torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize(
    'mixer, module, package',
    [
        ('window_attention', 'mmpretrain.models.utils.attention', 'mmpretra'),
        ('deformable', 'mmcv.ops', 'mmcv with its compiled operators'),
    ],
)
def test_missing_packages(mixer, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f'this mixer needs {package}'):
        OverLoCKVariant(ARCH, mixer=mixer)


# ---------------------------------------------------------------- mistakes

PRIOR = 'there is no prior and no auxiliary loss'


@pytest.mark.parametrize(
    'remove, mixer, words',
    [
        (['gates'], 'contmix', 'any of .*gate.*got'),
        ('gate', 'contmix', 'must be a list'),
        ((), 'attention', 'mixer must be one of'),
        ((), dict(kernel_size=3), 'mixer must be one of'),
        ((), dict(type='static', num_regions=3), 'takes .*kernel_s'),
        ((), dict(type='contmix', kernel_size=3), 'odd and at least 5'),
        ((), dict(type='static', kernel_size=4), 'must be odd and'),
        ((), dict(type='contmix', num_regions=0), 'must be at least 1'),
        (['overview', 'kernel_guidance'], 'contmix', PRIOR),
        (['prior_update', 'overview'], 'contmix', PRIOR),
        (['feature_guidance', 'initial_prior'], 'contmix', 'not updated'),
        (['prior_update', 'feature_guidance'], 'contmix', 'not updated'),
        (['kernel_guidance', 'feature_guidance'], 'contmix', 'would read the'),
        (['initial_prior', 'prior_update'], 'contmix', 'in none but'),
        (['auxiliary_loss'], 'contmix', 'is for classifier=True'),
        (['dilated'], 'dilated_reparam', "'static'"),
        (['kernel_guidance'], 'static', 'nothing from the prior'),
        (['feature_guidance'], 'static', 'nothing from the prior'),
        (['small_kernel'], 'neighborhood_attention', 'attention. has none'),
    ],
)
def test_mistakes(remove, mixer, words):
    with pytest.raises(ValueError, match=words):
        OverLoCKVariant(ARCH, remove, mixer)


def test_mistakes_with_the_network():
    with pytest.raises(ValueError, match='no overview to add'):
        OverLoCKVariant(ARCH, ['overview'], fuse_overview=True)
    with pytest.raises(ValueError, match='deploy must be True or False'):
        OverLoCKVariant(ARCH, deploy=2)


# ----------------------------------------------------------------- weights


@pytest.mark.parametrize(
    'name', ['no overview', 'no auxiliary_loss', 'static', 'K and S']
)
def test_full_weights_load(name, tmp_path, monkeypatch):
    """What fits is loaded, and the log names the rest."""
    logged = []
    monkeypatch.setattr(weights, 'print_log', lambda *a: logged.append(a[0]))
    full = OverLoCK(ARCH, classifier=name == 'no auxiliary_loss')
    for tensor in full.parameters():
        nn.init.normal_(tensor)
    state, path = full.state_dict(), str(tmp_path / 'full.pth')
    torch.save(state, path)
    cfg = dict(type='Pretrained', checkpoint=path)
    model = build(**VARIANTS[name], init_cfg=cfg)
    model.init_weights()
    own = model.state_dict()
    known = own.keys() & state.keys()
    fitting = {key for key in known if own[key].shape == state[key].shape}
    for key in fitting:
        assert torch.equal(own[key], state[key]), key
    (text,) = logged
    missing = own.keys() - state.keys()
    counted = len(known) + sum('num_batches' not in key for key in missing)
    assert f'{len(fitting)} of {counted} tensors fit' in text
    assert ('left out' in text) == bool(state.keys() - own.keys())
    assert ('missing' in text) == bool(missing)
    assert ('of another shape' in text) == (fitting < known)


def test_merging_a_file(tmp_path):
    """Trained without dilated branches, loaded into the merged form."""
    model = far(build(remove=['dilated']))
    path = str(tmp_path / 'trained.pth')
    torch.save(model.state_dict(), path)
    cfg = dict(type='Pretrained', checkpoint=path)
    merged = build(remove=['dilated'], deploy=True, init_cfg=cfg).double()
    merged.init_weights()
    x = image().double()
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x), model(x))


def test_other_weights_do_not_load(tmp_path):
    """Only what a variant changes may be missing or of another shape."""
    other = OverLoCK(ARCH | dict(channels=(8, 16, 48, 32)))
    path = str(tmp_path / 'other.pth')
    torch.save(other.state_dict(), path)
    cfg = dict(type='Pretrained', checkpoint=path)
    with pytest.raises(CheckpointError, match='does not fit the model'):
        build(remove=['kernel_guidance'], init_cfg=cfg).init_weights()


def test_no_kernels_to_show():
    tool = load_tool('visualize')
    args = SimpleNamespace(stage=3, block=-1)
    with pytest.raises(tool.cli.UserError, match='kernels of two sizes'):
        tool.draw_kernels(build(mixer='static'), [], args)
