"""Faulty data: what is said of it names the file and the entry."""

import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from mmoverlock.data import DataError, checked
from mmoverlock.data.checks import CHECKS, annotation_files, some_samples
from mmoverlock.data.files import check_image
from mmoverlock.data.runner import make_split

tiny.need_openmmlab()

from mmdet.datasets import CocoDataset  # noqa: E402

SCOPES = {CocoDataset: 'mmdet'}
SCOPES |= dict.fromkeys(['ADE20KDataset', 'BaseSegDataset'], 'mmseg')


def build_loader(dataset, **options):
    """Build a data loader as a runner does."""
    init_default_scope(SCOPES.get(dataset['type'], 'mmpretrain'))
    loader = dict(
        batch_size=2,
        dataset=dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
        **options,
    )
    return checked(Runner).build_dataloader(Config(loader), seed=0)


def load(dataset, workers=0):
    """Load all samples of a dataset."""
    batches = [*build_loader(dataset, num_workers=workers)]
    return [sample for batch in batches for sample in batch['data_samples']]


def error_of(dataset, workers=0):
    """The message that loading ends with."""
    with pytest.raises(DataError) as error:
        load(dataset, workers)
    message = str(error.value)
    assert '\n' not in message and len(message) < 500
    return message


def check(dataset, metric=None, checks=(*CHECKS, some_samples), test=True):
    """The findings of what runs before a test, with one metric."""
    built = build_loader(dataset | dict(test_mode=test)).dataset
    cfg = Config(dict(val_evaluator=metric))
    evaluator = metric and Evaluator(metric)
    split = make_split(cfg, 'val', built, evaluator, None)
    return [found for check in checks for found in check(split)]


def told(findings):
    return [(found.what, found.entry, found.fault) for found in findings]


