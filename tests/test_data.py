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
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from mmoverlock.data import DataError, checked
from mmoverlock.data.checks import (
    Split,
    annotation_file,
    head_classes,
    some_samples,
    trained_classes,
)
from mmoverlock.data.files import check_image

tiny.need_openmmlab()

from mmdet.datasets import CocoDataset  # noqa: E402


def drawing(size=(48, 40), kind='JPEG', turn=0, **options):
    """The bytes of an image; EXIF data may turn it."""
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    shape, file = (*size[::-1], 3), BytesIO()
    pixels = np.random.default_rng(0).integers(0, 100, shape, np.uint8)
    options = dict(exif=exif) | options
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def encoded(ending, kind, channels=1):
    pixels = np.full((40, 48, channels), 99, kind)
    return cv2.imencode(ending, pixels)[1].tobytes()


def labels(value, shape=(40, 48), dtype=np.uint8):
    """A label map of ones, with one other value."""
    pixels = np.ones(shape, dtype)
    pixels[3, 4] = value
    return Image.fromarray(pixels)


def maps(*values):
    """Three label maps: the second of all values, the others of the last."""
    one, full = (
        Image.fromarray(np.resize(numbers, (40, 48)).astype(np.uint8))
        for numbers in (values[-1:], values)
    )
    return {'labels/0.png labels/2.png': one, 'labels/1.png': full}


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
IMAGE, MAP = 'images/0.jpg', 'labels/0.png'
LIST, FILE, SCORED = 'list.txt', 'file.json', 'scored.json'
BOTH = f'{FILE} {SCORED}'
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


def write_dataset(folder, kind, contents):
    """Write three samples, of other contents; return the dataset's config."""
    init_default_scope(SCOPES[kind])
    for i in range(3):
        put(folder / f'images/{i}.jpg', JPEG)
        put(folder / f'labels/{i}.png', labels(i))
    put(folder / LIST, b'0.jpg 0\n1.jpg 1\n2.jpg 1\n')
    for name in FILE, SCORED:
        put(folder / name, coco())
    for names, content in contents.items():
        for name in names.split():
            put(folder / name, content)
    return DATASETS[kind] | dict(data_root=str(folder))


def loader(dataset, workers=0):
    sampler = dict(type='DefaultSampler', shuffle=False)
    options = dict(batch_size=2, sampler=sampler, num_workers=workers)
    return Config(dict(dataset=dataset, **options))


def build(dataset, workers=0):
    """Build a data loader as a runner does."""
    return checked(Runner).build_dataloader(loader(dataset, workers), seed=0)


def found(folder, kind, contents, split='val', metric='segm', **changes):
    """What check_data tells of a dataset, in a line each.

    A detector's is scored by SCORED.
    """
    dataset = write_dataset(folder, kind, contents) | changes
    cfg = Config({f'{split}_dataloader': loader(dataset)})
    if kind == 'det' and split == 'val':
        metric = metric if isinstance(metric, dict) else dict(metric=metric)
        file = str(folder / SCORED)
        cfg.val_evaluator = dict(type='CocoMetric', ann_file=file, **metric)
    findings = tiny.load_tool('check_data').find(cfg, split, None, False, [])
    return [f'{"" if f.fault else "note: "}{f}' for f in findings]


