"""Faulty data: what is said of it names the file and the entry."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from mmoverlock import data
from mmoverlock.data import DataError, Finding, checked
from mmoverlock.data.checks import (
    CHECKS,
    Split,
    annotation_file,
    head_classes,
    some_samples,
    unused_label_maps,
)
from mmoverlock.data.runner import make_split

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.evaluation import CocoMetric  # noqa: E402
from mmpretrain.datasets import CIFAR10  # noqa: E402
from mmseg.datasets.transforms import (  # noqa: E402
    LoadAnnotations as MMSegLoadAnnotations,
)
from pycocotools.mask import decode, frPyObjects  # noqa: E402


def load(scope, dataset, workers=0):
    """Load all samples of a dataset as a runner does."""
    init_default_scope(scope)
    loader = dict(
        batch_size=2,
        num_workers=workers,
        dataset=dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    batches = [*checked(Runner).build_dataloader(Config(loader), seed=0)]
    return [sample for batch in batches for sample in batch['data_samples']]


def draw(path, size=(48, 40), mode='RGB', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 100, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# ----------------------------------------------------------------- images


@pytest.fixture
def images(tmp_path):
    """A dataset of classification, and its first image."""
    for name in ('a/0', 'a/1', 'b/2'):
        draw(tmp_path / 'data' / f'{name}.jpg')
    dataset = dict(
        type='CustomDataset',
        data_root=str(tmp_path / 'data'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )
    return dataset, tmp_path / 'data/a/0.jpg'


FAULTS = {
    'cut off': truncate,
    'damaged or no image': lambda path: path.write_bytes(b'text'),
    'damaged': lambda path: path.write_bytes(b''),
    'does not exist': Path.unlink,
}


@pytest.mark.parametrize(
    ('share', 'options'),
    [
        (0.3, {}),
        (0.999, {}),
        (0.9, {'progressive': True}),
        (0.999, {'exif': True}),
        (0.9, {'format': 'PNG'}),
    ],
)
def test_cut_off(images, share, options):
    """Wherever it is cut, with a thumbnail inside too."""
    dataset, path = images
    if 'exif' in options:
        thumbnail = draw(path.with_name('thumbnail'), format='JPEG')
        options = {'exif': b'Exif\0\0' + thumbnail.read_bytes()}
        thumbnail.unlink()
    draw(path, **options)
    assert load('mmpretrain', dataset)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    # OpenCV before 4.12 decodes any JPEG.
    problem = 'damaged' if 'format' in options else 'cut off'
    with pytest.raises(DataError, match=f'/a/0.jpg is {problem}'):
        load('mmpretrain', dataset)


def test_data_behind_the_end(images):
    dataset, path = images
    path.write_bytes(path.read_bytes() + bytes(100))
    assert len(load('mmpretrain', dataset)) == 3


def test_unknown_label(images):
    dataset, path = images
    listed = path.parents[1] / 'list.txt'
    dataset.update(ann_file='list.txt', metainfo={'classes': ['a', 'b']})
    listed.write_text('a/0.jpg 0\na/1.jpg 1\n')
    assert len(load('mmpretrain', dataset)) == 2
    listed.write_text('a/1.jpg 1\na/0.jpg 2\n')
    with pytest.raises(DataError, match='a/0.jpg .* no class .2; .* to 1.$'):
        load('mmpretrain', dataset)


@pytest.mark.parametrize('workers', [0, 1])
def test_faulty_pipeline(images, workers):
    """Not the fault of data: the traceback stays, and names the file."""
    dataset, path = images
    dataset['pipeline'].insert(1, dict(type='ToPIL'))
    dataset['pipeline'].insert(2, dict(type='Resize', scale=8))
    with pytest.raises(RuntimeError) as error:
        load('mmpretrain', dataset, workers)
    assert not isinstance(error.value, DataError)
    assert f'the pipeline fails for {path}, in Resize: ' in str(error.value)
    assert workers or error.value.__cause__


# ----------------------------------------------------------- segmentation


@pytest.fixture
def segmentation(tmp_path):
    """A dataset of segmentation, its first image and the labels of it."""
    for i in range(3):
        draw(tmp_path / f'images/{i}.jpg')
        draw(tmp_path / f'labels/{i}.png', mode='L')
    loading = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    dataset = dict(
        type='ADE20KDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[*loading, dict(type='PackSegInputs')],
    )
    return dataset, tmp_path / 'images/0.jpg', tmp_path / 'labels/0.png'


def test_faulty_loader(images):
    """Not the fault of data, but of the config; a file in use is named."""
    dataset, path = images
    loader = dict(batch_size=1, num_workers=0, persistent_workers=True)
    loader |= dict(dataset=dataset, sampler=dict(type='DefaultSampler'))
    init_default_scope('mmpretrain')
    with pytest.raises(DataError) as error:
        checked(Runner).build_dataloader(Config(loader))
    assert str(error.value) == (
        f'the loader of {path.parents[1]}/ cannot be built: '
        'persistent_workers option needs num_workers > 0'
    )
    crop = dict(type='RandomResizedCrop', scale=8, crop_ratio_range=(1, 0.5))
    dataset['pipeline'].insert(1, crop)
    with pytest.raises(ValueError) as error:
        load('mmpretrain', dataset)
    assert not isinstance(error.value, DataError)


@pytest.mark.parametrize('kind', ['bands', 'bomb', 'size'])
def test_good_file(images, monkeypatch, kind):
    """The pipeline fails on files that are not damaged."""
    dataset, path = images
    reader, step = dataset['pipeline'][0], dict(type='Resize', scale=8)
    if kind == 'bands':  # which neither Pillow nor OpenCV reads
        tifffile = pytest.importorskip('tifffile')
        path = path.with_suffix('.tif')
        pixels = np.zeros((40, 48, 5), np.uint8)
        tifffile.imwrite(
            path, pixels, photometric='minisblack', planarconfig='contig'
        )
        for other in path.parents[1].glob('*/*.jpg'):
            other.unlink()
        reader.update(imdecode_backend='tifffile', color_type='unchanged')
        dataset['extensions'] = ('.tif',)
        assert len(load('mmpretrain', dataset)) == 1
    elif kind == 'bomb':  # what Pillow calls a picture of many pixels
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
        assert len(load('mmpretrain', dataset)) == 3
    dataset['pipeline'].insert(1, dict(type='ToPIL'))
    dataset['pipeline'].insert(2, step)
    with pytest.raises(RuntimeError, match='the pipeline fails for') as error:
        load('mmpretrain', dataset)
    assert f'{path}, in ' in str(error.value)
    assert 'damaged' not in str(error.value)


def test_format_that_opencv_does_not_read(images):
    dataset, path = images
    draw(path.with_suffix('.tga'))
    dataset['extensions'] = ('.tga',)
    with pytest.raises(DataError) as error:
        load('mmpretrain', dataset)
    assert str(error.value).startswith(
        f'{path.with_suffix(".tga")} is of a format that OpenCV does not '
        "read; Pillow does: imdecode_backend='pillow'"
    )
    dataset['pipeline'][0]['imdecode_backend'] = 'pillow'
    assert len(load('mmpretrain', dataset)) == 1


def test_label_map_of_another_size(segmentation):
    dataset, image, path = segmentation
    draw(path, size=(24, 20), mode='L')
    with pytest.raises(DataError) as error:
        load('mmseg', dataset)
    assert str(error.value) == (
        f'{path} has another size than its image (24 x 20 pixels, and 48 x 40 '
        f'of {image})'
    )
    dataset['pipeline'].pop(1)  # where labels are not read
    path.unlink()
    assert len(load('mmseg', dataset)) == 3


def test_rotated_image(segmentation):
    """OpenCV turns images as their EXIF data say."""
    dataset, image, _ = segmentation
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(image, size=(40, 48), exif=exif)
    sample = load('mmseg', dataset)[0]
    assert sample.ori_shape == sample.gt_sem_seg.shape == (40, 48)
    draw(image, exif=exif)  # drawn as wide as its labels
    with pytest.raises(
        DataError, match='than its image .48 x 40 .*40 x 48 of'
    ):
        load('mmseg', dataset)


def test_unknown_label_in_a_map(segmentation):
    dataset, _, path = segmentation
    labels = np.zeros((40, 48), np.uint8)
    labels[0, 0] = 150
    Image.fromarray(labels).save(path)
    assert load('mmseg', dataset)[0].gt_sem_seg.data[0, 0, 0] == 149
    labels[0, 0] = 151
    Image.fromarray(labels).save(path)
    with pytest.raises(DataError, match='0.png .* no class .150; .* 0 to 149'):
        load('mmseg', dataset)


@pytest.mark.parametrize('mode', ['RGB', 'LA', 'P', 'L', '1'])
def test_channels_of_a_label_map(segmentation, mode):
    dataset, image, path = segmentation
    draw(path, mode=mode)
    if mode in ('P', 'L', '1'):
        labels = np.asarray(Image.open(path)).astype(int) - 1
        sample = load('mmseg', dataset)[0]
        assert (sample.gt_sem_seg.data[0].numpy() == labels % 256).all()
        return
    shape = (40, 48, len(mode))
    with pytest.raises(DataError) as error:
        load('mmseg', dataset)
    assert str(error.value).startswith(
        f'{path} is a label map of several channels (of shape {shape}): '
    )


@pytest.mark.parametrize('top', [255, 256])
def test_label_map_of_16_bits(segmentation, top):
    dataset, image, path = segmentation
    labels = np.ones((40, 48), np.uint16)
    labels[3, 4] = top
    Image.fromarray(labels).save(path)
    if top < 256:
        data = load('mmseg', dataset)[0].gt_sem_seg.data[0]
        assert data[3, 4] == 255 and data[0, 0] == 0
        return
    step = MMSegLoadAnnotations()
    info = dict(seg_map_path=path, reduce_zero_label=False, seg_fields=[])
    assert step(info)['gt_seg_map'][3, 4] == top - 256
    with pytest.raises(DataError) as error:
        load('mmseg', dataset)
    assert str(error.value).startswith(
        f'{path} has labels beyond 255 ({top}): '
    )


@pytest.mark.parametrize(
    ('values', 'zero', 'sound'),
    [
        ((0, 255), False, False),
        ((255,), False, False),
        ((0,), False, True),  # nothing is lost
        ((0, 1), False, True),
        ((0, 1, 255), True, False),  # 0 is ignored, and 1 is class 0
        ((1, 2), True, True),
    ],
)
def test_masks_of_two_classes(segmentation, values, zero, sound):
    """What is 255, mmseg ignores; that is told only if no map has class 1."""
    dataset, _, path = segmentation
    dataset.update(type='BaseSegDataset', reduce_zero_label=zero)
    dataset['metainfo'] = dict(classes=['background', 'crack'])
    labels = np.zeros((40, 48), np.uint8)
    labels[:20] = values[-1]
    for file in path.parent.iterdir():
        Image.fromarray(labels).save(file)
    for value in values:
        labels[:, value % 48] = value
    Image.fromarray(labels).save(path.with_name('1.png'))
    found = check('mmseg', dataset)
    assert bool(found) != sound, found
    for finding in found:
        assert finding[:2] == (
            f'{path.parent}',
            'has label maps without class 1',
        )
        assert finding.fault


def test_label_map_without_image(segmentation):
    """mmseg trains on the images that are there."""
    dataset, image, path = segmentation
    init_default_scope('mmseg')
    split = Split({'key': DATASETS.build(dataset)})
    assert not [*unused_label_maps(split)]
    image.unlink()
    assert len(load('mmseg', dataset)) == 2
    (finding,) = unused_label_maps(split)
    assert finding[:3] == (
        f'{path.parent}',
        'has label maps without an image',
        '0.png',
    )
    assert not finding.fault


# -------------------------------------------------------------- detection


def annotation(i, image=0, **changes):
    return dict(
        id=i,
        image_id=image,
        category_id=1,
        bbox=[1, 2, 20, 30],
        area=600,
        iscrowd=0,
        segmentation=[[1, 2, 21, 2, 21, 32]],
    ) | dict(changes)


@pytest.fixture
def coco(tmp_path):
    """A dataset of detection, the contents of its file, and how to write."""
    images = [draw(tmp_path / f'images/{i}.jpg') for i in range(3)]
    contents = dict(
        images=[
            dict(id=i, file_name=path.name, width=48, height=40)
            for i, path in enumerate(images)
        ],
        annotations=[annotation(i + 1, i) for i in range(3)],
        categories=[dict(id=1, name='cat'), dict(id=7, name='other')],
    )
    path = tmp_path / 'file.json'
    dataset = dict(
        type='CocoDataset',
        ann_file=str(path),
        data_prefix=dict(img=str(tmp_path / 'images')),
        metainfo=dict(classes=['cat']),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    )

    def write(**changes):
        path.write_text(json.dumps(contents | changes))
        return path

    write()
    return dataset, contents, write


@pytest.mark.parametrize(
    ('kind', 'problem', 'workers'),
    [
        *itertools.product(['images', 'segmentation', 'coco'], FAULTS, [0]),
        ('images', 'cut off', 1),
    ],
)
def test_faulty_file(request, kind, problem, workers):
    """An image of each task, or a label map."""
    dataset, *rest = request.getfixturevalue(kind)
    scope, path = {
        'images': ('mmpretrain', rest[0]),
        'segmentation': ('mmseg', rest[-1]),
        'coco': ('mmdet', None),
    }[kind]
    path = path or Path(dataset['data_prefix']['img'], '2.jpg')
    assert len(load(scope, dataset, workers)) == 3
    if kind == 'images':
        if problem == 'does not exist':  # a file that is listed
            (path.parents[1] / 'list.txt').write_text('a/0.jpg 0\n')
            dataset['ann_file'] = 'list.txt'
        dataset = dict(type='RepeatDataset', times=2, dataset=dataset)
    FAULTS[problem](path)
    with pytest.raises(DataError) as error:
        load(scope, dataset, workers)
    assert str(error.value).startswith(f'{path} ')
    if path.suffix == '.png':
        problem = problem.replace('cut off', 'damaged')
    assert problem in str(error.value)
    assert '\n' not in str(error.value)


EMPTY = 'annotations with a box of less than a pixel'
OUTSIDE = 'annotations with a box outside the image'
LEFT_OUT = [
    (dict(bbox=[0, 0, 0, 0]), EMPTY),
    (dict(bbox=[1, 1, 20, 0.5]), EMPTY),
    (dict(bbox=[48, 0, 9, 9]), OUTSIDE),
    (dict(bbox=[0, 40, 9, 9]), OUTSIDE),
    (dict(bbox=[-9, 5, 9, 9]), OUTSIDE),
    (dict(bbox=[5, -9, 9, 9]), OUTSIDE),
    (dict(area=0), 'annotations of area 0'),
    (dict(category_id=7), 'annotations of category 7, which is no class'),
    (dict(image_id=9), 'annotations of images that are not listed'),
]


@pytest.mark.parametrize(('changes', 'what'), LEFT_OUT)
def test_left_out(coco, changes, what):
    """What mmdet leaves out is told, and all else is there."""
    dataset, contents, write = coco
    more = [annotation(i, **changes) for i in (10, 11)]
    beyond = annotation(12, bbox=[-5, 30, 20, 99])
    path = write(annotations=[*contents['annotations'], beyond, *more])
    samples = load('mmdet', dataset)
    assert [len(sample.gt_instances) for sample in samples] == [2, 1, 1]
    assert [*annotation_file(str(path), [1])] == [
        Finding(
            *(str(path), f'has {what}', f'annotation {i}'),
            'MMDetection leaves them out',
            fault=False,
        )
        for i in (10, 11)
    ]


def test_images_left_out(coco):
    dataset, contents, write = coco
    contents['images'][1]['width'] = 31
    path = write(annotations=contents['annotations'][:2])
    loader = dict(batch_size=1, sampler=dict(type='DefaultSampler'))
    init_default_scope('mmdet')
    build = checked(Runner).build_dataloader
    assert len(build(Config(loader | dict(dataset=dataset))).dataset) == 1
    found = annotation_file(str(path), [1], dataset['filter_cfg'])
    assert [(finding.what, finding.entry) for finding in found] == [
        ('has images of less than 32 pixels', 'image 1'),
        ('has images without annotations', 'image 2'),
    ]
    dataset = dataset | dict(test_mode=True)
    assert len(build(Config(loader | dict(dataset=dataset))).dataset) == 3
    assert not [*annotation_file(str(path), [1])]


UNUSABLE = [
    (b'', 'is empty'),
    (b'{"images": [', 'is cut off or no JSON file '),
    (b'\xff\xfe', 'is cut off or no JSON file '),
    (b'[' * 100_000, 'is cut off or no JSON file '),
    (b'{}', "KeyError: 'images'"),
    ({'images': []}, 'has no images'),
    ({'images': 3}, 'is not in the format of COCO'),
    (dict(bbox=[]), 'ValueError'),
    (dict(bbox='wide'), 'TypeError'),
]
# What mmdet loads without an error.
UNSOUND = [
    (dict(bbox=[float('nan')] * 4), r'is no \[x, y, width, height\]'),
    (
        dict(segmentation=dict(size=[5, 5], counts=[25])),
        r'a mask of \[5, 5\] pixels, not \[40, 48\]',
    ),
]


def spoil(coco, contents):
    """Write an annotation file with a fault; return its path."""
    _, good, write = coco
    if isinstance(contents, bytes):
        path = write()
        path.write_bytes(contents)
        return path
    if 'images' in contents:
        return write(**contents)
    return write(
        annotations=[*good['annotations'], annotation(77, **contents)]
    )


@pytest.mark.parametrize(('contents', 'problem'), UNUSABLE)
def test_unusable_annotations(coco, contents, problem):
    path = spoil(coco, contents)
    with pytest.raises(DataError) as error:
        load('mmdet', coco[0])
    assert str(error.value).startswith(f'{path} ')
    if isinstance(contents, dict) and 'images' not in contents:
        problem += ".*'id': 77"
    assert re.search(problem, str(error.value))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(('contents', 'problem'), UNSOUND)
def test_unsound_annotations(coco, contents, problem):
    path = spoil(coco, contents)
    (finding,) = annotation_file(str(path), [1])
    assert re.search(problem + ".*'id': 77", str(finding))
    assert finding.fault


def test_missing_keys(coco):
    dataset, good, write = coco
    for key in ('bbox', 'area', 'category_id', 'image_id', 'id'):
        bad = annotation(77)
        del bad[key]
        write(annotations=[bad])
        with pytest.raises(DataError, match=f"KeyError: '{key}' in "):
            load('mmdet', dataset)


def test_types_that_are_classes(coco):
    """As configs in the new style have them."""
    dataset = coco[0] | dict(type=CocoDataset)
    path = spoil(coco, b'')
    with pytest.raises(DataError, match=f'{path} is empty'):
        load('mmdet', dataset)
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    data.check_data(cfg, 'test')
    path.unlink()
    with pytest.raises(DataError, match=f'{path} .*Unpack train2017.zip'):
        data.check_data(cfg, 'test')
    cfg.test_dataloader.dataset = dict(type=CIFAR10, data_root='nowhere')
    data.check_data(cfg, 'test')  # it is downloaded


@pytest.mark.parametrize('kind', ['annotation', 'image'])
def test_repeated_ids(coco, kind):
    """mmdet stops at annotations, and keeps the last of the images."""
    dataset, good, write = coco
    entries = good[f'{kind}s']
    entries.append(entries[1] | dict(file_name='0.jpg'))
    path = write()
    (finding,) = annotation_file(str(path), [1])
    what = f'has several {kind}s with one id ({kind} {entries[1]["id"]})'
    assert str(finding).startswith(f'{path} {what}: ')
    if kind == 'annotation':
        with pytest.raises(DataError, match=re.escape(what)):
            load('mmdet', dataset)


def test_no_annotations(coco):
    """As COCO's test-dev has it."""
    dataset, contents, write = coco
    del contents['annotations']
    path = write()
    assert len(load('mmdet', dataset | dict(test_mode=True))) == 3
    assert not [*annotation_file(str(path), [1])]
    with pytest.raises(DataError, match=f'nothing to load in .* and {path}'):
        load('mmdet', dataset)