def drawing(size=(48, 40), kind='JPEG', **options):
    """The bytes of an image."""
    shape, file = (*size[::-1], 3), BytesIO()
    pixels = np.random.default_rng(0).integers(0, 100, shape, np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def turned(size):
    """An image whose EXIF data say that it is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return drawing(size, exif=exif)


def labels(value, shape=(40, 48), dtype=np.uint8):
    """A label map of ones, with one other value."""
    pixels = np.ones(shape, dtype)
    pixels[3, 4] = value
    return Image.fromarray(pixels)


def annotation(i, image=0, **changes):
    """One in COCO's format; a change to ... leaves a key out."""
    entry = dict(
        id=i,
        image_id=image,
        category_id=1,
        bbox=[1, 2, 20, 30],
        area=600,
        iscrowd=0,
        segmentation=[[1, 2, 21, 2, 21, 32]],
    )
    return {k: v for k, v in (entry | changes).items() if v is not ...}


SOUND = dict(
    images=[
        dict(id=i, file_name=f'{i}.jpg', width=48, height=40) for i in range(3)
    ],
    annotations=[annotation(i + 1, i) for i in range(3)],
    categories=[dict(id=1, name='cat'), dict(id=7, name='other')],
)


def coco(*annotations, **changes):
    """The sound contents of COCO's file with more annotations, or others."""
    more = [*SOUND['annotations'], *annotations]
    contents = SOUND | dict(annotations=more) | changes
    return {k: v for k, v in contents.items() if v is not ...}


def put(path, content):
    """Write bytes, an image or JSON; None removes a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content))
    return path


def write_dataset(folder, kind):
    """Write three samples for a task; return the config of their dataset."""
    for i in range(3):
        put(folder / f'images/{i}.jpg', drawing())
        put(folder / f'labels/{i}.png', labels(i))
    put(folder / 'list.txt', b'0.jpg 0\n1.jpg 1\n2.jpg 1\n')
    put(folder / 'file.json', SOUND)
    reader = dict(type='LoadImageFromFile')
    if kind == 'cls':
        return dict(
            type='CustomDataset',
            data_root=str(folder),
            data_prefix='images',
            ann_file='list.txt',
            metainfo=dict(classes=['a', 'b']),
            pipeline=[reader, dict(type='PackInputs')],
        )
    if kind == 'seg':
        steps = dict(type='LoadAnnotations'), dict(type='PackSegInputs')
        return dict(
            type='ADE20KDataset',
            data_root=str(folder),
            data_prefix=dict(img_path='images', seg_map_path='labels'),
            pipeline=[reader, *steps],
        )
    step = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
    return dict(
        type=CocoDataset,  # as in configs of the new style
        ann_file=str(folder / 'file.json'),
        data_prefix=dict(img=str(folder / 'images')),
        metainfo=dict(classes=['cat']),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[reader, step, dict(type='PackDetInputs')],
    )


# ------------------------------------------------------------ as it is read

JPEG, PNG = drawing(), drawing(kind='PNG')
IMAGE, MAP = 'images/0.jpg', 'labels/0.png'
LIST, FILE = 'list.txt', 'file.json'
INSIDE = drawing(exif=b'Exif\0\0' + JPEG)  # with a thumbnail
EMPTY = '/file.json: there are no images, or none has annotations of the cl'
DOG = coco(categories=[dict(id=1, name='dog')])
CAT = coco(categories=[dict(id=1, name='CAT')])
# By task: a file, what is in it, and what is said, if anything is wrong.
FAULTS = {
    'cls': [
        (IMAGE, JPEG[:500], '/images/0.jpg is cut off'),
        (IMAGE, INSIDE[:-2], '/images/0.jpg is cut off'),
        (IMAGE, INSIDE + bytes(100), None),
        (LIST, b'0.jpg 2', '/0.jpg .* no class .2; .* to 1.$'),
        (LIST, b'0.jpg', '/list.txt cannot be loaded: not'),
        (LIST, b'', 'nothing to load in .*/images and .*/list.txt'),
    ],
    'seg': [
        (IMAGE, turned((48, 40)), '/0.png .* size .* .48 x 40 .*40 x 48 of'),
        (IMAGE, turned((40, 48)), None),
        (MAP, PNG[:500], '/labels/0.png is damaged or no image'),
        (MAP, None, '/labels/0.png does not exist'),
        (MAP, labels(150).convert('P'), None),
        (MAP, labels(151), '/0.png .* no class .150; .* 0 to 149'),
        (MAP, labels(1, (20, 24)), '.24 x 20 pixels, and 48 x 40 of .*0.jpg.'),
        (MAP, labels(1, (40, 48, 3)), '/0.png .* several channels .*48, 3'),
        (MAP, labels(255, dtype=np.uint16), None),
        (MAP, labels(256, dtype=np.uint16), '/0.png has labels beyond 255'),
    ],
    'det': [
        (IMAGE, b'', '/images/0.jpg is damaged'),
        (IMAGE, turned((24, 20)), '20 x 24 pixels .* annotated as 48 x 40'),
        (IMAGE, turned((40, 48)), None),
        (FILE, b'', '/file.json is empty'),
        (FILE, b'[' * 100_000, '/file.json is cut off or no JSON'),
        (FILE, {}, "/file.json is not in .* of COCO .*KeyError: 'images'"),
        (FILE, coco(images=[]), '/file.json has no images'),
        (FILE, coco(annotation(77, bbox='wide')), "TypeError.*'id': 77"),
        (FILE, coco(annotation(1, id=...)), "KeyError: 'id' in "),
        (FILE, coco(annotation(2)), r'several .* with one id \(annotation 2'),
        (FILE, DOG, f'nothing to .*{EMPTY}'),
        (FILE, CAT, "class .'cat'; is it 'CAT' there?"),
    ],
}


@pytest.mark.parametrize(
    ('kind', 'file', 'content', 'problem'),
    [(kind, *fault) for kind, faults in FAULTS.items() for fault in faults],
)
def test_fault(tmp_path, kind, file, content, problem):
    """Images are turned; labels are their numbers less one, 255 ignored."""
    dataset = write_dataset(tmp_path, kind)
    put(tmp_path / file, content)
    if problem is None:
        assert len(load(dataset)) == 3
        return
    message = error_of(dataset)
    assert re.search(problem, message) and str(tmp_path) in message


def test_worker(tmp_path):
    """Of a wrapped dataset; what no data are at fault for keeps its trace."""
    inner = write_dataset(tmp_path, 'cls')
    del inner['metainfo']  # so that any label is one
    dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    sound = inner['pipeline']
    inner['pipeline'] = sound * 2  # what is packed has no path
    with pytest.raises(RuntimeError) as error:
        load(dataset, workers=1)
    assert not isinstance(error.value, DataError)
    path = tmp_path / IMAGE
    assert f'the pipeline fails for {path}, in Load' in str(error.value)
    inner['pipeline'] = sound
    put(path, JPEG[:500])
    assert error_of(dataset, workers=1).startswith(f'{path} is cut off')


def test_sound_images(tmp_path, monkeypatch):
    """Of more bands, or of more pixels, than Pillow takes."""
    tifffile = pytest.importorskip('tifffile')
    path, image = tmp_path / 'a.tif', put(tmp_path / 'a.jpg', JPEG)
    bands = np.zeros((40, 48, 5), np.uint8)
    tifffile.imwrite(path, bands, planarconfig='contig')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    for sound in path, image:
        check_image(str(sound))
    with pytest.raises(DataError, match='is damaged'):
        check_image(str(put(image, JPEG[:300])))


def test_faulty_loader(tmp_path):
    """Not the fault of data, but of the config; or a folder that is empty."""
    dataset = write_dataset(tmp_path, 'cls')
    with pytest.raises(KeyError, match='Nothing'):
        load(dataset | dict(pipeline=[dict(type='Nothing')]))
    del dataset['ann_file'], dataset['metainfo']
    (tmp_path / 'empty').mkdir()
    dataset['data_prefix'] = 'empty'
    where = f'{tmp_path}/empty cannot be loaded: Found 0 files'
    assert where in error_of(dataset)


# ------------------------------------------------------- annotation files

NO_MASK = 'annotations without a mask, or polygons of one or two points'
SMALL = 'annotations with a box of less than a pixel'
OUTSIDE = 'annotations with a box outside the image'
LEFT_OUT = [
    (dict(bbox=[1, 1, 0.5, 20]), SMALL),
    (dict(bbox=[1, 1, 20, 0.5]), SMALL),
    (dict(bbox=[48, 0, 9, 9]), OUTSIDE),
    (dict(bbox=[0, 40, 9, 9]), OUTSIDE),
    (dict(bbox=[-9, 5, 9, 9]), OUTSIDE),
    (dict(bbox=[5, -9, 9, 9]), OUTSIDE),
    (dict(area=0), 'annotations of area 0'),
    (dict(category_id=7), 'annotations of category 7, which is no class'),
    (dict(image_id=9), 'annotations of images that are not listed'),
    (dict(segmentation=[[1, 2, 3, 4]]), f'{NO_MASK}, where masks are learned'),
]


def test_left_out(tmp_path):
    """All that mmdet leaves out is told, and all else is there."""
    dataset = write_dataset(tmp_path, 'det')
    kept = annotation(9, bbox=[-5, 30, 20, 99])
    asked = annotation(10, ignore=1, area=0)
    more = [
        annotation(i, **changes) for i, (changes, _) in enumerate(LEFT_OUT, 11)
    ]
    small, empty = SOUND['images'][0] | dict(id=3, width=31), dict(id=4)
    images = [*SOUND['images'], small, SOUND['images'][0] | empty]
    more.append(annotation(99, 3))
    put(tmp_path / FILE, coco(kept, asked, *more, images=images))
    assert [len(sample.gt_instances) for sample in load(dataset)] == [2, 1, 1]
    annotations = [
        (f'has {what}', f'annotation {i}', False)
        for i, (_, what) in enumerate(LEFT_OUT, 11)
    ]
    assert told(check(dataset, checks=[annotation_files])) == annotations
    assert told(check(dataset, checks=[annotation_files], test=False)) == [
        *annotations,
        ('has images of less than 32 pixels', 'image 3', False),
        ('has images without annotations', 'image 4', False),
    ]


# -------------------------------------------- one thing against another


@pytest.mark.parametrize(
    ('values', 'zero', 'sound'),
    [
        ((0, 255), False, False),
        ((0,), False, True),  # nothing is lost
        ((0, 1, 255), False, True),
        ((0, 1, 255), True, False),  # 0 is ignored, and 1 is class 0
    ],
)
def test_masks_of_two_classes(tmp_path, values, zero, sound):
    """mmseg ignores 255; that is told only if no map has class 1."""
    dataset = write_dataset(tmp_path, 'seg') | dict(type='BaseSegDataset')
    dataset['reduce_zero_label'] = zero
    dataset['metainfo'] = dict(classes=['background', 'crack'])
    pixels = np.full((40, 48), values[-1], np.uint8)
    for i in (0, 2, 1):
        if i == 1:
            pixels[0, : len(values)] = values
        put(tmp_path / f'labels/{i}.png', Image.fromarray(pixels))
    found = [(finding.file, finding.what) for finding in check(dataset)]
    expected = f'{tmp_path}/labels', 'has label maps without class 1'
    assert found == [expected] * (not sound)


def scored(path, contents, kind='bbox', **settings):
    """Write a file; return the config of what scores by it."""
    path = str(put(path, contents))
    return dict(type='CocoMetric', ann_file=path, metric=kind) | settings


UNWRITTEN = dict(format_only=True, outfile_prefix='results')
UNSCORABLE = coco(
    annotations=[
        annotation(0),
        annotation('a'),
        annotation(1, iscrowd=...),
        annotation(2, segmentation=...),
        annotation(3, segmentation=[]),
        annotation(4, segmentation=[[1, 2, 3, 4]]),
        annotation(5, 1, category_id=7, iscrowd=...),  # of no class
    ]
)


def test_evaluated_annotations(tmp_path):
    """On which COCO's evaluation fails, or errs."""
    dataset = write_dataset(tmp_path, 'det')
    boxes = [
        ('has an annotation with the id 0', 'annotation 0', True),
        ('has ids that are no numbers', "annotation 'a'", True),
        ('has annotations without iscrowd', 'annotation 1', True),
    ]
    masks = [(f'has {NO_MASK}', f'annotation {i}', True) for i in (2, 3, 4)]
    for kind, expected in ('bbox', boxes), ('segm', boxes + masks):
        assert not check(dataset, scored(tmp_path / 'other.json', SOUND, kind))
        metric = scored(tmp_path / FILE, UNSCORABLE, kind)
        found = check(dataset, metric)
        assert told(found) == expected
        key = f'val_evaluator.ann_file {metric["ann_file"]}'
        assert {finding.file for finding in found} == {key}
        assert not check(dataset, metric | UNWRITTEN)


def test_evaluated_images(tmp_path):
    """COCO's test-dev has no annotations."""
    dataset = write_dataset(tmp_path, 'det')
    moved = [image | dict(id=image['id'] + 10) for image in SOUND['images']]
    moved = coco(images=moved, annotations=[annotation(1, 10)])
    renamed = [image | dict(file_name='b/1.jpg') for image in SOUND['images']]
    lacks = 'does not list images of the dataset'
    other = 'lists other images than the dataset, under their ids'
    images = [f'{tmp_path}/images/{i}.jpg' for i in range(3)]
    for contents, expected in (
        (coco(annotations=...), [('has no annotations', '', False)]),
        (coco(annotations=[]), [('has no annotations', '', True)]),
        (
            moved,
            [(lacks, f'image {i}, {images[i]}', True) for i in range(3)],
        ),
        (
            coco(images=renamed),
            [
                (other, f'image {i}: b/1.jpg, and {images[i]}', True)
                for i in (0, 2)
            ],
        ),
    ):
        metric = scored(tmp_path / 'other.json', contents)
        assert told(check(dataset, metric)) == expected
        assert not check(dataset, metric | UNWRITTEN)


LACKS = 'has no category for a class'
ORDER = 'has its categories in another order than the classes'
SHIFTED = "label 0 is 'cat' in it and 'other' in the config"
TWICE = coco(categories=[*SOUND['categories'], dict(id=9, name='cat')])
LAST = "label 2 is 'cat' in it and None in the config"


@pytest.mark.parametrize(
    ('classes', 'contents', 'expected'),
    [
        ('cat other', SOUND, None),
        ('other cat', SOUND, (ORDER, SHIFTED, True)),
        ('cat Other', SOUND, (LACKS, "'Other'; is it 'other' there?", True)),
        ('cat zebra', SOUND, (LACKS, "'zebra'", False)),
        ('cat other', TWICE, (ORDER, LAST, True)),
    ],
)
def test_class_names(tmp_path, classes, contents, expected):
    dataset = write_dataset(tmp_path, 'det')
    metric = scored(tmp_path / FILE, contents)
    dataset['metainfo'] = dict(classes=classes.split())
    found = check(dataset, metric)
    assert told(found) == [expected] * 2 if expected else not found
    files = metric['ann_file'], f'val_evaluator.ann_file {metric["ann_file"]}'
    assert all(f.file == file for f, file in zip(found, files, strict=False))


# --------------------------------------------------- tools/check_data.py

STOCK = dict(
    coco=('mask_rcnn/overlock_xt_1x', 'coco', 80),
    ade20k=('upernet/overlock_xt_160k', 'ade/ADEChallengeData2016', 150),
    imagenet=('imagenet/overlock_xt_300e', 'imagenet', 1000),
)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws data where the configs of the project look for them."""
    monkeypatch.chdir(tmp_path)

    def draw(kind):
        config, folder, _ = STOCK[kind]
        options = f'data/{folder}', '--images=4', '--size=64'
        tiny.run_tool('make_sample_data', kind, *options)
        return tiny.ROOT / f'configs/{config}.py'

    return draw


@pytest.mark.parametrize('kind', STOCK)
def test_drawn_data(drawn, kind):
    """The configs of the project and drawn data raise nothing."""
    out = tiny.run_tool('check_data', drawn(kind))
    for split, count in (('train', 4), ('val', 8), ('test', 8)):
        line = f'{split}_dataloader.dataset: {count} samples, {STOCK[kind][2]}'
        assert f'{line} classes\n' in out
    assert 'FAULT' not in out
    assert out.endswith('Nothing would break or mislead a training.\n')


def test_check_data(drawn):
    """Every dataset, inside wrappers too, every kind, the first of each."""
    cfg = Config.fromfile(drawn('coco'))
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
        # mmdet loads these without an error.
        mark | dict(id=79, bbox=[1, float('nan'), 2, 3]),
        mark | dict(id=80, segmentation=dict(size=[5, 5])),
    ]
    contents['images'].append(image)
    put(train, contents)
    damaged = put(Path('data/coco/train2017', image['file_name']), JPEG[:500])
    contents = json.loads(val.read_text())
    contents['annotations'][0]['id'] = 0
    put(val, contents)
    inner = cfg.train_dataloader.dataset
    repeated = dict(type='RepeatDataset', times=2, dataset=inner)
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[repeated, inner]
    )
    cfg.test_dataloader.dataset.data_prefix.img = 'elsewhere'
    cfg.model.roi_head.mask_head.num_classes = 81
    cfg.dump('wrapped.py')
    options = '--cfg-options', 'model.roi_head.bbox_head.num_classes=79'
    out = tiny.run_tool('check_data', 'wrapped.py', *options, status=1)
    key = 'train_dataloader.dataset.datasets'
    for text in (
        f'{key}.0.dataset: 4 samples, 80 classes\n',
        f'{key}.1: 4 samples, 80 classes\n',
        'note, 7 x has annotations of area 0: MMDetection leaves them out\n'
        f'  {train}  annotation 100000000\n',
        f'  {train}  annotation 100000004\n  and 2 more\n',
        'note, 2 x has annotations with a box of less than a pixel: MM',
        f'FAULT, 2 x is not in the format of COCO\n  {train}  ValueError: [1',
        f'  {train}  ValueError: a mask of [5, 5] pixels, not ',
        'FAULT, 1 x has several images with one id: only the last',
        f'FAULT, 1 x is cut off: a JPEG without its end\n  {damaged}\n',
        'FAULT, 1 x has an annotation with the id 0: COCO takes 0 for no '
        'match: a perfect prediction scores 0\n  val_evaluator.ann_file '
        f'{val}  annotation 0\n',
        'FAULT, 3 x has more classes than a head: ',
        '  val_dataloader.dataset  80, and roi_head.bbox_head.num_classes ',
        'FAULT, 3 x has fewer classes than a head: ',
        'FAULT, 1 x data missing: data/coco/elsewhere does not exist (test_',
    ):
        assert text in out
    assert out.endswith('\n12 faults would break or mislead a training.\n')


# --------------------------------------------------------------- training


def test_training_does_not_start(tmp_path):
    """Cheap checks come before the first iteration."""
    config = tiny.classifier(tmp_path)
    path = put(tmp_path / 'data/val/b/1.png', PNG[:500])
    for option, words in (
        ('val_evaluator.type=Accuracy', f'{path} is damaged or no image'),
        ('model.head.num_classes=1', '.dataset has more classes than a head'),
    ):
        argv = config, '--work-dir', tmp_path, '--cfg-options', option
        output = tiny.run_tool('train', *argv, status=2)
        last = output.splitlines()[-1]
        assert last.startswith('train.py: ') and words in last
        assert 'Epoch(train)' not in output and 'Traceback' not in output