EMPTY = '/file.json: there are no images, or none has annotations of the cl'
ORDER = 'has its categories in another order than the classes .label'
NO_MASK = 'annotations without a mask, or polygons of one or two points'
FEWER = coco(images=images()[1:], annotations=[annotation(2, 1)])
OTHER = images(file_name='b/1.jpg')[:1] + images()[1:]
AGAIN = dict(images=[*images(), images()[0] | dict(id=3)])
TWICE = 'lists a file as several images, .* .images 0 and 3, 0.jpg'
TURNED, BITS = 'note: .* is turned by its EXIF orient', 'note: .* has 16 bits'
# By task: a file, what is in it, and what is said, if anything is wrong.
FAULTS = {
    'cls': [
        (IMAGE, JPEG[:500], '/images/0.jpg is cut off'),
        (IMAGE, INSIDE[:-2], '/images/0.jpg is cut off'),
        (IMAGE, INSIDE + bytes(100), None),
        (IMAGE, drawing(turn=3), None),  # nothing has to be in its place
        (IMAGE, encoded('.png', 'u2'), BITS),
        (IMAGE, encoded('.tif', 'u2', 3), BITS),
        (LIST, b'0.jpg 2', '/0.jpg .* no class .2; .* to 1.$'),
        (LIST, b'0.jpg', '/list.txt cannot be loaded: not'),
        (LIST, b'', 'nothing to load in .*/images and .*/list.txt'),
    ],
    'seg': [
        (IMAGE, drawing(turn=2), TURNED),
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
        (IMAGE, drawing((24, 20), turn=6), '20 x 24 .* as 48 x 40'),
        (IMAGE, drawing((40, 48), turn=6), None),
        (IMAGE, drawing(turn=3), TURNED),
        (FILE, b'', '/file.json is empty'),
        (FILE, b'[' * 100_000, '/file.json is cut off or no JSON'),
        (FILE, {}, "/file.json is not in .* of COCO .*KeyError: 'images'"),
        (FILE, coco(images=[]), '/file.json has no images'),
        (FILE, coco(annotation(77, bbox='wide')), "TypeError.*'id': 77"),
        (FILE, coco(annotation(9, bbox=[1, np.nan, 2, 3])), 'ValueError: .1'),
        (FILE, coco(annotation(9, segmentation=dict(size=[5, 5]))), 'of .5, '),
        (FILE, coco(annotation(1, id=...)), "KeyError: 'id' in "),
        (FILE, coco(annotation(2)), r'several .* with one id \(annotation 2'),
        (FILE, coco(names=['dog']), f'nothing to .*{EMPTY}'),
        (FILE, coco(names=['CAT']), "'cat'; is it 'CAT' there"),
        (FILE, coco(names=['fox', 'cat']), f"{ORDER} 0 is 'fo"),
        (FILE, coco(names=['cat', 'FOX']), "'fox'; is it 'FOX"),
        (FILE, coco(names=['cat', 'zebra']), "note: .*'fox'.: nothing"),
        (FILE, coco(names=['cat', 'fox', 'cat']), "one name .'cat': 1, 3.: "),
        (FILE, coco(names=['cat', 'fox', 'a', 'a']), None),
        (BOTH, coco(annotation(9, 3), **AGAIN), None),
        (BOTH, coco(annotation(9, 3, category_id=2), **AGAIN), TWICE),
        (SCORED, coco(names=['fox', 'cat']), f'ann_file .*{ORDER}'),
        # As of COCO's test-dev
        (SCORED, coco(annotations=...), 'note: .* has no annotations'),
        (SCORED, coco(annotations=[]), '/scored.json has no annotations'),
        (SCORED, FEWER, 'does not list .* .image 0, .*/images/0.jpg'),
        (SCORED, coco(images=OTHER), 'image 0: b/1.jpg, and '),
        (SCORED, coco(annotation(0)), 'has an annotation with the id 0'),
        (SCORED, coco(annotation('a')), "no numbers .annotation 'a'"),
        (SCORED, coco(annotation(9, iscrowd=...)), 'without iscrowd .*n 9'),
        (SCORED, coco(annotation(9, segmentation=[])), NO_MASK),
        (SCORED, coco(annotation(9, segmentation=[[1, 2, 3, 4]])), NO_MASK),
        (SCORED, coco(annotation(9, category_id=3, iscrowd=...)), None),
    ],
}


def named(*classes):
    return dict(metainfo=dict(classes=classes))


