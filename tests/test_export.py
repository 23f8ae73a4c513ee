"""tools/export.py: files that agree with the models, of standard operators."""

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

tiny.need_openmmlab()
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
tool = tiny.load_tool('export')


@pytest.fixture
def build(tmp_path):
    """Files of a tiny model, and the model that training leaves."""

    def build(task, **options):
        files = tiny.write_model(task, tmp_path, options)
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
def test_segmentor_onnx_of_any_size(build, tmp_path):
    files, model = build('seg')
    path = tmp_path / 'new' / 'model.onnx'
    out = run(files, path, '--dynamic')
    assert f'{path}: image normalized with' in out
    for size in ('256 x 320', '224 x 256', '288 x 224'):
        assert f'{size}: differs by ' in out
    assert [file.name for file in path.parent.iterdir()] == ['model.onnx']
    predict, contents = load_onnx(path)
    shape = contents.graph.input[0].type.tensor_type.shape.dim
    assert [bool(side.dim_param) for side in shape] == [0, 0, 1, 1]
    assert [output.name for output in contents.graph.output] == ['logits']
    metadata = {item.key: item.value for item in contents.metadata_props}
    assert metadata == {
        'channels': 'RGB',
        'mean': '123.675, 116.28, 103.53',
        'std': '58.395, 57.12, 57.375',
    }
    for size in ((224, 224), (256, 352), (320, 224)):
        image = torch.randn(1, 3, *size)
        wanted = model.encode_decode(image, [{'img_shape': size}])
        assert wanted.shape == (1, 150, *size)
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


@torch.no_grad()
def test_backbone_torch_export(build, tmp_path):
    files, model = build('seg')
    path = tmp_path / 'model.pt2'
    options = ['--format', 'torch-export', '--shape', '64', '96']
    run(files, path, *options, '--backbone-only')
    image = torch.randn(1, 3, 64, 96)
    wanted = model.backbone(image)
    assert len(wanted) == 4
    program = torch.export.load(path)
    compare(program.module()(image), wanted)
    # It is the merged and fused form, of the backbone alone.
    assert program.state_dict
    for name in program.state_dict:
        assert name.startswith('model.backbone.')
        assert 'running_mean' not in name and 'dil_conv' not in name


@pytest.mark.parametrize(
    ('task', 'key'),
    [('det', 'bgr_to_rgb'), ('seg', 'bgr_to_rgb'), ('cls', 'to_rgb')],
)
def test_order_of_channels(build, task, key):
    for turn, channels in ((True, 'RGB'), (False, 'BGR')):
        _, model = build(task, **{f'model.data_preprocessor.{key}': turn})
        assert tool.normalization(model)['channels'] == channels


@pytest.mark.parametrize('size', [1, 6, 7])
@pytest.mark.parametrize('shape', [(7, 7), (14, 20), (9, 16)])
def test_matrix_pool(size, shape):
    maps = torch.randn(2, 3, *shape)
    torch.testing.assert_close(
        tool.MatrixPool(size)(maps),
        torch.nn.functional.adaptive_avg_pool2d(maps, size),
    )


def test_disagreement(build, tmp_path, monkeypatch):
    """A file that does not agree is reported, and so is no comparison."""
    for differences, words in (
        ({(64, 96): 2e-4}, 'more than 0.0001'),
        (None, 'not compared'),
    ):
        monkeypatch.setattr(tool, 'export', lambda *_, d=differences: d)
        files, _ = build('cls')
        if differences:
            with pytest.raises(SystemExit, match=words):
                tool.main([*files, '--out', str(tmp_path / 'x.onnx')])
        else:
            assert words in run(files, tmp_path / 'x.onnx')


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--shape', '0', '96'], '--shape takes a height'),
        (['--dynamic', '--shape', '224', '250'], 'multiples of 32 from 224'),
        (['--dynamic', '--shape', '192', '224'], 'multiples of 32 from 224'),
        (['--format', 'torch-export'], 'writes .pt2 files, not'),
        (['--cfg-options', 'default_scope=mmpose'], 'mmdet, mmseg, mmpretrai'),
        (['--cfg-options', 'modle.type=A'], 'did you mean model'),
    ],
)
def test_mistakes(options, words, tmp_path):
    config = tiny.ROOT / 'configs' / tiny.CONFIGS['cls'][0]
    message = tiny.run_tool(
        *('export', config, '--out', tmp_path / 'm.onnx', *options), status=2
    ).splitlines()[-1]
    assert message.startswith('export.py: ') and words in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('config', 'options', 'words'),
    [
        (
            tiny.CONFIGS['cls'][0],
            ['--format', 'torchscript', '--dynamic'],
            'TorchScript files have a fixed size',
        ),
        (
            'drop_in/overlock_t_mask2former_semantic.py',
            [],
            '--backbone-only works with it',
        ),
    ],
)
def test_what_cannot_be(tmp_path, config, options, words):
    config = tiny.ROOT / 'configs' / config
    name = 'm.pt' if options else 'm.onnx'
    argv = config, '--out', tmp_path / name, *options
    assert words in tiny.run_tool('export', *argv, status=2)
