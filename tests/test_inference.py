"""mmoverlock.inference: what a config says, and images as tests see them."""

from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

from mmoverlock import inference
from mmoverlock.inference import find_files, to_picture
from mmoverlock.models import OverLoCK

tiny.need_openmmlab()

# -------------------------------------------------------------------- images

BANDS = np.random.default_rng(0).integers(0, 256, (40, 50, 5), np.uint8)
PIXELS = BANDS[..., :3]


def test_tools_see_what_tests_see(tmp_path):
    """Inputs of the network in a test, and in three tools; of five bands."""
    tifffile = pytest.importorskip('tifffile')
    cfg = Config.fromfile(tiny.classifier(tmp_path))
    file = tmp_path / 'data' / 'tif' / 'a' / 'a.tif'
    file.parent.mkdir(parents=True)
    tifffile.imwrite(file, BANDS, photometric='minisblack')
    cfg.model.data_preprocessor = dict(mean=[9.0] * 5, std=[50.0] * 5)
    cfg.model.backbone.in_channels = 5
    cfg.model.head.num_classes = 1
    cfg.val_dataloader = cfg.test_dataloader
    dataset = cfg.test_dataloader.dataset
    dataset.update(data_prefix='tif', classes=['a'])
    dataset.pipeline[0].imdecode_backend = 'tifffile'
    dataset.pipeline.insert(1, dict(type='Resize', scale=(64, 64)))
    cfg.work_dir = str(tmp_path / 'work')
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'a.pth'
    cfg.dump(config)
    _, picture = inference.load(inference.build_pipeline(cfg), str(file))
    assert (picture == PIXELS).all()
    forward = OverLoCK.forward
    with mock.patch.object(OverLoCK, 'forward', autospec=True) as spy:
        spy.side_effect = forward
        runner = Runner.from_cfg(cfg)
        runner.test()
        torch.save(runner.model.state_dict(), checkpoint)
        argv = config, checkpoint, file, '--out', cfg.work_dir
        tiny.run_tool('predict', *argv, '--device=cpu')
        tiny.run_tool('visualize', 'features', *argv, '--device=cpu')
        tiny.load_tool('summarize').draw_predictions(
            cfg, str(checkpoint), tmp_path / 'p.png', 1, 0
        )
    expected, *seen = (call.args[1] for call in spy.call_args_list)
    assert expected.shape == (1, 5, 64, 64) and expected.std() > 0.3
    torch.testing.assert_close(seen, [expected] * 3, rtol=0, atol=0)


def test_pictures():
    """8 bits are drawn on as they are, anything else is stretched."""
    gray = PIXELS[..., 0]
    assert (to_picture(gray) == gray[..., None]).all()
    for dtype in (np.uint8, np.float32):
        picture = to_picture(BANDS.astype(dtype))
        assert picture.dtype == np.uint8 and (picture == PIXELS).all()
    ramp = np.linspace(-500, 500, 101).astype(np.int16)
    picture = to_picture(ramp[:, None])[:, 0, 0]
    assert [*picture[[0, 50, 100]]] == [0, 127, 255]
    assert not to_picture(np.full((2, 2, 3), 700, np.uint16)).any()
    assert to_picture(np.array([[np.nan, 1e6], [0, 1e6]])).max() == 255


def test_results_are_no_inputs(tmp_path):
    """Of an earlier run, in a folder of images, unless they are asked for.

    Links that lead back are not followed.
    """
    out = tmp_path / 'out'
    (tmp_path / 'loop').symlink_to(tmp_path)
    for file in (tmp_path / 'a.png', out / 'pictures' / 'a.png'):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert find_files([str(tmp_path)], out) == [(tmp_path / 'a.png', 'a')]
    assert len(find_files([str(tmp_path)])) == 2
    assert len(find_files([str(out)], out)) == 1


# ------------------------------------------------------------------- configs

# Steps that load an image, wherever those of the dataset are, and the truth.
LOAD = dict(type='LoadImageFromFile', backend_args=dict(backend='petrel'))
OLD = dict(type='LoadImageFromFile', file_client_args=dict(backend='petrel'))
TRUTH = [
    dict(type='mmdet.FilterAnnotations'),
    dict(type=TRANSFORMS.get('mmseg.LoadBiomedicalAnnotation')),
]
PACK = dict(type='mmdet.PackDetInputs')
LEAF = dict(type='CocoDataset', pipeline=[LOAD, *TRUTH, PACK])


