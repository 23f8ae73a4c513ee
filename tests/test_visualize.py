"""tools/visualize.py: the pictures of every subcommand, and their numbers."""

import re
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from networks import make_block
from PIL import Image

from mmoverlock import inference
from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock

tiny.need_openmmlab()
tool = tiny.load_tool('visualize')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The config, checkpoint and image of a classifier, and of a detector."""
    folder = tmp_path_factory.mktemp('files')
    tiny.photo(folder / 'photo.png', (120, 90))
    return {
        task: (*tiny.write_model(task, folder), str(folder / 'photo.png'))
        for task in ('cls', 'det')
    }


@pytest.fixture
def draw(files, tmp_path, monkeypatch):
    """Runs a subcommand; returns the figure, its maps and what is printed."""
    monkeypatch.setitem(tool.STYLE, 'savefig.dpi', 60)
    show, save = (mock.Mock(wraps=f) for f in (tool.show_maps, tool.save))
    monkeypatch.setattr(tool, 'show_maps', show)
    monkeypatch.setattr(tool, 'save', save)

    def draw(command, task, *options):
        argv = command, *files[task], '--out', tmp_path, '--device', 'cpu'
        output = tiny.run_tool('visualize', *argv, *options)
        figure, path = save.call_args.args
        assert path.parent == tmp_path and str(path) in output
        pixels = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 200
        maps = show.call_args.args[0] if show.called else None
        return figure, maps, output

    return draw


def load_files(files):
    """The backbone of the files, and the input and picture of the image."""
    cfg = Config.fromfile(files[0])
    model = inference.init_model(cfg, files[1])
    data, _ = inference.load(inference.build_pipeline(cfg), files[2])
    return model.backbone, *inference.network_input(model, data)


@torch.no_grad()
def test_prior(files, draw):
    """Of the Overview-Net, and as it is after stage 3."""
    figure, maps, _ = draw('prior', 'cls')
    backbone, inputs, picture = load_files(files['cls'])
    prior, updated = maps.values()
    base = backbone.base_net(inputs)[-1]
    overview = backbone.overview_net(base)
    torch.testing.assert_close(prior, backbone.high_level_proj(overview)[0])
    stage3 = backbone.focus_net(base, overview)[0]
    torch.testing.assert_close(updated, stage3[0, -len(prior) :])
    image, first = figure.axes[:2]
    assert (image.images[0].get_array() == picture).all()
    assert first.get_title() == 'context prior P0\n8 channels, 2 x 2'


def test_features(files, draw):
    """Of a detector; of a classifier, where its heads read."""
    _, maps, _ = draw('features', 'cls')
    assert [*maps] == ['Overview-Net', 'Focus-Net']
    figure, maps, _ = draw('features', 'det')
    assert [*maps] == [f'map {i}, stride {4 * 2**i}' for i in range(4)]
    backbone, inputs, picture = load_files(files['det'])
    for map_, expected in zip(maps.values(), backbone(inputs), strict=True):
        torch.testing.assert_close(map_, expected[0])
    # The maps are those of the padded input, laid over the picture in it.
    height, width = inputs.shape[2:]
    assert (height, width) != picture.shape[:2]
    for axes in figure.axes[1:5] + figure.axes[6:10]:
        extent = axes.images[-1].get_extent()
        assert extent == [-0.5, width - 0.5, height - 0.5, -0.5]
        assert axes.get_ylim() == (picture.shape[0] - 0.5, -0.5)
        assert axes.get_xlim() == (-0.5, picture.shape[1] - 0.5)


def test_kernels(draw):
    """At given pixels, or on the middle line."""
    options = '--at', '10,20', '60,5', '--stage', '4', '--block', '0'
    figure, *_ = draw('kernels', 'cls', *options)
    titles = [figure.axes[i].get_title() for i in (0, 9)]
    assert titles == ['x = 10, y = 20', 'x = 60, y = 5']
    figure, *_ = draw('kernels', 'cls')
    assert figure.axes[0].get_title() == 'x = 16, y = 32'


def test_kernels_and_windows():
    """Ratios to an average, of one scale; windows where they are."""
    picture = np.zeros((40, 60, 3), np.uint8)
    small, large = torch.full((2, 5, 5), 0.04), torch.full((2, 7, 7), 0.1)
    kernels = [(small, 0, 3), (large, 1, 2)]
    figure = tool.show_kernels([((45, 9), (1, 5), kernels)], picture, (8, 9))
    image, *cells = figure.axes[:5]
    boxes = [patch.get_bbox().bounds for patch in image.patches]
    assert boxes == [(26.5, -0.5, 45, 40), (17.5, 7.5, 63, 56)]
    assert image.lines[0].get_xydata().tolist() == [[45, 9]]
    rings = [axes.lines[0].get_xydata()[0] for axes in cells]
    assert np.array_equal(rings, [(2, 1), (2, 1), (3, 0), (3, 0)])
    for axes, ratio in zip(cells, (1, 1, 4.9, 4.9), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), ratio)
        norm = axes.images[0].norm
        assert (norm.vmin, norm.vmax) == pytest.approx((1 / 4.9, 4.9))
    tool.plt.close(figure)


def test_dynamic_kernels():
    """They give the block's mix when the windows are multiplied by hand."""
    torch.manual_seed(0)
    options = dict(kernel_size=7, heads=2, first=True, contmix_backend='auto')
    block = make_block(FocusBlock, 16, 8, **options).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    z, value = torch.randn(1, 24, 9, 12), torch.randn(1, 16, 9, 12)
    modules = {'query': block.weight_query, 'key': block.weight_key}
    with tool.recording(**modules) as got:
        mixed = block.dynamic_conv(z, value)[0]
    for row, column in ((0, 0), (4, 6), (8, 11), (1, 9)):
        parts = []
        kernels = tool.dynamic_kernels(block, **got, position=(row, column))
        for half, (kernel, top, left) in zip(
            value[0].chunk(2), kernels, strict=True
        ):
            k = kernel.shape[-1]
            assert top == min(max(row - k // 2, 0), 9 - k)
            window = half[:, top : top + k, left : left + k]
            parts.append((kernel.repeat_interleave(2, 0) * window).sum((1, 2)))
        found, expected = torch.cat(parts), mixed[:, row, column]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_erf(draw):
    """The figure has the ratios that are printed."""
    figure, _, output = draw('erf', 'cls', '--size', '64')
    assert 'area ratios, 1 images of 64 x 64' in output
    for stage, axes in zip((3, 4), figure.axes, strict=False):
        assert axes.images[0].get_array().max() == pytest.approx(1)
        (line,) = re.findall(f'^stage {stage}(.*)', output, re.M)
        ratios = [float(word.strip('%')) for word in line.split()]
        assert ratios == sorted(ratios) and 0 < ratios[0] < ratios[3] <= 100
        written = ' / '.join(f'{ratio:.1f}' for ratio in ratios)
        assert f'in {written} % of the area' in axes.get_xlabel()


def test_area_ratios():
    """Of squares around a center beside the middle, which end at the edge."""
    found = torch.ones(8, 8)
    found[0] = found[:, 0] = 0
    # Of the 49 pixels that count, they hold 4, 16, 36 and all.
    expected = [16 / 64, 16 / 64, 36 / 64, 49 / 64]
    assert tool.area_ratios(found, 4.5) == expected


def test_effective_field():
    """Gradients of the central position, where positive, of all images."""
    torch.manual_seed(0)
    backbone = OverLoCK(tiny.ARCH).double().eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    module = backbone.sub_blocks3[-1]
    with tool.recording(a=module) as maps:
        backbone(image)
    maps['a'][0, :, 2, 2].sum().backward()
    images = [('', image.detach(), np.zeros((64, 64, 3), np.uint8))] * 2
    sums, centers = tool.effective_field(backbone, {'a': module}, images, 64)
    assert centers == {'a': 2.5 * 16 - 0.5}
    expected = 2 * image.grad[0].clamp_min(0).sum(0)
    torch.testing.assert_close(sums['a'], expected)


def test_principal_components():
    """The first, of the largest variance, is red."""
    maps = torch.zeros(4, 6, 5, dtype=torch.float64)
    ramp = torch.arange(6.0)[:, None].expand(6, 5) - 2.5
    maps[0], maps[1] = 4 * ramp, -3 * ramp
    maps[2] = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    components, shares = tool.principal_components(maps)
    first = 5 * ramp.double()
    torch.testing.assert_close(components[..., 0], first)
    variances = torch.stack([first, maps[2]]).var((1, 2))
    torch.testing.assert_close(shares[:2], variances / variances.sum())
    red = tool.as_colors(components)[..., 0].mean(1)
    assert (red.diff() > 0).all() and red[0] < 0.05 and red[-1] > 0.95
