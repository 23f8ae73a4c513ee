"""tools/export.py: files that agree with the models, of standard operators."""

from unittest import mock

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

tiny.need_openmmlab()
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
tool = tiny.load_tool('export')
SMALL = {'model.backbone.arch.kernel_sizes': [5, 7, 5, 5]}
THIRD = SMALL | {'model.backbone.out_indices': [2]}


@pytest.fixture
def export(tmp_path):
    """Exports a tiny model; what is printed, and what training leaves."""

    def export(task, path, *options, settings=SMALL):
        files = tiny.write_model(task, tmp_path, settings)
        out = tiny.run_tool('export', *files, '--out', path, *options)
        cfg = Config.fromfile(files[0])
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model).eval()
        model.load_state_dict(torch.load(files[1])['state_dict'])
        return out, model

    return export


def load_onnx(path):
    """A function that runs the file, and the file's contents."""
    contents = onnx.load(path)
    onnx.checker.check_model(contents)
    assert {node.domain for node in contents.graph.node} == {''}
    return tool.run_onnx(path), contents


def compare(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert b.std() > 1e-3
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@torch.no_grad()
def test_backbone_onnx(export, tmp_path, monkeypatch):
    """Of the third map; docs/mmdeploy.md says how to run it."""
    path = tmp_path / 'new' / 'model.onnx'
    options = '--backbone-only', '--shape', '96', '128'
    out, model = export('seg', path, *options, settings=THIRD)
    assert '96 x 128: differs by ' in out
    assert [file.name for file in path.parent.iterdir()] == ['model.onnx']
    run, contents = load_onnx(path)
    assert [output.name for output in contents.graph.output] == ['map_0']
    metadata = {item.key: item.value for item in contents.metadata_props}
    assert metadata == {
        'channels': 'RGB',
        'mean': '123.675, 116.28, 103.53',
        'std': '58.395, 57.12, 57.375',
    }
    assert f'{path}: image normalized with {metadata}' in out
    image = torch.randn(1, 3, 96, 128)
    compare(run(image), model.backbone(image))
    monkeypatch.chdir(path.parent)
    names = {}
    exec(tiny.code_of('docs/mmdeploy.md', 'python'), names)
    [maps] = names['outputs']
    assert maps.shape == (1, 32, 6, 8) and maps.std() > 0


@torch.no_grad()
def test_backbone_of_any_size(export, tmp_path, monkeypatch):
    """It agrees at other sizes than that which it is traced with."""
    pool = mock.Mock(wraps=tool.MatrixPool)
    monkeypatch.setattr(tool, 'MatrixPool', pool)
    path = tmp_path / 'model.pt2'
    options = '--format', 'torch-export', '--dynamic', '--backbone-only'
    options += '--shape', '224', '224'
    out, model = export('seg', path, *options, settings=THIRD)
    for size in ('224 x 224', '224 x 256', '256 x 224'):
        assert f'{size}: differs by ' in out
    # ContMix's and, of the head, the pyramid's: ONNX has no others.
    assert pool.call_args_list == [mock.call(size) for size in (7, 2, 3, 6)]
    program = torch.export.load(path)
    image = torch.randn(1, 3, 224, 288)
    compare(program.module()(image), model.backbone(image))
    # It is the merged and fused form, of the backbone alone.
    assert program.state_dict
    for name in program.state_dict:
        assert name.startswith('parts.0.')
        assert 'running_mean' not in name and 'dil_conv' not in name


@pytest.mark.slow
@torch.no_grad()
def test_segmentor_onnx_of_any_size(export, tmp_path):
    _, model = export('seg', tmp_path / 'model.onnx', '--dynamic')
    run, contents = load_onnx(tmp_path / 'model.onnx')
    shape = contents.graph.input[0].type.tensor_type.shape.dim
    assert [bool(side.dim_param) for side in shape] == [0, 0, 1, 1]
    assert [output.name for output in contents.graph.output] == ['logits']
    image = torch.randn(1, 3, 256, 352)
    wanted = model.encode_decode(image, [{'img_shape': (256, 352)}])
    assert wanted.shape == (1, 150, 256, 352)
    compare(run(image), [wanted])


@torch.no_grad()
def test_classifier_torchscript(export, tmp_path):
    """Of images with five channels."""
    settings = SMALL | {
        'model.backbone.in_channels': 5,
        'model.data_preprocessor.mean': [1.0] * 5,
        'model.data_preprocessor.std': [2.0] * 5,
    }
    path = tmp_path / 'model.pt'
    options = '--format', 'torchscript', '--shape', '64', '96'
    out, model = export('cls', path, *options, settings=settings)
    assert "'channels': '5'" in out
    image = torch.randn(1, 5, 64, 96)
    compare(torch.jit.load(path)(image), [model(image)])


@pytest.mark.parametrize(
    'kind, key',
    [
        ('mmdet.DetDataPreprocessor', 'bgr_to_rgb'),
        ('mmseg.SegDataPreProcessor', 'bgr_to_rgb'),
        ('mmpretrain.ClsDataPreprocessor', 'to_rgb'),
    ],
)
def test_normalization(kind, key):
    """By the preprocessor; or by the pipeline, as that of other channels."""
    model, cfg = nn.Module(), Config(dict(default_scope='mmdet'))
    model.backbone = nn.Conv2d(3, 1, 1)
    colors = dict(type=kind, mean=[0.0] * 3, std=[1.0] * 3)
    for turn, channels in ((True, 'RGB'), (False, 'BGR')):
        model.data_preprocessor = MODELS.build(colors | {key: turn})
        assert tool.normalization(model, cfg)['channels'] == channels
    model.backbone, model.data_preprocessor = nn.Conv2d(4, 1, 1), nn.Module()
    step = dict(type='Normalize', mean=[1.5] * 4, std=[2.0] * 4, to_rgb=False)
    cfg.test_pipeline = [step]
    found = dict(channels='4', mean='1.5, 1.5, 1.5, 1.5', std='2, 2, 2, 2')
    assert tool.normalization(model, cfg) == found


@pytest.mark.parametrize('size, shape', [(7, (14, 20)), (6, (9, 16))])
def test_matrix_pool(size, shape):
    """To the maps that dynamic kernels are made of, and the pyramid's."""
    maps = torch.randn(2, 3, *shape)
    expected = nn.functional.adaptive_avg_pool2d(maps, size)
    torch.testing.assert_close(tool.MatrixPool(size)(maps), expected)


def test_disagreement(tmp_path, monkeypatch):
    """A file that does not agree is reported, and so is no comparison."""
    config = tiny.ROOT / 'configs' / tiny.CONFIGS['cls'][0]
    argv = 'export', config, '--out', tmp_path / 'x.onnx'
    for name in ('init_model', 'normalization', 'write_file'):
        monkeypatch.setattr(tool, name, mock.Mock())
    tool.write_file.return_value = {(64, 96): 2e-4}
    words = 'export.py: that is more than 0.0001, so do not use it'
    tiny.run_tool(*argv, status=words)
    tool.write_file.return_value = None
    assert 'not compared' in tiny.run_tool(*argv)
