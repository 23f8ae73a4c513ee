"""mmoverlock.inference: what a config says, and images as tests see them."""

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import Runner

from mmoverlock import inference
from mmoverlock.inference import (
    build_pipeline,
    build_visualizer,
    dataset_meta,
    load,
    to_picture,
)
from mmoverlock.models import OverLoCK

tiny.need_openmmlab()

# -------------------------------------------------------------------- images

BANDS = np.random.default_rng(0).integers(0, 256, (40, 50, 5), np.uint8)
PIXELS = BANDS[..., :3]


def test_tools_see_what_tests_see(tmp_path, monkeypatch):
    """Inputs of the network in a test, and in three tools; of five bands."""
    tifffile = pytest.importorskip('tifffile')
    file = tmp_path / 'a.tif'
    tifffile.imwrite(file, BANDS, photometric='minisblack')
    (tmp_path / 'list.txt').write_text('a.tif 1')
    cfg = Config.fromfile(tiny.classifier(tmp_path))
    cfg.model.data_preprocessor = dict(
        num_classes=2, mean=[9.0] * 5, std=[50.0] * 5
    )
    cfg.model.backbone.in_channels = 5
    dataset = dict(
        type='CustomDataset',
        data_root=str(tmp_path),
        ann_file='list.txt',
        classes=['a', 'b'],
        pipeline=[
            dict(type='LoadImageFromFile', imdecode_backend='tifffile'),
            dict(type='Resize', scale=(64, 64)),
            dict(type='PackInputs'),
        ],
        test_mode=True,
    )
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'].dataset = concat(dataset)
    work = tmp_path / 'work'
    cfg.work_dir = str(work)
    _, picture = load(build_pipeline(cfg), str(file))
    assert (picture == PIXELS).all()
    seen = []
    forward = OverLoCK.forward
    monkeypatch.setattr(
        OverLoCK, 'forward', lambda m, x: (seen.append(x), forward(m, x))[1]
    )
    runner = Runner.from_cfg(cfg)
    runner.test()
    [expected] = seen
    assert expected.std() > 0.3
    checkpoint = str(work / 'a.pth')
    torch.save({'state_dict': runner.model.state_dict()}, checkpoint)
    cfg.dump(tmp_path / 'config.py')
    argv = tmp_path / 'config.py', checkpoint, file, '--out', work
    tiny.run_tool('predict', *argv, '--device=cpu')
    tiny.run_tool('visualize', 'features', *argv, '--device=cpu')
    tiny.load_tool('summarize').draw_predictions(
        cfg, checkpoint, work / 'p.png', 1, 0
    )
    torch.testing.assert_close(seen, [expected] * 4, rtol=0, atol=0)


def test_pictures():
    """8 bits are drawn on as they are, anything else is stretched."""
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert (to_picture(gray) == gray[..., None].repeat(3, 2)).all()
    for dtype in (np.uint8, np.float32):
        picture = to_picture(BANDS.astype(dtype))
        assert picture.dtype == np.uint8 and (picture == PIXELS).all()
    ramp = np.tile(np.linspace(0, 1, 101), (3, 1)).T[None]
    for values in (ramp, (ramp * 1000 - 500).astype(np.int32)):
        picture = to_picture(values)[0, :, 0]
        assert picture[0] == 0 and picture[-1] == 255
        assert abs(int(picture[50]) - 127) <= 2
        assert (np.diff(picture.astype(int)) >= 0).all()
    assert not to_picture(np.full((2, 2, 3), 700, np.uint16)).any()
    assert to_picture(np.array([[np.nan, 1e6], [0, 1e6]])).max() == 255


def test_left_out(tmp_path):
    """tools/predict.py says what else it cannot read."""
    file = tmp_path / 'a.png'
    file.touch()
    pipeline = Compose([lambda data: None])
    with pytest.raises(inference.UnreadableImage, match='leaves it out'):
        load(pipeline, str(file))


# ------------------------------------------------------------------- configs

# Steps that load an image, wherever those of the dataset are, and the truth.
LOAD = dict(type='LoadImageFromFile', backend_args=dict(backend='petrel'))
OLD = dict(file_client_args=dict(backend='petrel'))
TRUTH = [
    dict(type='mmdet.FilterAnnotations'),
    dict(type=TRANSFORMS.get('mmseg.LoadBiomedicalAnnotation')),
]
PACK = dict(type='mmdet.PackDetInputs')
LEAF = dict(type='CocoDataset', pipeline=[LOAD, *TRUTH, PACK])


