"""tools/export.py: files that agree with the models, of standard operators."""

import re
from unittest import mock

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmoverlock.models import OverLoCKVariant
from mmoverlock.models.fuse import fuse

tiny.need_openmmlab()
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
tool = tiny.load_tool('export')


@pytest.fixture
def build(tmp_path):
    """Files of a tiny model, and the model that training leaves."""

    def build(task, **options):
        sizes = {'model.backbone.arch.kernel_sizes': [5, 7, 5, 5]}
        files = tiny.write_model(task, tmp_path, sizes | options)
        cfg = Config.fromfile(files[0])
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model).eval()
        model.load_state_dict(torch.load(files[1])['state_dict'])
        return files, model

    return build


def run(files, path, *options):
    return tiny.run_tool('export', *files, '--out', path, *options)


def load_onnx(path):
    """A function that runs the file, and the file's contents."""
    contents = onnx.load(path)
    onnx.checker.check_model(contents)
    assert {node.domain for node in contents.graph.node} == {''}
    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider']
    )
    return lambda image: [
        torch.from_numpy(output)
        for output in session.run(None, {'image': image.numpy()})
    ], contents


def compare(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert b.std() > 1e-3
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@torch.no_grad()
def test_backbone_onnx(build, tmp_path, monkeypatch):
    """Of the first map; docs/mmdeploy.md says how to run it."""
    files, model = build('seg', **{'model.backbone.out_indices': [0]})
    path = tmp_path / 'new' / 'model.onnx'
    out = run(files, path, '--backbone-only', '--shape', '64', '96')
    assert f'{path}: image normalized with' in out
    assert '64 x 96: differs by ' in out
    assert [file.name for file in path.parent.iterdir()] == ['model.onnx']
    predict, contents = load_onnx(path)
    assert [output.name for output in contents.graph.output] == ['map_0']
    metadata = {item.key: item.value for item in contents.metadata_props}
    assert metadata == {
        'channels': 'RGB',
        'mean': '123.675, 116.28, 103.53',
        'std': '58.395, 57.12, 57.375',
    }
    image = torch.randn(1, 3, 64, 96)
    compare(predict(image), model.backbone(image))
    monkeypatch.chdir(path.parent)
    text = (tiny.ROOT / 'docs' / 'mmdeploy.md').read_text()
    [code] = re.findall('^```python\n(.*?)^```', text, re.DOTALL | re.M)
    names = {}
    exec(code, names)
    [maps] = names['outputs']
    assert maps.shape == (1, 8, 16, 24) and maps.std() > 0


@torch.no_grad()
def test_backbone_of_any_size(build, tmp_path, monkeypatch):
    """It agrees at other sizes than that which it is traced with."""
    pool = mock.Mock(wraps=tool.MatrixPool)
    monkeypatch.setattr(tool, 'MatrixPool', pool)
    files, model = build('seg', **{'model.backbone.out_indices': [2]})
    path = tmp_path / 'model.pt2'
    options = '--format', 'torch-export', '--dynamic', '--backbone-only'
    out = run(files, path, *options)
    for size in ('256 x 320', '224 x 256', '288 x 224'):
        assert f'{size}: differs by ' in out
    # ContMix's and, of the head, the pyramid's: ONNX has no others.
    assert pool.call_args_list == [mock.call(size) for size in (7, 2, 3, 6)]
    # It is the merged and fused form, of the backbone alone.
    program = torch.export.load(path)
    image = torch.randn(1, 3, 224, 256)
    compare(program.module()(image), model.backbone(image))
    assert program.state_dict
    for name in program.state_dict:
        assert name.startswith('model.backbone.')
        assert 'running_mean' not in name and 'dil_conv' not in name


@pytest.mark.slow
@torch.no_grad()
def test_segmentor_onnx_of_any_size(build, tmp_path):
    files, model = build('seg')
    run(files, tmp_path / 'model.onnx', '--dynamic')
    predict, contents = load_onnx(tmp_path / 'model.onnx')
    shape = contents.graph.input[0].type.tensor_type.shape.dim
    assert [bool(side.dim_param) for side in shape] == [0, 0, 1, 1]
    assert [output.name for output in contents.graph.output] == ['logits']
    image = torch.randn(1, 3, 256, 352)
    wanted = model.encode_decode(image, [{'img_shape': (256, 352)}])
    assert wanted.shape == (1, 150, 256, 352)
    compare(predict(image), [wanted])


@torch.no_grad()
def test_classifier_torchscript(build, tmp_path):
    """Of images with five channels."""
    five = {
        'model.backbone.in_channels': 5,
        'model.data_preprocessor.mean': [1.0] * 5,
        'model.data_preprocessor.std': [2.0] * 5,
    }
    files, model = build('cls', **five)
    path = tmp_path / 'model.pt'
    options = ['--format', 'torchscript', '--shape', '64', '96']
    assert "'channels': '5'" in run(files, path, *options)
    image = torch.randn(1, 5, 64, 96)
    compare(torch.jit.load(path)(image), [model(image)])


class Blocks(nn.Module):
    """Small blocks of variants, for an image of features, prior and P0."""

    def __init__(self, mixers):
        super().__init__()
        arch = tiny.ARCH | dict(kernel_sizes=(5, 5, 5, 5))
        self.blocks = nn.ModuleList()
        for mixer in mixers:
            remove = ['dilated', 'se', 'gate', 'lepe']
            if mixer == 'contmix':
                remove += ['kernel_guidance', 'prior_update', 'small_kernel']
            model = OverLoCKVariant(arch, remove, mixer)
            self.blocks.append(model.sub_blocks3[0])

    def forward(self, image):
        z, initial_prior = image.split([32, 8], dim=1)
        return [block(z, initial_prior) for block in self.blocks]


@pytest.mark.parametrize(
    'mixers',
    [
        ('contmix', 'involution'),
        pytest.param(
            ('neighborhood_attention', 'window_attention'),
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.no_grad()
def test_variants_onnx(mixers, tmp_path):
    torch.manual_seed(0)
    module = Blocks(mixers).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    image = torch.randn(1, 40, 9, 8)
    wanted = module(image)
    tool.make_exportable(fuse(module), False)
    program = torch.export.export(module, (image,), strict=False)
    path = tmp_path / 'model.onnx'
    tool.write_onnx(program, path, [*mixers], {})
    predict, _ = load_onnx(path)
    compare(predict(image), wanted)


@pytest.mark.parametrize(
    ('task', 'key'),
    [('det', 'bgr_to_rgb'), ('seg', 'bgr_to_rgb'), ('cls', 'to_rgb')],
)
def test_order_of_channels(task, key):
    cfg = Config.fromfile(tiny.ROOT / 'configs' / tiny.CONFIGS[task][0])
    init_default_scope(cfg.default_scope)
    settings = {'type': 'ClsDataPreprocessor', **cfg.model.data_preprocessor}
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 1, 1)
    for turn, channels in ((True, 'RGB'), (False, 'BGR')):
        model.data_preprocessor = MODELS.build(settings | {key: turn})
        assert tool.normalization(model)['channels'] == channels


@pytest.mark.parametrize(
    'size, shape', [(1, (9, 16)), (7, (14, 20)), (6, (9, 16))]
)
def test_matrix_pool(size, shape):
    maps = torch.randn(2, 3, *shape)
    torch.testing.assert_close(
        tool.MatrixPool(size)(maps),
        nn.functional.adaptive_avg_pool2d(maps, size),
    )


def test_disagreement(build, tmp_path, monkeypatch):
    """A file that does not agree is reported, and so is no comparison."""
    argv = *build('cls')[0], '--out', str(tmp_path / 'x.onnx')
    monkeypatch.setattr(tool, 'write_file', lambda *_: {(64, 96): 2e-4})
    with pytest.raises(SystemExit, match='more than 0.0001'):
        tool.main(argv)
    monkeypatch.setattr(tool, 'write_file', lambda *_: None)
    assert 'not compared' in tiny.run_tool('export', *argv)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--shape', '0', '96'], '--shape takes a height'),
        (['--dynamic', '--shape', '224', '250'], 'multiples of 32 from 224'),
        (['--dynamic', '--shape', '192', '224'], 'multiples of 32 from 224'),
        (['--format', 'torch-export'], 'writes .pt2 files, not'),
        (['--cfg-options', 'default_scope=mmpose'], 'mmdet, mmseg, mmpretrai'),
        (
            ['--format', 'torchscript', '--dynamic', '--out', 'm.pt'],
            'TorchScript files have a fixed size',
        ),
    ],
)
def test_mistakes(options, words, mistake):
    config = tiny.ROOT / 'configs' / tiny.CONFIGS['cls'][0]
    assert words in mistake('export', config, '--out', 'm.onnx', *options)


def test_masks_are_no_logits():
    config = 'configs/drop_in/overlock_t_mask2former_semantic.py'
    argv = tiny.ROOT / config, '--out', 'm.onnx'
    message = tiny.run_tool('export', *argv, status=2)
    assert '--backbone-only works with it' in message
