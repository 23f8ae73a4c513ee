"""tools/visualize.py: the pictures of every subcommand, and their numbers."""

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image

from mmoverlock.inference import (
    build_pipeline,
    init_model,
    load,
    network_input,
)
from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock

tiny.need_openmmlab()
tool = tiny.load_tool('visualize')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The config, checkpoint and image of a classifier, and of a detector."""
    folder = tmp_path_factory.mktemp('files')
    photo = folder / 'photo.png'
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((120, 90)).save(photo)
    models = {task: tiny.write_model(task, folder) for task in ('cls', 'det')}
    return {task: [*model, str(photo)] for task, model in models.items()}


@pytest.fixture
def draw(files, tmp_path, monkeypatch):
    """Runs a subcommand; returns the figure, and what `show_maps` got."""
    monkeypatch.setitem(tool.STYLE, 'savefig.dpi', 60)
    calls, figures = [], []
    show, save = tool.show_maps, tool.save
    monkeypatch.setattr(
        tool, 'show_maps', lambda *args: calls.append(args) or show(*args)
    )
    monkeypatch.setattr(
        tool, 'save', lambda *args: figures.append(args) or save(*args)
    )

    def draw(command, task, *options):
        argv = command, *files[task], '--out', tmp_path, '--device', 'cpu'
        output = tiny.run_tool('visualize', *argv, *options)
        figure, path = figures.pop()
        assert path.parent == tmp_path and str(path) in output
        pixels = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 200
        return figure, calls.pop() if calls else output

    return draw


def load_files(files):
    """The backbone of the files, and the input and picture of the image."""
    cfg = Config.fromfile(files[0])
    model = init_model(cfg, files[1])
    data, _ = load(build_pipeline(cfg), files[2])
    return model.backbone, *network_input(model, data)


@torch.no_grad()
def test_prior(files, draw):
    """What the Overview-Net says, and what stage 3 makes of it."""
    figure, (maps, picture, padded, _) = draw('prior', 'cls')
    backbone, inputs, expected = load_files(files['cls'])
    assert padded == inputs.shape[2:]
    assert (picture == expected).all()
    prior, updated = maps.values()
    base = backbone.base_net(inputs)[-1]
    overview = backbone.overview_net(base)
    torch.testing.assert_close(prior, backbone.high_level_proj(overview)[0])
    stage3 = backbone.focus_net(base, overview)[0]
    torch.testing.assert_close(updated, stage3[0, -len(prior) :])
    title = 'context prior P0\n8 channels, 2 x 2'
    assert figure.axes[1].get_title() == title


def test_features(files, draw):
    """Of a detector; of a classifier, where its heads read."""
    _, (maps, *_) = draw('features', 'cls')
    assert [*maps] == ['Overview-Net', 'Focus-Net']
    figure, (maps, *_) = draw('features', 'det')
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
    options = '--at', '10,20', '60,5', '--stage', '4', '--block', '0'
    figure, _ = draw('kernels', 'cls', *options)
    titles = [figure.axes[i].get_title() for i in (0, 9)]
    assert titles == ['x = 10, y = 20', 'x = 60, y = 5']
    cells = [c.images[0] for c in figure.axes[1:9] + figure.axes[10:18]]
    for cell in cells:
        assert cell.get_array().mean() == pytest.approx(1, abs=1e-4)
    # One scale for all
    ((low, high),) = {(cell.norm.vmin, cell.norm.vmax) for cell in cells}
    assert low == pytest.approx(1 / high)
    figure, _ = draw('kernels', 'cls')  # where nobody says where
    assert figure.axes[0].get_title() == 'x = 16, y = 32'


def test_windows_in_the_picture():
    """Rectangles and rings are where the windows and positions are."""
    picture = np.zeros((40, 60, 3), np.uint8)
    kernels = [
        (torch.full((2, 5, 5), 1 / 25), 0, 3),
        (torch.full((2, 7, 7), 1 / 49), 1, 2),
    ]
    figure = tool.show_kernels([((45, 9), (1, 5), kernels)], picture, (8, 9))
    boxes = [patch.get_bbox().bounds for patch in figure.axes[0].patches]
    assert boxes == [(26.5, -0.5, 45, 40), (17.5, 7.5, 63, 56)]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[45, 9]]
    rings = [axes.lines[0].get_xydata()[0] for axes in figure.axes[1:5]]
    assert np.array_equal(rings, [(2, 1), (2, 1), (3, 0), (3, 0)])
    tool.plt.close(figure)


def test_dynamic_kernels():
    """They give the block's mix when the windows are multiplied by hand."""
    torch.manual_seed(0)
    shape = dict(kernel_size=7, heads=2, first=True, drop_path=0.0)
    options = dict(norm_cfg={'type': 'BN'}, contmix_backend='auto')
    block = FocusBlock(16, 8, **shape, **options, deploy=False).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    z, value = torch.randn(1, 24, 9, 12), torch.randn(1, 16, 9, 12)
    modules = {'query': block.weight_query, 'key': block.weight_key}
    with tool.recording(**modules) as got:
        mixed = block.dynamic_conv(z, value)[0]
    halves = value[0].chunk(2)
    for row, column in ((0, 0), (4, 6), (8, 11), (1, 9)):
        parts = []
        kernels = tool.dynamic_kernels(block, **got, position=(row, column))
        for half, (kernel, top, left) in zip(halves, kernels, strict=True):
            k = kernel.shape[-1]
            assert kernel.shape == (4, k, k)
            assert top == min(max(row - k // 2, 0), 9 - k)
            window = half[:, top : top + k, left : left + k]
            parts.append((kernel.repeat_interleave(2, 0) * window).sum((1, 2)))
        found, expected = torch.cat(parts), mixed[:, row, column]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_erf(draw):
    """What is printed is what is drawn."""
    figure, output = draw('erf', 'cls', '--size', '64')
    lines = output.splitlines()
    start = lines.index('area ratios, 1 images of 64 x 64')
    for i, line in enumerate(lines[start + 2 : start + 4]):
        assert line.startswith(f'stage {3 + i}')
        ratios = [float(n.strip('%')) for n in line.split()[2:]]
        assert len(ratios) == 4 and 0 < ratios[0] and ratios[-1] <= 100
        assert ratios == sorted(ratios)
        axes = figure.axes[i]
        assert axes.images[0].get_array().max() == pytest.approx(1)
        written = ' / '.join(f'{ratio:.1f}' for ratio in ratios)
        assert f'in {written} % of the area' in axes.get_xlabel()


def test_area_ratios():
    """Squares that grow around an odd centre until they hold the share."""
    found = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    found[12:22, 14:24] += 5
    expected = []
    for share in tool.SHARES:
        for half in range(1, 40):
            # Around the position from 16 to 20, whose centre is 17.5.
            low, high = max(18 - half, 0), min(18 + half, 32)
            if found[low:high, low:high].sum() >= share * found.sum():
                break
        expected.append((high - low) ** 2 / 32**2)
    assert tool.area_ratios(found, 17.5) == pytest.approx(expected)


def test_effective_field_is_a_gradient():
    """Of the central position: finite differences agree."""
    torch.manual_seed(0)
    backbone = OverLoCK(tiny.ARCH).double().eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    picture = np.zeros((64, 64, 3), np.uint8)
    module = backbone.sub_blocks3[-1]
    images = [('', image, picture)] * 2
    sums, centers = tool.effective_field(backbone, {'a': module}, images, 64)
    assert centers == {'a': 2.5 * 16 - 0.5}

    @torch.no_grad()
    def center(x):
        with tool.recording(a=module) as maps:
            backbone(x)
        return maps['a'][0, :, 2, 2].sum().item()

    expected = 0
    for channel in range(3):
        step = torch.zeros_like(image)
        step[0, channel, 40, 30] = 1e-4
        slope = (center(image + step) - center(image - step)) / 2e-4
        expected += len(images) * max(slope, 0)
    assert sums['a'][40, 30].item() == pytest.approx(expected, rel=1e-4)


def test_principal_components():
    """The first, of the largest variance, is red."""
    maps = torch.zeros(4, 6, 5, dtype=torch.float64)
    ramp = torch.arange(6.0)[:, None].expand(6, 5) - 2.5
    maps[0], maps[1] = 4 * ramp, -3 * ramp
    maps[2] = 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    components, shares = tool.principal_components(maps)
    expected = 5 * ramp.double()
    torch.testing.assert_close(components[..., 0], expected)
    variances = expected.var(correction=0), maps[2].var(correction=0)
    expected = torch.stack(variances) / sum(variances)
    torch.testing.assert_close(shares[:2], expected)
    assert components[..., 2].abs().max() < 1e-6
    red = tool.as_colors(components)[..., 0].mean(1)
    assert (red.diff() > 0).all() and red[0] < 0.05 and red[-1] > 0.95