SQUARE = {MAP: labels(1, (48, 48))}
DEEP = {IMAGE: encoded('.png', 'u2', 3)}
AS_IT_IS = dict(pipeline=[READ | dict(color_type='unchanged')])
LESS = dict(type='BaseSegDataset', reduce_zero_label=True)
CRACKS = LESS | named('no crack', 'crack')
KEPT = CRACKS | dict(reduce_zero_label=False)
MASKS = '/labels has label maps without class 1'
RUNS = dict(size=[40, 48], counts=[50, 9, 40 * 48 - 59])  # of column 1
CROWD = annotation(9, segmentation=RUNS, iscrowd=1)
OF_RUNS = {BOTH: coco(CROWD, annotation(8, segmentation=RUNS))}
POLYGONS = dict(pipeline=[READ, BOXES | dict(poly2mask=False)])
NO_POLYGON = r'note: .* mask that is no polygon \(annotation 8\)'
TEXT = r"a tuple of one is \('ant',\)"
FOLDERS = dict(data_prefix='folders', ann_file='')
ANIMALS = {'folders/cat/0.jpg folders/dog/0.jpg': JPEG}
MIXED = "order than the classes .'dog' is label 0, and 1 there"
UNSCORED = {SCORED: coco(annotation(9, segmentation=...))}
WRITTEN = dict(metric=dict(format_only=True, outfile_prefix='results'))
THREE = dict(split='train') | named('class 0', 'class 1', 'class 2')
FOUR = THREE | LESS | named('class 0', 'class 1', 'class 2', 'class 3')
LAST = annotation(8, category_id=2, iscrowd=1), annotation(9, category_id=3)
NUMBERED = coco(*LAST, names=THREE['metainfo']['classes'])
UNSEEN = r"note: .* nothing of a class, .*\('class 1'\)"
# The same of several files, with other settings of the dataset.
SETTINGS = [
    # The size does not tell that it is turned
    ('seg', SQUARE | {IMAGE: drawing((48, 48), turn=6)}, {}, TURNED),
    ('seg', SQUARE | {IMAGE: drawing((48, 48), turn=1)}, {}, None),
    ('cls', DEEP, AS_IT_IS, None),
    # MMSegmentation ignores 255
    ('seg', maps(0, 255), KEPT, MASKS),
    ('seg', maps(0), KEPT, None),
    ('seg', maps(0, 1, 255), KEPT, None),
    ('seg', maps(0, 1, 255), CRACKS, MASKS),
    # MMDetection leaves them out where it wants polygons, but for crowds
    ('det', OF_RUNS, {}, None),
    ('det', OF_RUNS, POLYGONS, NO_POLYGON),
    # A text is a file of names, or the parentheses of a tuple of one
    ('cls', {}, dict(metainfo=dict(classes=__file__)), None),
    ('cls', {}, dict(metainfo=dict(classes='ant')), TEXT),
    ('cls', {}, dict(classes='ant'), TEXT),
    # Labels are numbers of folders, whatever the names of classes
    ('cls', ANIMALS, FOLDERS | named('cat', 'dog'), None),
    ('cls', ANIMALS, FOLDERS | named('Katze', 'Hund'), None),
    ('cls', ANIMALS, FOLDERS | named('cat', 'puppy'), None),
    ('cls', ANIMALS, FOLDERS | named('dog', 'cat'), MIXED),
    ('cls', {'folders/a': b''}, FOLDERS | dict(metainfo={}), ': Found 0 file'),
    ('det', UNSCORED, dict(metric='bbox'), None),
    ('det', UNSCORED, WRITTEN, None),
    # A class without samples, or with no more than crowds
    ('cls', {LIST: b'0.jpg 0\n1.jpg 2\n2.jpg 2'}, THREE, UNSEEN),
    ('seg', maps(1, 4, 0, 3), FOUR, UNSEEN),
    ('det', {FILE: NUMBERED}, THREE, UNSEEN),
]


def check(folder, words, *args, **options):
    """One finding, whose line has the words; none if there are no words."""
    lines = found(folder, *args, **options)
    if words is None:
        assert not lines
        return
    [line] = lines
    assert re.search(words, line) and len(line) < 500 and '\n' not in line
    assert line.startswith('note') == ('note' in words)


@pytest.mark.parametrize(
    ('kind', 'file', 'content', 'words'),
    [(kind, *fault) for kind, faults in FAULTS.items() for fault in faults],
)
def test_fault(tmp_path, kind, file, content, words):
    """Labels are their numbers less one, 255 ignored."""
    check(tmp_path, words, kind, {file: content})


@pytest.mark.parametrize(('kind', 'contents', 'changes', 'words'), SETTINGS)
def test_settings(tmp_path, kind, contents, changes, words):
    check(tmp_path, words, kind, contents, **changes)


def test_no_fault_of_data(tmp_path):
    """A step that is not known, and files that LVIS does not name."""
    with pytest.raises(KeyError, match='Nothing'):
        found(tmp_path, 'cls', {}, pipeline=[dict(type='Nothing')])
    listed = [dict(id=i, width=48, height=40) for i in range(3)]
    put(tmp_path / FILE, coco(annotation(9, 2), images=listed))
    assert not [*annotation_file(tmp_path / FILE)]