def test_size_other_than_annotated(coco):
    dataset, contents, write = coco
    path = Path(dataset['data_prefix']['img'], '1.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for size, shown in (((48, 40), '40 x 48'), ((24, 20), '20 x 24')):
        draw(path, size, exif=exif)
        with pytest.raises(DataError) as error:
            load('mmdet', dataset)
        assert str(error.value).startswith(
            f'{path} has another size than annotated ({shown} pixels as '
            'loaded, annotated as 48 x 40): '
        )
    draw(path, (40, 48), exif=exif)
    assert load('mmdet', dataset)[1].ori_shape == (40, 48)


# -------------------------------------------- one thing against another


def check(scope, dataset, evaluator=None, model=None):
    """The findings of what runs before a training."""
    init_default_scope(scope)
    loader = dict(
        batch_size=1,
        dataset=dataset | dict(test_mode=True),
        sampler=dict(type='DefaultSampler'),
    )
    cfg = Config(dict(val_dataloader=loader, val_evaluator=evaluator))
    loader = checked(Runner).build_dataloader(cfg.val_dataloader, seed=0)
    evaluator = evaluator and Evaluator(evaluator)
    split = make_split(cfg, 'val', loader.dataset, evaluator, model)
    return [found for test in (*CHECKS, some_samples) for found in test(split)]


def metric(path, **settings):
    return dict(type='CocoMetric', ann_file=str(path)) | settings


def score(path, metric='bbox'):
    """Score the box and the mask of an `annotation`, found in all images."""
    init_default_scope('mmdet')
    metric = CocoMetric(ann_file=str(path), metric=metric)
    metric.dataset_meta = dict(classes=['cat'])
    masks = torch.zeros(1, 40, 48, dtype=torch.bool)
    masks[0] = torch.from_numpy(
        decode(frPyObjects(annotation(1)['segmentation'], 40, 48)[0])
    )
    found = dict(
        bboxes=torch.tensor([[1.0, 2, 21, 32]]),
        scores=torch.ones(1),
        labels=torch.zeros(1, dtype=torch.int),
        masks=masks,
    )
    for i in range(3):
        sample = dict(img_id=i, ori_shape=(40, 48), pred_instances=found)
        metric.process({}, [sample])
    scores = metric.evaluate(3)
    return scores[f'coco/{metric.metrics[0]}_mAP_50']


def test_sound_annotations(coco):
    dataset, _, write = coco
    path = write()
    assert score(path) == score(path, 'segm') == 1
    assert not check('mmdet', dataset, metric(path, metric=['bbox', 'segm']))


MASK = 'has annotations without a mask, or polygons of one or two points'
UNSCORABLE = [
    (dict(id=0), 'has an annotation with the id 0', 0),
    (dict(id='a'), 'has ids that are no numbers', ValueError),
    (dict(iscrowd=...), 'has annotations without iscrowd', KeyError),
    (dict(segmentation=...), MASK, KeyError),
    (dict(segmentation=[]), MASK, IndexError),
    (dict(segmentation=[[1, 2]]), MASK, Exception),
    (dict(segmentation=[[1, 2, 3, 4]]), MASK, TypeError),
]


@pytest.mark.parametrize(('changes', 'what', 'result'), UNSCORABLE)
def test_annotations_that_cannot_be_scored(coco, changes, what, result):
    dataset, contents, write = coco
    bad, other = annotation(1), annotation(5, 1, category_id=7)  # no class
    for key, value in changes.items():
        if value is ...:
            del bad[key], other[key]
        elif key == 'id':
            bad[key] = value
        else:
            bad[key] = other[key] = value
    path = write(annotations=[bad, other])
    kind = 'segm' if what == MASK else 'bbox'
    if result == 0:
        assert score(path, kind) == 0
    else:
        with pytest.raises(result):
            score(path, kind)
    found = check('mmdet', dataset, metric(path, metric=kind))
    name = f'val_evaluator.ann_file {path}'
    entry = f'annotation {bad["id"]!r}'
    assert [tuple(finding[:3]) for finding in found] == [(name, what, entry)]
    assert found[0].fault
    if kind == 'segm':
        assert not check('mmdet', dataset, metric(path, metric='bbox'))
    settings = dict(format_only=True, outfile_prefix='results')
    assert not check('mmdet', dataset, metric(path, **settings))


def test_evaluation_without_annotations(coco):
    dataset, contents, write = coco
    path = write()
    (finding,) = check('mmdet', dataset, metric(write_other(path, [])))
    assert finding[:2] == (
        f'val_evaluator.ann_file {path.parent}/other.json',
        'has no annotations',
    )
    assert finding.fault
    assert score(path.parent / 'other.json') == -1
    del contents['annotations']  # as in COCO's test-dev
    (finding,) = check('mmdet', dataset, metric(write()))
    assert finding.what == 'has no annotations' and not finding.fault
    settings = dict(format_only=True, outfile_prefix='results')
    assert not check('mmdet', dataset, metric(path, **settings))


def write_other(path, annotations, **changes):
    """Write a changed copy of an annotation file."""
    other = path.with_name('other.json')
    contents = json.loads(path.read_text())
    for image in contents['images']:
        image.update({k: v(image) for k, v in changes.items()})
    other.write_text(json.dumps(contents | dict(annotations=annotations)))
    return other


def test_evaluation_of_other_images(coco):
    dataset, contents, write = coco
    path = write()
    marks = [annotation(1, 10)]
    other = write_other(path, marks, id=lambda image: image['id'] + 10)
    name = f'val_evaluator.ann_file {other}'
    found = check('mmdet', dataset, metric(other))
    assert [(finding.file, finding.fault) for finding in found] == [
        *[(name, True)] * 3,
        *[(name, False)] * 3,
    ]
    folder = dataset['data_prefix']['img']
    assert found[2][1:3] == (
        'does not list images of the dataset',
        f'image 2, {folder}/2.jpg',
    )
    with pytest.raises(AssertionError):
        score(other)
    other = write_other(path, [annotation(1)], file_name=lambda _: 'b/1.jpg')
    found = check('mmdet', dataset, metric(other))
    assert [finding[1:3] for finding in found] == [
        (
            'lists other images than the dataset, under their ids',
            f'image {i}: b/1.jpg, and {folder}/{i}.jpg',
        )
        for i in (0, 2)
    ]


NAMES = [
    (['cat', 'other'], []),
    (
        ['other', 'cat'],
        [
            (
                'has its categories in another order than the classes',
                "label 0 is 'cat' in it and 'other' in the config",
                True,
            )
        ],
    ),
    (
        ['Cat', 'other'],
        [
            (
                'has no category for a class',
                "'Cat'; is it 'cat' there?",
                True,
            )
        ],
    ),
    (['cat', 'zebra'], [('has no category for a class', "'zebra'", False)]),
]


@pytest.mark.parametrize(('classes', 'expected'), NAMES)
def test_class_names(coco, classes, expected):
    dataset, _, write = coco
    path = write()
    dataset['metainfo'] = dict(classes=classes)
    found = check('mmdet', dataset, metric(path))
    for file in (str(path), f'val_evaluator.ann_file {path}'):
        assert [
            (finding.what, finding.entry, finding.fault)
            for finding in found
            if finding.file == file
        ] == expected
    assert len(found) == 2 * len(expected)


def test_two_categories_of_one_name(coco):
    dataset, contents, write = coco
    contents['categories'].append(dict(id=9, name='cat'))
    dataset['metainfo'] = dict(classes=['cat', 'other'])
    path = write()
    (finding,) = check('mmdet', dataset)
    assert finding[:3] == (
        str(path),
        'has several categories of one name',
        "'cat'",
    )


@pytest.mark.parametrize(
    ('classes', 'words'),
    [(2, None), (3, 'fewer classes than a head'), (1, 'more classes than')],
)
def test_head_classes(coco, classes, words):
    dataset, _, write = coco
    dataset['metainfo'] = dict(classes=['cat', 'other'])
    write()
    init_default_scope('mmdet')
    model = nn.Module()
    head = dict(type='FCNMaskHead', in_channels=2, conv_out_channels=2)
    model.mask_head = MODELS.build(head | dict(num_classes=classes))
    head = dict(type='RPNHead', in_channels=2, feat_channels=2)
    model.rpn_head = MODELS.build(head)
    found = check('mmdet', dataset, model=model)
    assert len(found) == bool(words)
    for finding in found:
        assert finding.file == 'val_dataloader.dataset'
        assert words in finding.what
        assert finding.entry == f'2, and mask_head.num_classes is {classes}'


def test_heads_of_the_configs():
    """Every model of the project takes 80, 133, 150 or 1000 classes."""
    dataset = nn.Module()
    for path in sorted((tiny.ROOT / 'configs').glob('[!_]*/*_t_*.py')):
        cfg = Config.fromfile(path)
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.arch = tiny.ARCH
        inner = cfg.test_dataloader.dataset
        with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
            classes = inner.get('metainfo', {}).get('classes')
            classes = classes or registry.get(inner.type).METAINFO['classes']
        dataset.metainfo = dict(classes=classes)
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        assert not [*head_classes(Split({'key': dataset}, model=model))], path
        dataset.metainfo = dict(classes=classes[1:])
        assert [*head_classes(Split({'key': dataset}, model=model))], path


# --------------------------------------------------------- nothing to load


def test_no_known_class(coco):
    dataset, _, write = coco
    path = write(categories=[dict(id=1, name='mine')])
    with pytest.raises(DataError, match='none has annotations of the classes'):
        load('mmdet', dataset)
    with pytest.raises(DataError, match=str(path)):
        load('mmdet', dataset)
    write(categories=[dict(id=1, name='Cat')])
    with pytest.raises(DataError, match="class .'cat'; is it 'Cat' there?"):
        load('mmdet', dataset)


def test_no_images(images, segmentation, tmp_path):
    dataset, image, _ = segmentation
    for path in image.parent.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f'nothing to load in {image.parent}'):
        load('mmseg', dataset)
    dataset, image = images
    (tmp_path / 'data/list.txt').touch()
    with pytest.raises(DataError, match='data/list.txt'):
        load('mmpretrain', dataset | dict(ann_file='list.txt'))
    for path in (tmp_path / 'data').glob('*/*'):
        path.unlink()
    where = f'{tmp_path}/data/ cannot be loaded: Found 0 files'
    with pytest.raises(DataError, match=where):
        load('mmpretrain', dataset)