def named(*classes):
    return LEAF | dict(metainfo=dict(classes=[*classes]))


def config(**splits):
    loaders = {
        f'{split}_dataloader': dataset and dict(dataset=dataset)
        for split, dataset in splits.items()
    }
    return Config(dict(default_scope='mmdet', **loaders))


DEEP = dict(type='ConcatDataset', datasets=[named('x', 'y'), LEAF])
DEEP = dict(type='RepeatDataset', times=2, dataset=DEEP)
MIX = dict(
    type='MultiImageMixDataset',
    dataset=named('x', 'y') | dict(pipeline=[OLD, *TRUTH]),
    pipeline=[PACK],
)
UNNAMED = dict(type='mmpretrain.CustomDataset', data_root='')


def test_left_out(tmp_path):
    """tools/predict.py says what else it cannot read."""
    file = tmp_path / 'a.png'
    file.touch()
    pipeline = mock.Mock(transforms=[lambda data: None])
    with pytest.raises(inference.UnreadableImage, match='leaves it out'):
        inference.load(pipeline, str(file))


@pytest.mark.parametrize(
    'splits, classes',
    [
        (dict(test=DEEP, val=named('v'), train=named('r')), ['x', 'y']),
        (dict(test=None, val=MIX, train=named('r')), ['x', 'y']),
        (dict(train=named('r')), ['r']),
        (dict(test=UNNAMED, val=named('v')), None),
        ({}, None),
    ],
)
def test_classes(splits, classes):
    """Those to test, to validate, to train; no set is skipped."""
    assert inference.dataset_meta(config(**splits)).get('classes') == classes


@pytest.mark.parametrize('splits', [dict(test=DEEP), dict(val=MIX), {}])
def test_pipeline(splits):
    """In any wrapper; files are local, and no truth is loaded."""
    cfg = config(train=LEAF, **splits)
    if not splits:
        with pytest.raises(inference.ConfigError, match='test_pipeline = '):
            inference.build_pipeline(cfg)
        cfg.test_pipeline = LEAF['pipeline']
    load, pack = inference.build_pipeline(cfg).transforms
    assert type(load).__name__ == 'LoadImageFromFile'
    assert type(pack).__name__ == 'PackDetInputs'
    assert load.backend_args is load.file_client_args is None


def test_classes_in_a_file(tmp_path):
    """Names, not letters of the path."""
    file = tmp_path / 'classes.txt'
    cfg = config(test=UNNAMED | dict(classes=str(file)))
    with pytest.raises(inference.ConfigError, match='txt.*not exist'):
        inference.dataset_meta(cfg)
    file.write_text('some dog\ncat\n')
    assert inference.dataset_meta(cfg)['classes'] == ['some dog', 'cat']


def test_classes_of_a_checkpoint(tmp_path):
    """They go before those of the config, in the form before mmengine too."""
    cfg = Config.fromfile(tiny.classifier(tmp_path))
    cfg.test_dataloader.dataset = named('x', 'y')
    cfg.test_dataloader.dataset.metainfo.palette = [(1, 2, 3)] * 2
    weights = inference.build_model(cfg).state_dict()
    checkpoint = str(tmp_path / 'a.pth')
    classes = ['some dog', 'cat']
    for meta, expected in (
        ({}, ['x', 'y']),
        (dict(dataset_meta=dict(classes=classes)), classes),
        (dict(CLASSES=classes, PALETTE=None, epoch=3), classes),
    ):
        torch.save(dict(state_dict=weights, meta=meta), checkpoint)
        found = inference.init_model(cfg, checkpoint).dataset_meta
        assert found['classes'] == expected and 'epoch' not in found
        assert bool(found.get('palette')) == (expected != classes)


def test_palettes():
    """The dataset's, or a color for every one of other classes."""
    meta = inference.dataset_meta(config(test=LEAF))
    palette = inference.build_visualizer('mmdet', meta).dataset_meta['palette']
    assert len(palette) == 80 and tuple(palette[0]) == (220, 20, 60)
    meta |= dict(classes=[*map(str, range(150))])
    palette = inference.build_visualizer('mmdet', meta).dataset_meta['palette']
    assert len({*map(tuple, palette)}) == 150
