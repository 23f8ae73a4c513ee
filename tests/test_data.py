"""Faulty data: what is said of it names the file and the entry."""

import json
import re
from io import BytesIO
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from mmoverlock.data import DataError, check_data, checked
from mmoverlock.data.checks import (
    CHECKS,
    annotation_file,
    annotation_files,
    head_classes,
    sample_faults,
    some_samples,
    trained_classes,
    unseen_classes,
)
from mmoverlock.data.files import check_image, raise_first
from mmoverlock.data.runner import make_split

tiny.need_openmmlab()

from mmdet.datasets import CocoDataset  # noqa: E402


def drawing(size=(48, 40), kind='JPEG', **options):
    """The bytes of an image."""
    shape, file = (*size[::-1], 3), BytesIO()
    pixels = np.random.default_rng(0).integers(0, 100, shape, np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


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


def images(**changes):
    rest = dict(width=48, height=40) | changes
    return [dict(id=i, file_name=f'{i}.jpg') | rest for i in range(3)]


def coco(*more, names=('cat', 'fox', 'other'), **changes):
    """The contents of COCO's file with more annotations, or changes."""
    contents = dict(
        images=images(),
        annotations=[*(annotation(i + 1, i) for i in range(3)), *more],
        categories=[dict(id=i, name=name) for i, name in enumerate(names, 1)],
    )
    return {k: v for k, v in (contents | changes).items() if v is not ...}


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


JPEG, PNG = drawing(), drawing(kind='PNG')
INSIDE = drawing(exif=b'Exif\0\0' + JPEG)  # with a thumbnail


def turn(orientation):
    """EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


TURN = turn(6)  # by a quarter
IMAGE, MAP = 'images/0.jpg', 'labels/0.png'
LIST, FILE, SCORED = 'list.txt', 'file.json', 'scored.json'
SCOPES = dict(cls='mmpretrain', seg='mmseg', det='mmdet')
READ, MAPS = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')
BOXES = MAPS | dict(with_bbox=True, with_mask=True)
DATASETS = {
    'cls': dict(
        type='CustomDataset',
        data_prefix='images',
        ann_file=LIST,
        metainfo=dict(classes=['a', 'b']),
        pipeline=[READ, dict(type='PackInputs')],
    ),
    'seg': dict(
        type='ADE20KDataset',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[READ, MAPS, dict(type='PackSegInputs')],
    ),
    'det': dict(
        type=CocoDataset,  # as in configs of the new style
        data_prefix=dict(img='images'),
        ann_file=FILE,
        metainfo=dict(classes=['cat', 'fox']),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[READ, BOXES, dict(type='PackDetInputs')],
    ),
}


def write_dataset(folder, kind):
    """Write three samples; return the config of their dataset."""
    init_default_scope(SCOPES[kind])
    for i in range(3):
        put(folder / f'images/{i}.jpg', JPEG)
        put(folder / f'labels/{i}.png', labels(i))
    put(folder / LIST, b'0.jpg 0\n1.jpg 1\n2.jpg 1\n')
    for name in FILE, SCORED:
        put(folder / name, coco())
    return DATASETS[kind] | dict(data_root=str(folder))


def scorer(folder, kind='segm', **options):
    """The config of what scores a detector by SCORED."""
    file = str(folder / SCORED)
    return dict(type='CocoMetric', ann_file=file, metric=kind, **options)


def build(dataset, metric=None, workers=0):
    """Build a data loader as a runner does, and what is checked of it."""
    loader = dict(
        batch_size=2,
        dataset=dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
        num_workers=workers,
    )
    loader = checked(Runner).build_dataloader(Config(loader), seed=0)
    cfg = Config(dict(val_evaluator=metric))
    evaluator = metric and Evaluator(metric)
    return loader, make_split(cfg, 'val', loader.dataset, evaluator, None)


def load(dataset, metric=None, workers=0):
    """Check a dataset, and load all of its samples."""
    loader, split = build(dataset, metric, workers)
    raise_first([found for check in CHECKS for found in check(split)])
    return [sample for batch in loader for sample in batch['data_samples']]


def error_of(*args, **options):
    """The message that loading ends with."""
    with pytest.raises(DataError) as error:
        load(*args, **options)
    message = str(error.value)
    assert '\n' not in message and len(message) < 500
    return message


EMPTY = '/file.json: there are no images, or none has annotations of the cl'
ORDER = 'has its categories in another order than the classes .label'
NO_MASK = 'annotations without a mask, or polygons of one or two points'
MOVED = coco(images=images(id=10), annotations=[annotation(1, 10)])
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
        (IMAGE, drawing(exif=TURN), '0.png .* size .* .48 x 40 .*40 x 48'),
        (IMAGE, drawing((40, 48), exif=TURN), None),
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
        (IMAGE, drawing((24, 20), exif=TURN), '20 x 24 .* as 48 x 40'),
        (IMAGE, drawing((40, 48), exif=TURN), None),
        (FILE, b'', '/file.json is empty'),
        (FILE, b'[' * 100_000, '/file.json is cut off or no JSON'),
        (FILE, {}, "/file.json is not in .* of COCO .*KeyError: 'images'"),
        (FILE, coco(images=[]), '/file.json has no images'),
        (FILE, coco(annotation(77, bbox='wide')), "TypeError.*'id': 77"),
        (FILE, coco(annotation(1, id=...)), "KeyError: 'id' in "),
        (FILE, coco(annotation(2)), r'several .* with one id \(annotation 2'),
        (FILE, coco(names=['dog']), f'nothing to .*{EMPTY}'),
        (FILE, coco(names=['CAT']), "'cat'; is it 'CAT' there"),
        (FILE, coco(names=['fox', 'cat']), f"{ORDER} 0 is 'fo"),
        (FILE, coco(names=['cat', 'FOX']), "'fox'; is it 'FOX"),
        (FILE, coco(names=['cat', 'zebra']), None),
        (FILE, coco(names=['cat', 'fox', 'cat']), "one name .'cat': 1, 3.: "),
        (FILE, coco(names=['cat', 'fox', 'a', 'a']), None),
        (SCORED, coco(names=['fox', 'cat']), f'ann_file .*{ORDER}'),
        (SCORED, coco(annotations=...), None),  # as of COCO's test-dev
        (SCORED, coco(annotations=[]), '/scored.json has no annotations'),
        (SCORED, MOVED, 'does not list .* .image 0, .*/images/0.jpg'),
        (SCORED, coco(images=images(file_name='b/1.jpg')), '0: b/1.jpg, and '),
        (SCORED, coco(annotation(0)), 'has an annotation with the id 0'),
        (SCORED, coco(annotation('a')), "no numbers .annotation 'a'"),
        (SCORED, coco(annotation(9, iscrowd=...)), 'without iscrowd .*n 9'),
        (SCORED, coco(annotation(9, segmentation=...)), NO_MASK),
        (SCORED, coco(annotation(9, segmentation=[])), NO_MASK),
        (SCORED, coco(annotation(9, segmentation=[[1, 2, 3, 4]])), NO_MASK),
        (SCORED, coco(annotation(9, category_id=3, iscrowd=...)), None),
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
    args = dataset, scorer(tmp_path) if kind == 'det' else None
    if problem is None:
        assert len(load(*args)) == 3
        return
    message = error_of(*args)
    assert re.search(problem, message) and str(tmp_path) in message


def test_what_is_not_scored(tmp_path):
    """Masks where boxes are, or anything where results are written only."""
    dataset = write_dataset(tmp_path, 'det')
    put(tmp_path / SCORED, coco(annotation(9, segmentation=...)))
    load(dataset, scorer(tmp_path, 'bbox'))
    written = dict(format_only=True, outfile_prefix='results')
    load(dataset, scorer(tmp_path, **written))


def test_worker(tmp_path):
    """Of a wrapped dataset, too."""
    inner = write_dataset(tmp_path, 'cls')
    dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    path = put(tmp_path / IMAGE, JPEG[:500])
    assert error_of(dataset, workers=1).startswith(f'{path} is cut off')


def test_fault_of_a_pipeline(tmp_path):
    """Its error has the file, which is sound, and the step."""
    dataset = write_dataset(tmp_path, 'det')
    put(tmp_path / FILE, coco(annotation(9, segmentation=...)))
    _, split = build(dataset)
    assert not [*some_samples(split)]
    where = f'the pipeline fails for {tmp_path}/{IMAGE}, in LoadAnnotations'
    with pytest.raises(RuntimeError, match=where) as error:
        load(dataset)
    assert not isinstance(error.value, DataError)


def test_sound_images(tmp_path, monkeypatch):
    """Of more pixels, or of more bands, than Pillow takes."""
    tifffile = pytest.importorskip('tifffile')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    check_image(str(put(tmp_path / 'a.jpg', JPEG)))
    bands = np.zeros((40, 48, 5), np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', bands, planarconfig='contig')
    check_image(str(tmp_path / 'a.tif'))


def test_faulty_loader(tmp_path):
    """Not the fault of data, but of the config; or a folder that is empty."""
    dataset = write_dataset(tmp_path, 'cls')
    with pytest.raises(KeyError, match='Nothing'):
        load(dataset | dict(pipeline=[dict(type='Nothing')]))
    del dataset['ann_file'], dataset['metainfo']
    (tmp_path / 'empty').mkdir()
    where = f'{tmp_path}/empty cannot be loaded: Found 0 files'
    assert where in error_of(dataset | dict(data_prefix='empty'))


SMALL = 'annotations with a box of less than a pixel'
NO_POLYGON = (
    'annotations without a polygon of three whole points or more, where masks '
    'are learned'
)
OUTSIDE = 'annotations with a box outside the image'
LEFT_OUT = [
    (dict(bbox=[1, 1, 0.5, 20]), SMALL),
    (dict(bbox=[1, 1, 20, 0.5]), SMALL),
    (dict(bbox=[48, 0, 9, 9]), OUTSIDE),
    (dict(bbox=[0, 40, 9, 9]), OUTSIDE),
    (dict(bbox=[-9, 5, 9, 9]), OUTSIDE),
    (dict(bbox=[5, -9, 9, 9]), OUTSIDE),
    (dict(area=0), 'annotations of area 0'),
    (dict(category_id=3), 'annotations of category 3, which is no class'),
    (dict(image_id=9), 'annotations of images that are not listed'),
    (dict(segmentation=[[1, 2, 3, 4]]), NO_POLYGON),
    (dict(segmentation=[[1, 2, 21, 2, 21, 32, 1]]), NO_POLYGON),
]
RUNS = dict(size=[40, 48], counts=[50, 9, 40 * 48 - 59])  # of column 1
MISPLACED = [
    (dict(bbox=[5, 30, 9, 11.5], segmentation=...), 'boxes that reach'),
    (dict(bbox=[30, 5, 19.5, 9], segmentation=...), 'boxes that reach'),
    (dict(bbox=[-5, 1, 20, 32]), 'boxes that reach beyond their image'),
    (dict(bbox=[5, 30, 20, 10.5], segmentation=...), None),
    (dict(bbox=[25, 2, 20, 30]), 'masks that are not in their boxes'),
    (dict(bbox=[1, 2, 20, 14]), 'masks that are not in their boxes'),
    (dict(bbox=[1, 2, 20, 17]), None),
    (dict(segmentation=RUNS), None),
    (dict(segmentation=RUNS, bbox=[3, 2, 20, 30]), 'masks that are not in'),
]


def told(findings):
    return [(found.what, found.entry, found.fault) for found in findings]


def test_left_out(tmp_path):
    """All that mmdet leaves out is told, and all else is there."""
    dataset = write_dataset(tmp_path, 'det')
    kept = annotation(9, bbox=[-5, 1, 20, 99])
    asked = annotation(10, ignore=1, area=0)
    more = [
        annotation(i, **changes) for i, (changes, _) in enumerate(LEFT_OUT, 11)
    ]
    sound = images()
    narrow = sound[0] | dict(id=3, width=31, file_name='3.jpg')
    empty = sound[0] | dict(id=4, file_name='4.jpg')
    contents = coco(kept, asked, *more, annotation(99, 3))
    put(tmp_path / FILE, contents | dict(images=[*sound, narrow, empty]))
    assert [len(sample.gt_instances) for sample in load(dataset)] == [2, 1, 1]
    expected = [
        (f'has {what}', f'annotation {i}', False)
        for i, (_, what) in enumerate(LEFT_OUT, 11)
    ]
    beyond = 'has boxes that reach beyond their image', 'annotation 9', False
    expected.insert(0, beyond)
    _, tested = build(dataset | dict(test_mode=True))
    assert told(annotation_files(tested)) == expected
    few = 'has images of less than 32 pixels', 'image 3', False
    none = 'has images without annotations', 'image 4', False
    _, learned = build(dataset)
    assert told(annotation_files(learned)) == [*expected, few, none]


def found_in(folder, contents, **changes):
    """What is told of a file of annotations."""
    dataset = write_dataset(folder, 'det') | changes
    put(folder / FILE, contents)
    _, split = build(dataset)
    return told(annotation_files(split))


@pytest.mark.parametrize(('changes', 'what'), MISPLACED)
def test_misplaced(tmp_path, changes, what):
    """Boxes in images, and masks in boxes: mmdet looks at neither."""
    found = found_in(tmp_path, coco(annotation(9, **changes)))
    assert len(found) == bool(what)
    for text, entry, fault in found:
        assert text.startswith(f'has {what}') and entry == 'annotation 9'
        assert fault == ('masks' in what)


def test_masks_of_runs(tmp_path):
    """mmdet leaves them out where it wants polygons, but in crowds anyway."""
    marks = (
        annotation(8, segmentation=RUNS),
        annotation(9, segmentation=RUNS, iscrowd=1),
    )
    assert not found_in(tmp_path, coco(*marks))
    steps = [READ, BOXES | dict(poly2mask=False)]
    what = 'has annotations with a mask that is no polygon'
    found = found_in(tmp_path, coco(*marks), pipeline=steps)
    assert found == [(what, 'annotation 8', False)]


@pytest.mark.parametrize('key', ['metainfo', 'dataset'])
def test_classes_of_letters(tmp_path, key):
    """A text is a file of names, or the parentheses of a tuple of one."""
    dataset = dict(type='A', data_root=str(tmp_path))
    for classes, is_right in (
        (('ant',), True),
        (str(__file__), True),
        ('ant', False),
    ):
        names = dict(classes=classes)
        own = names if key == 'dataset' else dict(metainfo=names)
        cfg = Config(dict(train_dataloader=dict(dataset=dataset | own)))
        if is_right:
            check_data(cfg, 'train')
            continue
        with pytest.raises(DataError, match=r"a tuple of one is \('ant',\)"):
            check_data(cfg, 'train')


def test_file_of_several_images(tmp_path):
    """Objects of one are background in the other, unless they are the same."""
    more = dict(images()[0], id=3)
    listed = dict(images=[*images(), more])
    assert not found_in(tmp_path, coco(annotation(9, 3), **listed))
    marks = annotation(8, 3), annotation(9, 3, category_id=2)
    what = 'lists a file as several images, with other objects each'
    found = found_in(tmp_path, coco(*marks, **listed))
    assert found == [(what, 'images 0 and 3, 0.jpg', True)]
    unnamed = [
        {k: v for k, v in i.items() if k != 'file_name'} for i in images()
    ]
    put(tmp_path / FILE, coco(annotation(9, 2), images=unnamed))
    assert not [*annotation_file(tmp_path / FILE)]  # as in LVIS


def encoded(ending, kind, channels=1):
    pixels = np.full((40, 48, channels), 99, kind)
    return cv2.imencode(ending, pixels)[1].tobytes()


def notes_on_samples(split):
    """What check_data tells of samples; a training starts without these."""
    assert not [*some_samples(split)]
    [dataset] = split.datasets.values()
    found = (sample_faults(dataset, i, set()) for i in range(len(dataset)))
    return sum(found, [])


EXIF, BITS = 'is turned by its EXIF orient', 'has 16 bits a channel'


@pytest.mark.parametrize(
    ('kind', 'image', 'what'),
    [
        ('det', drawing(exif=turn(3)), EXIF),
        ('seg', drawing(exif=turn(2)), EXIF),
        ('cls', drawing(exif=turn(3)), None),
        ('det', drawing(exif=turn(1)), None),
        ('det', drawing((40, 48), exif=turn(6)), None),  # to 48 x 40
        ('cls', encoded('.png', 'u2'), BITS),
        ('cls', encoded('.png', 'u2', 3), BITS),
        ('cls', encoded('.tif', 'u2', 3), BITS),
        ('cls', encoded('.png', 'u1', 3), None),
    ],
)
def test_read_otherwise(tmp_path, kind, image, what):
    """It is told, but not where nothing has to be in its place."""
    dataset = write_dataset(tmp_path, kind)
    put(tmp_path / IMAGE, image)
    _, split = build(dataset)
    found = notes_on_samples(split)
    assert len(found) == bool(what)
    for finding in found:
        assert finding.what.startswith(what) and not finding.fault


def test_read_as_it_is(tmp_path):
    dataset = write_dataset(tmp_path, 'cls')
    put(tmp_path / IMAGE, encoded('.png', 'u2', 3))
    steps = [READ | dict(color_type='unchanged'), dict(type='PackInputs')]
    _, split = build(dataset | dict(pipeline=steps))
    assert not notes_on_samples(split)


@pytest.mark.parametrize('orientation', [1, 6])
def test_square_image(tmp_path, orientation):
    """Its size does not tell that it is turned."""
    dataset = write_dataset(tmp_path, 'det')
    put(tmp_path / IMAGE, drawing((48, 48), exif=turn(orientation)))
    listed = images()
    listed[0]['height'] = 48
    put(tmp_path / FILE, coco(images=listed))
    _, split = build(dataset)
    found = [finding.entry for finding in notes_on_samples(split)]
    assert found == ['orientation 6'] * (orientation == 6)


def test_order_of_folders(tmp_path):
    """They make the labels, whatever the classes; names may differ."""
    dataset = write_dataset(tmp_path, 'cls')
    for name in 'cat', 'dog':
        put(tmp_path / 'folders' / name / '0.jpg', JPEG)
    dataset |= dict(data_prefix='folders', ann_file='')
    for names in ['cat', 'dog'], ['Katze', 'Hund'], ['cat', 'puppy']:
        load(dataset | dict(metainfo=dict(classes=names)))
    words = "order than the classes .'dog' is label 0, and 1 there"
    names = dict(metainfo=dict(classes=['dog', 'cat']))
    assert re.search(words, error_of(dataset | names))


def test_order_of_trained_classes(tmp_path):
    """Of a training's validation; names may be others."""
    _, split = build(write_dataset(tmp_path, 'cls'))
    for trained, found in ((), 0), ('ab', 0), ('xy', 0), ('bc', 1), ('ba', 1):
        split.trained = [trained]
        assert len([*trained_classes(split)]) == found
    [dataset] = split.datasets.values()
    dataset.folder_to_idx = dict(x=0, y=1)
    for folders, found in ('xy', 0), ('zx', 1):
        split.trained = 'ab', folders
        assert len([*trained_classes(split)]) == found
    split.model = nn.ModuleDict(dict(language_model=nn.Identity()))
    assert not [*trained_classes(split)]


def test_order_in_tools(tmp_path):
    """Of training, checks and, of what a checkpoint was trained on, tests."""
    config, path = tiny.classifier(tmp_path), tmp_path / 'model.pth'
    tiny.save_model(Config.fromfile(config), path)
    contents = torch.load(path)
    contents['meta'] = dict(dataset_meta=dict(classes=('b', 'a')))
    torch.save(contents, path)
    words = 'has its classes in another order than the training'
    argv = config, '--work-dir', tmp_path
    output = tiny.run_tool('test', config, path, *argv[1:], status=2)
    assert f'test_dataloader.dataset {words}' in output.splitlines()[-1]
    (tmp_path / 'data/val/a').rename(tmp_path / 'data/val/c')
    output = tiny.run_tool('train', *argv, status=2)
    assert f'val_dataloader.dataset {words}' in output.splitlines()[-1]
    output = tiny.run_tool('check_data', config, status=1)
    assert f' x {words}: predictions are scored as others\n' in output


@pytest.mark.parametrize('kind', SCOPES)
def test_class_without_samples(tmp_path, kind):
    """It is told, also where a class has no more than crowds."""
    dataset = write_dataset(tmp_path, kind)
    names = [f'class {i}' for i in range(3)]
    seen = set()
    if kind == 'cls':
        put(tmp_path / LIST, b'0.jpg 0\n1.jpg 2\n2.jpg 2\n')
    elif kind == 'seg':  # of 0 to 2, less 1
        names.append('class 3')
        dataset |= dict(type='BaseSegDataset', reduce_zero_label=True)
        for i in range(3):
            put(tmp_path / f'labels/{i}.png', labels([4, 0, 3][i]))
    else:
        marks = annotation(8, category_id=2, iscrowd=1), annotation(9, 0)
        marks[1]['category_id'] = 3
        put(tmp_path / FILE, coco(*marks, names=names))
    dataset['metainfo'] = dict(classes=names)
    _, split = build(dataset)
    [built] = split.datasets.values()
    for i in range(len(built)):
        assert not sample_faults(built, i, seen)
    what = 'has nothing of a class, but maybe crowds'
    assert told(unseen_classes(split, seen)) == [(what, "'class 1'", False)]


@pytest.mark.parametrize(
    ('values', 'zero', 'sound'),
    [
        ([0, 255], False, False),
        ([0], False, True),  # nothing is lost
        ([0, 1, 255], False, True),
        ([0, 1, 255], True, False),  # 0 is ignored, and 1 is class 0
    ],
)
def test_masks_of_two_classes(tmp_path, values, zero, sound):
    """mmseg ignores 255; that is told only if no map has class 1."""
    dataset = write_dataset(tmp_path, 'seg')
    dataset |= dict(type='BaseSegDataset', reduce_zero_label=zero)
    dataset['metainfo'] = dict(classes=['background', 'crack'])
    for i in range(3):
        pixels = np.resize(values if i == 1 else values[-1:], (40, 48))
        image = Image.fromarray(pixels.astype(np.uint8))
        put(tmp_path / f'labels/{i}.png', image)
    if sound:
        load(dataset)
    else:
        where = f'{tmp_path}/labels has label maps without class 1'
        assert error_of(dataset).startswith(where)


def test_check_data(tmp_path):
    """Every dataset, inside wrappers too, every kind, the first of each."""
    cfg = Config.fromfile(tiny.detector(tmp_path))
    data = tmp_path / 'coco'
    train, val = sorted(data.glob('annotations/*.json'))
    contents = json.loads(train.read_text())
    image, mark = contents['images'][0], contents['annotations'][0]
    contents['annotations'] += [
        *[mark | dict(id=i, area=0) for i in range(10**8, 10**8 + 7)],
        # mmdet loads these without an error.
        mark | dict(id=79, bbox=[1, float('nan'), 2, 3]),
        mark | dict(id=80, segmentation=dict(size=[5, 5])),
    ]
    contents['images'].append(image)
    put(train, contents)
    damaged = put(data / 'train2017' / image['file_name'], JPEG[:500])
    contents = json.loads(val.read_text())
    contents['annotations'][0]['id'] = 0
    put(val, contents)
    inner = cfg.train_dataloader.dataset
    repeated = dict(type='RepeatDataset', times=2, dataset=inner)
    concatenated = dict(type='ConcatDataset', datasets=[repeated, inner])
    cfg.train_dataloader.dataset = concatenated
    test = cfg.test_dataloader.dataset
    test.data_prefix.img = 'elsewhere'
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[test])
    cfg.model.roi_head.mask_head.num_classes = 81
    cfg.dump(tmp_path / 'wrapped.py')
    options = '--cfg-options', 'model.roi_head.bbox_head.num_classes=79'
    argv = tmp_path / 'wrapped.py', *options
    out = tiny.run_tool('check_data', *argv, status=1)
    key = 'train_dataloader.dataset.datasets'
    for text in (
        f'{key}.0.dataset: 4 samples, 80 classes\n',
        f'{key}.1: 4 samples, 80 classes\n',
        'note, 7 x has annotations of area 0: MMDetection leaves them out\n'
        f'  {train}  annotation 100000000\n',
        f'  {train}  annotation 100000004\n  and 2 more\n',
        f'FAULT, 2 x is not in the format of COCO\n  {train}  ValueError: [1',
        f'  {train}  ValueError: a mask of [5, 5] pixels, not ',
        'x has nothing of a class, but maybe crowds: nothing is learned of it',
        'FAULT, 1 x has several images with one id: ',
        f'FAULT, 1 x is cut off: a JPEG without its end\n  {damaged}\n',
        'FAULT, 1 x has an annotation with the id 0: ',
        'FAULT, 3 x has more classes than a head: ',
        '  val_dataloader.dataset  80, and roi_head.bbox_head.num_classes ',
        'FAULT, 3 x has fewer classes than a head: ',
        f'FAULT, 1 x data missing: {data}/elsewhere does not exist (test_data'
        'loader.dataset.datasets.0)',
    ):
        assert text in out
    assert out.endswith('\n12 faults would break or mislead a training.\n')


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


def test_head_of_a_segmentor():
    """It is named before the segmentor, which repeats its number."""
    model = torch.nn.Module()
    model.decode_head = torch.nn.Module()
    model.num_classes = model.decode_head.num_classes = 2
    metainfo = dict(classes=('a', 'b', 'c'))
    datasets = dict(train=SimpleNamespace(metainfo=metainfo))
    split = SimpleNamespace(model=model, datasets=datasets)
    found = [finding.entry for finding in head_classes(split)]
    names = 'decode_head', 'model'
    assert found == [f'3, and {name}.num_classes is 2' for name in names]