def test_empty_list_of_imagenet(images, tmp_path):
    """It reads meta/SPLIT.txt, which the config does not name."""
    dataset = dict(images[0], type='ImageNet', split='val')
    draw(tmp_path / 'data/val/0.jpg')
    listed = tmp_path / 'data/meta/val.txt'
    listed.parent.mkdir()
    listed.write_text('0.jpg 7\n')
    assert load('mmpretrain', dataset)[0].gt_label == 7
    listed.write_text('')
    with pytest.raises(DataError, match=f'data/val and {listed}: there'):
        load('mmpretrain', dataset)


def test_line_without_label(images, tmp_path):
    dataset, _ = images
    (tmp_path / 'data/list.txt').write_text('a/0.jpg\n')
    with pytest.raises(DataError, match='data/list.txt cannot be loaded: not'):
        load('mmpretrain', dataset | dict(ann_file='list.txt'))


# --------------------------------------------------- tools/check_data.py

STOCK = {
    'coco': ('mask_rcnn/overlock_xt_1x', 'coco'),
    'ade20k': ('upernet/overlock_xt_160k', 'ade/ADEChallengeData2016'),
    'imagenet': ('imagenet/overlock_xt_300e', 'imagenet'),
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws data where the configs of the project look for them."""
    monkeypatch.chdir(tmp_path)

    def draw(kind):
        config, folder = STOCK[kind]
        tiny.load_tool('make_sample_data').main(
            [kind, f'data/{folder}', '--images=4', '--size=64']
        )
        return tiny.ROOT / f'configs/{config}.py'

    return draw


@pytest.mark.parametrize('kind', STOCK)
def test_drawn_data(drawn, kind):
    """The configs of the project and drawn data raise nothing."""
    out = tiny.run_tool('check_data', drawn(kind))
    classes = dict(coco=80, ade20k=150, imagenet=1000)[kind]
    for split, count in (('train', 4), ('val', 8), ('test', 8)):
        line = f'{split}_dataloader.dataset: {count} samples, {classes} '
        assert line in out
    assert 'FAULT' not in out
    assert out.endswith('Nothing would break or mislead a training.\n')


def test_check_data(drawn):
    """Every dataset, inside wrappers too, every kind, the first of each."""
    stock = drawn('coco')
    train, val = (
        Path(f'data/coco/annotations/instances_{split}2017.json')
        for split in ('train', 'val')
    )
    contents = json.loads(train.read_text())
    image = contents['images'][0]
    mark = contents['annotations'][0] | dict(image_id=image['id'])
    contents['annotations'] += [
        *[mark | dict(id=i, area=0) for i in range(10**8, 10**8 + 7)],
        *[mark | dict(id=i, bbox=[0, 0, 0, 0]) for i in (77, 78)],
        mark | dict(id=79, bbox=[1, float('nan'), 2, 3]),
    ]
    train.write_text(json.dumps(contents))
    damaged = Path('data/coco/train2017', image['file_name'])
    truncate(damaged)
    contents = json.loads(val.read_text())
    contents['annotations'][0]['id'] = 0
    val.write_text(json.dumps(contents))
    Path('wrapped.py').write_text(
        f"""
_base_ = {str(stock)!r}
inner = {{{{_base_.train_dataloader.dataset}}}}
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[dict(type='RepeatDataset', times=2, dataset=inner), inner],
    )
)
model = dict(roi_head=dict(mask_head=dict(num_classes=81)))
"""
    )
    options = 'model.roi_head.bbox_head.num_classes=79', 'test_dataloader=None'
    options += 'test_evaluator=None', 'test_cfg=None'
    out = tiny.run_tool(
        'check_data', 'wrapped.py', '--cfg-options', *options, status=1
    )
    first, second = 'datasets.0.dataset', 'datasets.1'
    for key in (first, second):
        line = f'train_dataloader.dataset.{key}: 4 samples, 80 classes\n'
        assert line in out
    path = f'  data/coco/annotations/{train.name}'
    for text in (
        'note, 7 x has annotations of area 0: MMDetection leaves them out\n'
        f'{path}  annotation 100000000\n',
        f'{path}  annotation 100000004\n  and 2 more\n',
        'note, 2 x has annotations with a box of less than a pixel: MM',
        f'FAULT, 1 x is not in the format of COCO\n{path}  ValueError: [1, ',
        f'FAULT, 1 x is cut off: a JPEG without its end\n  {damaged}\n',
        f'FAULT, 1 x has an annotation with the id 0: COCO takes 0 for no '
        f'match: a perfect prediction scores 0\n  val_evaluator.ann_file '
        f'data/coco/annotations/{val.name}  annotation 0\n',
        'FAULT, 3 x has more classes than a head: ',
        '  val_dataloader.dataset  80, and roi_head.bbox_head.num_classes ',
        'FAULT, 3 x has fewer classes than a head: ',
    ):
        assert text in out
    assert out.endswith('\n9 faults would break or mislead a training.\n')


def test_check_data_that_is_missing(drawn):
    config = drawn('imagenet')
    Path('data/imagenet/val').rename('data/imagenet/elsewhere')
    out = tiny.run_tool('check_data', config, status=1)
    assert 'train_dataloader.dataset: 4 samples' in out
    assert 'data missing: data/imagenet/val does not exist (val_' in out
    assert out.endswith('2 faults would break or mislead a training.\n')


# --------------------------------------------------------------- training


def test_training_stops(tmp_path):
    """tools/train.py, before the first iteration."""
    config = tiny.classifier(tmp_path)
    path = tmp_path / 'data/train/b/1.png'
    path.write_bytes(path.read_bytes()[:500])
    output = tiny.run_tool(
        *('train', config, '--work-dir', tmp_path, '--cfg-options'),
        'train_dataloader.num_workers=2',
        status=2,
    )
    assert f'\ntrain.py: {path} is damaged or no image' in output
    assert 'Traceback' not in output


def test_training_does_not_start(tmp_path):
    """What is cheap is checked before the first iteration."""
    config = tiny.detector(
        tmp_path, **{'model.roi_head.bbox_head.num_classes': 79}
    )
    output = tiny.run_tool('train', config, '--work-dir', tmp_path, status=2)
    assert output.splitlines()[-1].startswith(
        'train.py: train_dataloader.dataset has more classes than a head (80, '
        'and roi_head.bbox_head.num_classes is 79): '
    )
    assert 'Epoch(train)' not in output and 'Traceback' not in output
