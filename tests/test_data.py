"""Faulty data: what is said of it names the file and the entry."""

import json
import re
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from mmoverlock.data import DataError, Finding, checked
from mmoverlock.data.checks import annotation_file

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

WORKERS = pytest.mark.parametrize('workers', [0, 1])


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


@WORKERS
@pytest.mark.parametrize('problem', FAULTS)
def test_faulty_image(images, problem, workers):
    dataset, path = images
    assert len(load('mmpretrain', dataset, workers)) == 3
    dataset = dict(type='RepeatDataset', times=2, dataset=dataset)
    if problem == 'does not exist':  # a file that is listed
        listed = path.parents[1] / 'list.txt'
        listed.write_text('a/0.jpg 0\n')
        dataset['dataset']['ann_file'] = 'list.txt'
    FAULTS[problem](path)
    with pytest.raises(DataError) as error:
        load('mmpretrain', dataset, workers)
    assert str(error.value).startswith(f'{path} ')
    assert problem in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('share', [0.3, 0.9, 0.999])
@pytest.mark.parametrize(
    'options', [{}, {'progressive': True}, {'exif': True}, {'format': 'PNG'}]
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


@WORKERS
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


@WORKERS
@pytest.mark.parametrize('problem', FAULTS)
def test_faulty_label_map(segmentation, problem, workers):
    dataset, _, path = segmentation
    assert len(load('mmseg', dataset, workers)) == 3
    FAULTS[problem](path)
    with pytest.raises(DataError) as error:
        load('mmseg', dataset, workers)
    assert str(error.value).startswith(f'{path} ')
    assert problem.replace('cut off', 'damaged') in str(error.value)


@WORKERS
def test_label_map_of_another_size(segmentation, workers):
    dataset, image, path = segmentation
    draw(path, size=(24, 20), mode='L')
    with pytest.raises(DataError) as error:
        load('mmseg', dataset, workers)
    assert str(error.value) == (
        f'{path} has another size than its image (24 x 20 pixels, and 48 x 40 '
        f'of {image})'
    )
    dataset['pipeline'].pop(1)  # where labels are not read
    path.unlink()
    assert len(load('mmseg', dataset, workers)) == 3


def test_rotated_image(segmentation):
    """OpenCV turns images as their EXIF data say."""
    dataset, image, _ = segmentation
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(image, size=(40, 48), exif=exif)
    sample = load('mmseg', dataset)[0]
    assert sample.ori_shape == sample.gt_sem_seg.shape == (40, 48)


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
        annotations=[annotation(i, i) for i in range(3)],
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


@WORKERS
@pytest.mark.parametrize('problem', FAULTS)
def test_faulty_coco_image(coco, problem, workers):
    dataset, _, _ = coco
    assert len(load('mmdet', dataset, workers)) == 3
    path = Path(dataset['data_prefix']['img'], '2.jpg')
    FAULTS[problem](path)
    with pytest.raises(DataError) as error:
        load('mmdet', dataset, workers)
    assert str(error.value).startswith(f'{path} ')
    assert problem in str(error.value)


EMPTY = 'annotations with a box of less than a pixel'
OUTSIDE = 'annotations with a box outside the image'
LEFT_OUT = [
    (dict(bbox=[0, 0, 0, 0]), EMPTY),
    (dict(bbox=[1, 1, 20, 0.5]), EMPTY),
    (dict(bbox=[1, 1, -20, 5]), EMPTY),
    (dict(bbox=[48, 0, 9, 9]), OUTSIDE),
    (dict(bbox=[0, 40, 9, 9]), OUTSIDE),
    (dict(bbox=[-9, 5, 9, 9]), OUTSIDE),
    (dict(bbox=[5, -9, 9, 9]), OUTSIDE),
    (dict(area=0), 'annotations of area 0'),
    (dict(category_id=7), 'annotations of category 7, which is no class'),
    (dict(category_id=99), 'annotations of category 99, which is no class'),
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
    (b'[]', 'is not in the format of COCO'),
    ({'images': []}, 'has no images'),
    ({'images': 3}, 'is not in the format of COCO'),
    (dict(bbox=[]), 'ValueError'),
    (dict(bbox=[1, 2, 3]), 'ValueError'),
    (dict(bbox='wide'), 'TypeError'),
    (dict(bbox=None), 'TypeError'),
    (dict(area=None), 'TypeError'),
]
# What mmdet loads without an error.
UNSOUND = [
    (dict(bbox=[float('nan')] * 4), r'is no \[x, y, width, height\]'),
    (dict(bbox=[0, 0, float('inf'), 9]), r'is no \[x, y, width, height\]'),
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
        with pytest.raises(DataError, match=f"KeyError: '{key}'.*'bbox|id'"):
            load('mmdet', dataset)


@pytest.mark.parametrize('kind', ['annotation', 'image'])
def test_repeated_ids(coco, kind):
    """mmdet stops at annotations, and keeps the last of the images."""
    dataset, good, write = coco
    entries = good[f'{kind}s']
    entries.append(entries[1] | dict(file_name='0.jpg'))
    path = write()
    (finding,) = annotation_file(str(path), [1])
    what = f'has several {kind}s with one id ({kind} 1)'
    assert str(finding).startswith(f'{path} {what}: ')
    if kind == 'annotation':
        with pytest.raises(DataError, match=re.escape(what)):
            load('mmdet', dataset)


# --------------------------------------------------------- nothing to load


def test_no_known_class(coco):
    dataset, _, write = coco
    path = write(categories=[dict(id=1, name='mine')])
    with pytest.raises(DataError, match='none has annotations of the classes'):
        load('mmdet', dataset)
    with pytest.raises(DataError, match=str(path)):
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
    with pytest.raises(DataError, match=f'nothing to load in {tmp_path}/data'):
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


# --------------------------------------------------------------- training


def test_training_stops(tmp_path):
    """tools/train.py, with worker processes."""
    config = forked.classifier(tmp_path)
    path = tmp_path / 'data/train/b/1.png'
    path.write_bytes(path.read_bytes()[:500])
    output = forked.run(
        *(config, '--work-dir', tmp_path, '--cfg-options'),
        'train_dataloader.num_workers=2',
        log=tmp_path / 'log',
        status=2,
    )
    assert f'\ntrain.py: {path} is damaged or no image' in output
    assert 'Traceback' not in output
