"""tools/visualize.py: the pictures of every subcommand, and their numbers."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from mmoverlock.models import OverLoCK
from mmoverlock.models.blocks import FocusBlock

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
pytest.importorskip('mmpretrain')
tool = tiny.load_tool('visualize')

ARCH = {
    'depths': (1, 1, 1, 1),
    'channels': (8, 16, 24, 32),
    'focus_depths': (1, 1),
    'focus_heads': (2, 2),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Config, checkpoint and an image."""
    folder = tmp_path_factory.mktemp('files')
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((120, 90)).save(folder / 'photo.png')
    return [*tiny.write_model('cls', folder), str(folder / 'photo.png')]


@pytest.fixture
def det_files(files, tmp_path):
    """Those of a detector, which has outputs at four strides."""
    pytest.importorskip('mmdet')
    return [*tiny.write_model('det', tmp_path), files[2]]


def run(command, files, out, *options):
    argv = [command, *files, '--out', str(out), '--device', 'cpu', *options]
    tool.main(argv)


def check_picture(path):
    picture = np.asarray(Image.open(path).convert('RGB'))
    assert min(picture.shape[:2]) > 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200


def test_prior(files, tmp_path):
    run('prior', files, tmp_path)
    check_picture(tmp_path / 'photo_prior.png')


def test_features(det_files, tmp_path):
    run('features', det_files, tmp_path)
    check_picture(tmp_path / 'photo_features.png')


@pytest.mark.parametrize('stage', ['3', '4'])
def test_kernels(files, tmp_path, stage):
    options = ['--at', '10,20', '60,5', '--stage', stage, '--block', '0']
    run('kernels', files, tmp_path, *options)
    check_picture(tmp_path / 'photo_kernels.png')


def test_dynamic_kernels():
    """They give the block's mix when the windows are multiplied by hand."""
    torch.manual_seed(0)
    block = FocusBlock(
        16,
        8,
        kernel_size=7,
        heads=2,
        first=True,
        drop_path=0.0,
        norm_cfg={'type': 'BN'},
        deploy=False,
        backend='auto',
    ).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    z, value = torch.randn(1, 24, 9, 12), torch.randn(1, 16, 9, 12)
    modules = {'query': block.weight_query, 'key': block.weight_key}
    with tool.recording(**modules) as got:
        mixed = block.dynamic_conv(z, value)[0]
    halves = value[0].chunk(2)
    for row, column in ((0, 0), (4, 6), (8, 11), (1, 9)):
        parts = []
        kernels = tool.dynamic_kernels(
            block, got['query'], got['key'], (row, column)
        )
        assert [kernel.shape for kernel, _, _ in kernels] == [
            (4, 5, 5),
            (4, 7, 7),
        ]
        for half, (kernel, top, left) in zip(halves, kernels, strict=True):
            torch.testing.assert_close(kernel.sum((1, 2)), torch.ones(4))
            k = kernel.shape[-1]
            assert top == min(max(row - k // 2, 0), 9 - k)
            window = half[:, top : top + k, left : left + k]
            parts.append((kernel.repeat_interleave(2, 0) * window).sum((1, 2)))
        torch.testing.assert_close(
            torch.cat(parts), mixed[:, row, column], atol=1e-5, rtol=1e-5
        )


def test_erf(files, tmp_path, capsys):
    run('erf', files, tmp_path, '--size', '64')
    check_picture(tmp_path / 'erf.png')
    lines = capsys.readouterr().out.splitlines()
    start = lines.index('area ratios, 1 images of 64 x 64')
    rows = lines[start + 2 : start + 4]
    for name, line in zip(('stage 3', 'stage 4'), rows, strict=True):
        assert line.startswith(name)
        ratios = [float(n.strip('%')) for n in line.split()[2:]]
        assert len(ratios) == 4 and ratios == sorted(ratios)
        assert 0 < ratios[0] and ratios[-1] <= 100


def test_area_ratios():
    """Uniform contributions fill their share; a point fills one pixel."""
    uniform = tool.area_ratios(torch.ones(100, 100), 49.5)
    for ratio, share in zip(uniform, tool.SHARES, strict=True):
        assert ratio == pytest.approx(share, abs=0.03)
    point = torch.zeros(11, 11)
    point[5, 5] = 1
    assert tool.area_ratios(point, 5.0) == pytest.approx([1 / 121] * 4)


def test_effective_field_is_a_gradient():
    """Of the central position: finite differences agree."""
    torch.manual_seed(0)
    backbone = OverLoCK(ARCH).double().eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    picture = np.zeros((64, 64, 3), np.uint8)
    module = backbone.sub_blocks3[-1]
    sums, centres = tool.effective_field(
        backbone, {'a': module}, [('', image, picture)] * 2, 64
    )
    assert centres == {'a': 2.5 * 16 - 0.5}

    def centre(x):
        with tool.recording(a=module) as maps, torch.no_grad():
            backbone(x)
        return maps['a'][0, :, 2, 2].sum().item()

    expected = 0
    for channel in range(3):
        step = torch.zeros_like(image)
        step[0, channel, 40, 30] = 1e-4
        slope = (centre(image + step) - centre(image - step)) / 2e-4
        expected += 2 * max(slope, 0)  # two images
    assert sums['a'][40, 30].item() == pytest.approx(expected, rel=1e-4)


def test_principal_colours():
    """The first component, of the largest variance, is red."""
    maps = torch.zeros(4, 6, 5)
    maps[2] = torch.arange(6.0)[:, None]
    maps[0] = 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    colours = tool.principal_colours(maps)
    assert colours.shape == (6, 5, 3)
    red = colours[..., 0].mean(1)
    assert (np.diff(red) > 0).all() and red[0] < 0.05 and red[-1] > 0.95


@pytest.mark.parametrize(
    ('command', 'options', 'words'),
    [
        ('kernels', ['--at', '64,0'], '64,0 is outside of photo, which is 64'),
        ('kernels', ['--block', '1'], '--block 1: stage 3 has blocks 0 to 0'),
        ('prior', ['--cfg-options', 'modle.type=A'], 'did you mean model'),
        ('prior', ['none'], 'none: there is no such file'),
    ],
)
def test_mistakes(files, tmp_path, capsys, command, options, words):
    inputs = [*files, *(o for o in options if o == 'none')]
    options = [o for o in options if o != 'none']
    with pytest.raises(SystemExit) as stop:
        run(command, inputs, tmp_path, *options)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith('visualize.py: ') and words in message


def test_missing_stage():
    backbone = OverLoCK(ARCH, out_indices=(0, 1))
    with pytest.raises(tool.cli.UserError, match='no sub_blocks3.*(0, 1)'):
        tool.find_module(backbone, 'sub_blocks3')