def named(*classes):
    return LEAF | dict(metainfo=dict(classes=[*classes]))


def concat(*datasets):
    return dict(type='ConcatDataset', datasets=[*datasets])


def repeat(dataset):
    return dict(type='RepeatDataset', times=2, dataset=dataset)


def config(**splits):
    loaders = {
        f'{split}_dataloader': dataset and dict(dataset=dataset)
        for split, dataset in splits.items()
    }
    return Config(dict(default_scope='mmdet', **loaders))


@pytest.mark.parametrize(
    'dataset',
    [
        concat(repeat(concat(named('x', 'y'), LEAF))),
        dict(
            type='MultiImageMixDataset',
            dataset=named('x', 'y') | dict(pipeline=[LOAD | OLD, *TRUTH]),
            pipeline=[PACK],
        ),
    ],
)
def test_datasets(dataset):
    """In any wrapper, for testing or else validating; no truth is loaded."""
    for splits in dict(train=LEAF, test=dataset), dict(test=None, val=dataset):
        cfg = config(**splits)
        assert dataset_meta(cfg)['classes'] == ['x', 'y']
        steps = build_pipeline(cfg).transforms
        names = [type(step).__name__ for step in steps]
        assert names == ['LoadImageFromFile', 'PackDetInputs']
        assert steps[0].backend_args is None  # files are local
        assert steps[0].file_client_args is None


def test_order_of_datasets():
    """To test, to validate, to train; one without classes is not skipped."""
    sets = dict(test=named('t'), val=named('v'), train=named('r'))
    for split, dataset in [*sets.items()]:
        classes = dataset['metainfo']['classes']
        assert dataset_meta(config(**sets))['classes'] == classes
        del sets[split]
    assert dataset_meta(config()) == {}
    unnamed = dict(type='mmpretrain.CustomDataset', data_root='')
    assert dataset_meta(config(test=unnamed, val=named('v'))) == {}
    assert dataset_meta(config(val=LEAF))['classes'][2] == 'car'


def test_no_pipeline():
    """Only a training set, whose pipeline is another one."""
    cfg = config(train=LEAF, test=dict(type='CocoDataset'))
    with pytest.raises(inference.ConfigError, match='test_pipeline = '):
        build_pipeline(cfg)
    cfg.test_pipeline = [LOAD, PACK]
    assert len(build_pipeline(cfg).transforms) == 2


@pytest.mark.parametrize('as_class', [False, True])
def test_classes_in_a_file(tmp_path, as_class):
    """Of both forms that mmpretrain takes; names, not letters of the path."""
    file = tmp_path / 'classes.txt'
    given = dict(classes=str(file))
    dataset = dict(type='mmpretrain.CustomDataset', **given)
    if as_class:
        kind = DATASETS.get('mmpretrain.CustomDataset')
        dataset = dict(type=kind, metainfo=given)
    cfg = config(test=dataset)
    with pytest.raises(inference.ConfigError, match='classes.txt.*not exist'):
        dataset_meta(cfg)
    file.write_text('some dog\ncat\n')
    assert dataset_meta(cfg)['classes'] == ['some dog', 'cat']


def test_classes_of_a_checkpoint(tmp_path):
    """They go before those of the config, in the form before mmengine too."""
    cfg = Config.fromfile(tiny.classifier(tmp_path))
    cfg.test_dataloader.dataset = named('x', 'y')
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


def test_scope():
    """Of configs without a default scope, as of types that are classes."""
    for kind, scope in (
        ('mmoverlock.models.classification.OverLoCKClsHead', 'mmpretrain'),
        ('torch.nn.Linear', None),
        ('MaskRCNN', None),
    ):
        cfg = Config(dict(model=dict(type=kind)))
        assert inference.scope_of(cfg) == scope
    assert inference.scope_of(Config()) is None


def test_palettes():
    """The dataset's, or a color for every one of other classes."""
    meta = dataset_meta(config(test=LEAF))
    palette = build_visualizer('mmdet', meta).dataset_meta['palette']
    assert len(palette) == 80 and tuple(palette[0]) == (220, 20, 60)
    meta |= dict(classes=[*map(str, range(150))])
    palette = build_visualizer('mmdet', meta).dataset_meta['palette']
    assert len({*map(tuple, palette)}) == 150
