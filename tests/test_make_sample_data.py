"""tools/make_sample_data.py: real layouts, masks as drawn, no harm to data."""

import json
from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image
from pycocotools import mask as coco_masks

tiny.need_openmmlab()
from mmdet.datasets import CocoDataset  # noqa: E402
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES  # noqa: E402
from mmseg.datasets import ADE20KDataset  # noqa: E402

tool = tiny.load_tool('make_sample_data')

IMAGES, SIZE = 20, 64
COUNTS = {'train': IMAGES, 'val': 8}


def draw(dataset, out, images=IMAGES, seed=3):
    options = f'--images={images}', f'--size={SIZE}', f'--seed={seed}'
    tool.main([dataset, str(out), *options])


def tree(folder):
    """The files below a folder and their bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The folders of the datasets, by name."""
    root = tmp_path_factory.mktemp('data')
    for name in tool.DATASETS:
        draw(name, root / name)
    return {name: root / name for name in tool.DATASETS}


def kind_of(path):
    with Image.open(path) as image:
        return image.format, image.mode, image.size


def instances(folder, split):
    path = folder / 'annotations' / f'instances_{split}2017.json'
    return json.loads(path.read_text())


def test_coco(drawn):
    """Names as in COCO; masks that objects are seen in, crowds, no objects."""
    data, other = (instances(drawn['coco'], split) for split in COUNTS)
    ids = [image['id'] for image in other['images']]
    assert ids == [*range(500_001, 500_009)]
    assert data['categories'] == other['categories']
    names = {item['id']: item['name'] for item in data['categories']}
    assert tuple(names.values()) == CocoDataset.METAINFO['classes']
    some = 'person', 'stop sign', 'sports ball', 'toilet', 'toothbrush'
    assert tuple(names[i] for i in (1, 13, 37, 70, 90)) == some
    for number, image in enumerate(data['images'], 1):
        assert image['id'] == number
        assert image['file_name'] == f'{number:012d}.jpg'
        sides = image['width'], image['height']
        assert max(sides) == SIZE and min(sides) >= 0.75 * SIZE
        file = drawn['coco'] / 'train2017' / image['file_name']
        assert kind_of(file) == ('JPEG', 'RGB', sides)
    holes, crowds, objects = [], [], Counter()
    for annotation in data['annotations']:
        image = data['images'][annotation['image_id'] - 1]
        found = annotation['segmentation']
        if annotation['iscrowd']:
            crowds.append(image['id'])
        else:
            objects[image['id']] += 1
            size = image['height'], image['width']
            found = coco_masks.merge(coco_masks.frPyObjects(found, *size))
        mask = coco_masks.decode(found)
        # Only what another object covers in its middle is no outline.
        holes.append(mask.sum() - annotation['area'])
        rows, columns = np.nonzero(mask)
        size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation['bbox'] == [columns.min(), rows.min(), *size]
    assert min(holes) == 0 and np.mean(np.equal(holes, 0)) > 0.9
    assert crowds == [5, 15]
    assert {*range(1, IMAGES + 1)} - {*objects} == {20}
    assert max(objects.values()) == 4
    ids = [annotation['id'] for annotation in data['annotations']]
    assert len(set(ids)) == len(ids) and min(ids) > 0
    used = {annotation['category_id'] for annotation in data['annotations']}
    assert used == {5, 37, 52, 59, 75}


def test_ade20k(drawn):
    """Indices of the classes, and few lines between them, which are none."""
    classes = ADE20KDataset.METAINFO['classes']
    for name, index in tool.ADE_INDICES.items():
        assert classes[index - 1] == name
    seen = set()
    for path in drawn['ade20k'].rglob('*.png'):
        labels = Image.open(path)
        image = 'images', path.parent.name, f'{path.stem}.jpg'
        size = kind_of(drawn['ade20k'].joinpath(*image))[2]
        assert (labels.mode, labels.size) == ('L', size)
        labels = np.asarray(labels)
        assert 0 < (labels == 0).mean() < 0.1
        seen |= {*np.unique(labels).tolist()}
    assert seen == {0, *tool.ADE_INDICES.values()}


def test_imagenet(drawn):
    """Images are in the folders of their labels, with ImageNet's names."""
    labels = {folder: label for folder, label, _ in tool.IMAGENET_CLASSES}
    assert sorted(labels.items()) == [*labels.items()]  # as the real ones
    names = [IMAGENET_CATEGORIES[i].split(',')[0] for i in labels.values()]
    assert names[:3] == ['airliner', 'envelope', 'mountain tent']
    assert names[3:5] == ['remote control', 'tennis ball']
    assert names[5:] == ['banana', 'pizza', 'daisy']
    for split, count in COUNTS.items():
        listed = drawn['imagenet'] / 'meta' / f'{split}.txt'
        lines = listed.read_text().splitlines()
        assert len(lines) == count
        for index, line in enumerate(lines, start=1):
            name, label = line.split()
            folder, file = name.split('/')
            stem = {'train': folder, 'val': 'ILSVRC2012_val'}[split]
            assert file == f'{stem}_{index:08d}.JPEG'
            assert int(label) == labels[folder]
            assert (drawn['imagenet'] / split / name).is_file()


@pytest.mark.parametrize('dataset', tool.DATASETS)
def test_seeds(dataset, tmp_path, capsys):
    """The same seed draws the same, and an image depends on no other.

    What is drawn says so.
    """
    for name, images, seed in (('a', 4, 1), ('b', 9, 1), ('c', 4, 2)):
        draw(dataset, tmp_path / name, images, seed)
    assert 'not downloaded' in capsys.readouterr().out.splitlines()[-1]
    first, more, other = (tree(tmp_path / name) for name in 'abc')
    files = [name for name in first if name.endswith(('jpg', 'png', 'JPEG'))]
    assert len(files) == (24 if dataset == 'ade20k' else 12)
    assert all(first[name] == more[name] for name in files)
    assert all(first[name] != other[name] for name in files)
    assert len({first[name] for name in files}) == len(files)
    assert b'not downloaded' in first['DRAWN.txt']


@pytest.mark.parametrize('out', ['', 'mine'])
def test_data_of_the_user(out, tmp_path, capsys):
    """Exit status 2, the folder or file named, nothing changed."""
    (tmp_path / 'mine').write_text('mine')
    with pytest.raises(SystemExit) as stop:
        draw('coco', tmp_path / out)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path / out) in message and 'another OUT' in message
    assert tree(tmp_path) == {'mine': b'mine'}