def test_worker(tmp_path):
    """Of a wrapped dataset, too."""
    inner = write_dataset(tmp_path, 'cls', {IMAGE: JPEG[:500]})
    dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    with pytest.raises(DataError) as error:
        list(build(dataset, workers=1))
    words = f'{tmp_path}/{IMAGE} is cut off: a JPEG without its end'
    assert str(error.value) == words


def test_fault_of_a_pipeline(tmp_path):
    """Its error has the file, which is sound, and the step."""
    contents = coco(annotation(9, segmentation=...))
    files = {FILE: contents, 'images/1.jpg': drawing(turn=3)}
    data = build(write_dataset(tmp_path, 'det', files))
    # Nor are there notes before a training starts
    assert not [*some_samples(Split(dict(a=data.dataset)))]
    where = f'the pipeline fails for {tmp_path}/{IMAGE}, in LoadAnnotations'
    with pytest.raises(RuntimeError, match=where) as error:
        list(data)
    assert not isinstance(error.value, DataError)


def test_sound_images(tmp_path, monkeypatch):
    """Of more pixels, or of more bands, than Pillow takes."""
    tifffile = pytest.importorskip('tifffile')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    check_image(str(put(tmp_path / 'a.jpg', JPEG)))
    bands = np.zeros((40, 48, 5), np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', bands, planarconfig='contig')
    check_image(str(tmp_path / 'a.tif'))


SMALL = 'annotations with a box of less than a pixel'
FEW_POINTS = (
    'annotations without a polygon of three whole points or more, where masks '
    'are learned'
)
OUTSIDE = 'annotations with a box outside the image'
BEYOND = 'boxes that reach beyond their image'
BESIDE = 'masks that are not in their boxes'
MARKS = [
    (dict(bbox=[1, 1, 0.5, 20]), SMALL),
    (dict(bbox=[1, 1, 20, 0.5]), SMALL),
    (dict(bbox=[48, 0, 9, 9]), OUTSIDE),
    (dict(bbox=[0, 40, 9, 9]), OUTSIDE),
    (dict(bbox=[-9, 5, 9, 9]), OUTSIDE),
    (dict(bbox=[5, -9, 9, 9]), OUTSIDE),
    (dict(area=0), 'annotations of area 0'),
    (dict(category_id=3), 'annotations of category 3, which is no class'),
    (dict(image_id=9), 'annotations of images that are not listed'),
    (dict(segmentation=[[1, 2, 3, 4]]), FEW_POINTS),
    (dict(segmentation=[[1, 2, 21, 2, 21, 32, 1]]), FEW_POINTS),
    (dict(bbox=[1, 2, 20, 39.5]), BEYOND),
    (dict(bbox=[1, 2, 48.5, 30]), BEYOND),
    (dict(bbox=[-5, 1, 20, 32]), BEYOND),
    (dict(bbox=[1, -5, 20, 40]), BEYOND),
    (dict(bbox=[1, 2, 48, 39]), None),
    (dict(bbox=[25, 2, 20, 30]), BESIDE),
    (dict(bbox=[1, 2, 20, 14]), BESIDE),
    (dict(bbox=[1, 2, 20, 17]), None),
    (dict(segmentation=RUNS), None),
    (dict(segmentation=RUNS, bbox=[3, 2, 20, 30]), BESIDE),
]


def test_left_out(tmp_path):
    """All that mmdet leaves out is told, and all else is there.

    It looks neither at boxes beyond images nor at masks beside boxes.
    """
    asked = annotation(9, ignore=1, area=0)
    marks = [
        annotation(i, **changes) for i, (changes, _) in enumerate(MARKS, 10)
    ]
    sound = images()
    narrow = sound[0] | dict(id=3, width=31, file_name='3.jpg')
    empty = sound[0] | dict(id=4, file_name='4.jpg')
    contents = coco(asked, *marks, annotation(99, 3))
    contents['images'] = [*sound, narrow, empty]
    files = {FILE: contents, 'images/4.jpg': JPEG}
    files['images/3.jpg'] = drawing((31, 40))
    expected = [
        f'has {what} (annotation {i})'
        for i, (_, what) in enumerate(MARKS, 10)
        if what
    ]
    few = 'has images of less than 32 pixels (image 3)'
    none = 'has images without annotations (image 4)'
    for test, more in (True, []), (False, [few, none]):
        lines = found(tmp_path, 'det', files, **WRITTEN, test_mode=test)
        told = [re.search(r'has .*?\)', line)[0] for line in lines]
        assert told == [*expected, *more]
        for line in lines:
            assert line.startswith('note') == (BESIDE not in line)
    dataset = write_dataset(tmp_path, 'det', files)
    samples = [s for batch in build(dataset) for s in batch['data_samples']]
    left = sum((what or '').startswith('annotations') for _, what in MARKS)
    kept = [1 + len(MARKS) - left, 1, 1]
    assert [len(sample.gt_instances) for sample in samples] == kept


@pytest.mark.parametrize(
    ('trained', 'folders', 'is_moved'),
    [
        ([], '', False),
        (['xy'], '', False),  # names may be others
        (['bc'], '', True),
        (['ab', 'xy'], 'xy', False),
        (['ab', 'zx'], 'xy', True),
    ],
)
def test_order_of_trained_classes(trained, folders, is_moved):
    """Of a training's validation; a model that reads names may have any."""
    numbers = {name: label for label, name in enumerate(folders)}
    metainfo = dict(classes=['a', 'b'])
    dataset = SimpleNamespace(metainfo=metainfo, folder_to_idx=numbers)
    split = Split(dict(val=dataset), trained=trained)
    assert len([*trained_classes(split)]) == is_moved
    split.model = nn.ModuleDict(dict(language_model=nn.Identity()))
    assert not [*trained_classes(split)]


def test_tools_do_not_start(tmp_path, mistake):
    """Tests neither, where the checkpoint was trained on other classes."""
    config, path = tiny.classifier(tmp_path), tmp_path / 'model.pth'
    tiny.save_model(Config.fromfile(config), path)
    contents = torch.load(path)
    contents['meta'] = dict(dataset_meta=dict(classes=('b', 'a')))
    torch.save(contents, path)
    argv = config, '--work-dir', tmp_path
    words = 'has its classes in another order than the training'
    said = mistake('test', config, path, *argv[1:])
    assert f'test_dataloader.dataset {words}' in said
    image = put(tmp_path / 'data/val/b/1.png', PNG[:500])
    said = mistake('train', *argv)
    assert f'train.py: {image} is damaged or no image' in said
    (tmp_path / 'data/val/a').rename(tmp_path / 'data/val/c')
    assert f'val_dataloader.dataset {words}' in mistake('train', *argv)
    output = tiny.run_tool('check_data', config, status=1)
    assert f' x {words}: predictions are scored as others\n' in output


def test_check_data(tmp_path):
    """Every dataset, inside wrappers too, every kind, the first of each."""
    cfg = Config.fromfile(tiny.detector(tmp_path))
    data = tmp_path / 'coco'
    train = data / 'annotations/instances_train2017.json'
    contents = json.loads(train.read_text())
    image, mark = contents['images'][0], contents['annotations'][0]
    contents['annotations'] += [
        mark | dict(id=i, area=0) for i in range(10**8, 10**8 + 7)
    ]
    put(train, contents)
    damaged = put(data / 'train2017' / image['file_name'], JPEG[:500])
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
        f'FAULT, 1 x is cut off: a JPEG without its end\n  {damaged}\n',
        'FAULT, 3 x has more classes than a head: ',
        '  val_dataloader.dataset  80, and roi_head.bbox_head.num_classes ',
        'FAULT, 3 x has fewer classes than a head: ',
        f'FAULT, 1 x data missing: {data}/elsewhere does not exist (test_data'
        'loader.dataset.datasets.0)',
    ):
        assert text in out
    assert out.endswith('\n8 faults would break or mislead a training.\n')


def test_head_of_a_segmentor():
    """It is named before the segmentor, which repeats its number."""
    model, model.decode_head = nn.Module(), nn.Module()
    model.num_classes = model.decode_head.num_classes = 2
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c')))
    split = Split(dict(train=dataset), model=model)
    entries = [finding.entry for finding in head_classes(split)]
    names = 'decode_head', 'model'
    assert entries == [f'3, and {name}.num_classes is 2' for name in names]
