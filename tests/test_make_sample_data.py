"""tools/make_sample_data.py: real layouts, masks as drawn, no harm to data."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from tiny import load_tool

tool = load_tool('make_sample_data')

IMAGES, SIZE, SEED = 20, 64, 3
OPTIONS = [f'--images={IMAGES}', f'--size={SIZE}', f'--seed={SEED}']
COUNTS = {'train': IMAGES, 'val': 8}
FIRST_ID = {'train': 1, 'val': 500_001}
ADE_FOLDERS = {'train': 'training', 'val': 'validation'}


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
        tool.main([name, str(root / name), *OPTIONS])
    return {name: root / name for name in tool.DATASETS}


def instances(folder, split):
    path = folder / 'annotations' / f'instances_{split}2017.json'
    return json.loads(path.read_text())


def decoded(annotation, height, width):
    """A segmentation's mask, as pycocotools decodes it."""
    found = annotation['segmentation']
    if not annotation['iscrowd']:
        found = coco_masks.merge(coco_masks.frPyObjects(found, height, width))
    return coco_masks.decode(found).astype(bool)


@pytest.mark.parametrize('split', COUNTS)
def test_coco(drawn, split):
    """Files and fields as in COCO; masks that objects are seen in."""
    data, first = instances(drawn['coco'], split), FIRST_ID[split]
    assert set(data) == {
        *('info', 'licenses', 'images', 'annotations', 'categories')
    }
    image_ids = [image['id'] for image in data['images']]
    assert image_ids == list(range(first, first + COUNTS[split]))
    sizes = {}
    for image in data['images']:
        size = image['width'], image['height']
        sizes[image['id']] = size[::-1]
        path = drawn['coco'] / f'{split}2017' / f'{image["id"]:012d}.jpg'
        assert path.name == image['file_name']
        with Image.open(path) as file:
            assert file.format == 'JPEG' and file.mode == 'RGB'
            assert file.size == size
        assert max(size) == SIZE and min(size) >= 0.75 * SIZE
    ids = [annotation['id'] for annotation in data['annotations']]
    assert len(set(ids)) == len(ids) and min(ids) > 0
    holes = []
    for annotation in data['annotations']:
        assert set(annotation) == {
            *('id', 'image_id', 'category_id', 'bbox', 'area'),
            *('iscrowd', 'segmentation'),
        }
        mask = decoded(annotation, *sizes[annotation['image_id']])
        # Only what another object covers in its middle is no outline.
        holes.append(mask.sum() - annotation['area'])
        rows, columns = np.nonzero(mask)
        size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation['bbox'] == [columns.min(), rows.min(), *size]
    assert min(holes) == 0 and np.mean(np.equal(holes, 0)) > 0.9


def test_coco_shows_one_to_four_objects_crowds_and_empty_images(drawn):
    data = instances(drawn['coco'], 'train')
    objects = {image['id']: 0 for image in data['images']}
    crowds = []
    for annotation in data['annotations']:
        if annotation['iscrowd']:
            crowds.append(annotation['image_id'])
        else:
            objects[annotation['image_id']] += 1
    assert crowds == [5, 15]
    assert [k for k, count in objects.items() if count == 0] == [20]
    assert max(objects.values()) == 4
    used = {item['category_id'] for item in data['annotations']}
    assert used == {5, 37, 52, 59, 75}


def test_coco_categories(drawn):
    datasets = pytest.importorskip('mmdet.datasets')
    categories = instances(drawn['coco'], 'val')['categories']
    assert categories == instances(drawn['coco'], 'train')['categories']
    names = {item['id']: item['name'] for item in categories}
    assert tuple(names.values()) == datasets.CocoDataset.METAINFO['classes']
    some = 'person', 'stop sign', 'sports ball', 'toilet', 'toothbrush'
    assert tuple(names[i] for i in (1, 13, 37, 70, 90)) == some


def test_ade20k(drawn):
    """Its files; indices of the classes; lines between them are not one."""
    datasets = pytest.importorskip('mmseg.datasets')
    classes = datasets.ADE20KDataset.METAINFO['classes']
    for name, index in tool.ADE_INDICES.items():
        assert classes[index - 1] == name
    names, seen = {'DRAWN.txt'}, set()
    for split, count in COUNTS.items():
        for i in range(1, count + 1):
            name = f'{ADE_FOLDERS[split]}/ADE_{split}_{i:08d}'
            names |= {f'images/{name}.jpg', f'annotations/{name}.png'}
            with Image.open(drawn['ade20k'] / f'images/{name}.jpg') as file:
                assert file.format == 'JPEG' and file.mode == 'RGB'
                size = file.size
            labels = Image.open(drawn['ade20k'] / f'annotations/{name}.png')
            assert labels.mode == 'L' and labels.size == size
            labels = np.asarray(labels)
            assert 0 < (labels == 0).mean() < 0.1
            seen |= {*np.unique(labels).tolist()}
    assert {*tree(drawn['ade20k'])} == names
    assert seen == {0, *tool.ADE_INDICES.values()}


def test_imagenet(drawn):
    """Images are in the folders that the lists say; classes are its own."""
    files = tree(drawn['imagenet'])
    labels = {folder: label for folder, label, _ in tool.IMAGENET_CLASSES}
    names = {'DRAWN.txt', 'meta/train.txt', 'meta/val.txt'}
    for split, count in COUNTS.items():
        lines = files[f'meta/{split}.txt'].decode().splitlines()
        assert len(lines) == count
        for index, line in enumerate(lines, start=1):
            name, label = line.split()
            folder, file = name.split('/')
            stem = {'train': folder, 'val': 'ILSVRC2012_val'}[split]
            assert file == f'{stem}_{index:08d}.JPEG'
            assert int(label) == labels[folder]
            names.add(f'{split}/{name}')
    assert set(files) == names
    pytest.importorskip('mmpretrain')
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    assert sorted(labels.items()) == [*labels.items()]  # as the real ones
    assert [
        IMAGENET_CATEGORIES[label].split(',')[0] for label in labels.values()
    ] == [
        *('airliner', 'envelope', 'mountain tent', 'remote control'),
        *('tennis ball', 'banana', 'pizza', 'daisy'),
    ]


@pytest.mark.parametrize('dataset', tool.DATASETS)
def test_seeds(dataset, tmp_path):
    """The same seed draws the same, and an image depends on no other."""
    for name, images, seed in (('a', 4, 1), ('b', 9, 1), ('c', 4, 2)):
        out = str(tmp_path / name)
        options = [f'--images={images}', '--size=64', f'--seed={seed}']
        tool.main([dataset, out, *options])
    first, more, other = (tree(tmp_path / name) for name in 'abc')
    files = [name for name in first if name.endswith(('jpg', 'png', 'JPEG'))]
    assert len(files) == (24 if dataset == 'ade20k' else 12)
    assert all(first[name] == more[name] for name in files)
    assert all(first[name] != other[name] for name in files)
    assert len({first[name] for name in files}) == len(files)


def test_says_that_it_is_drawn(tmp_path, capsys):
    """Into an empty folder too."""
    tool.main(['coco', str(tmp_path), '--images=1', '--size=64'])
    assert len(tree(tmp_path)) == 1 + 2 + 1 + 8
    assert 'not downloaded' in (tmp_path / 'DRAWN.txt').read_text()
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert str(tmp_path) in last_line and 'not downloaded' in last_line


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_data_of_the_user(kind, tmp_path, capsys):
    """Exit status 2, the folder named, nothing changed."""
    (tmp_path / 'mine').write_text('mine')
    out = tmp_path if kind == 'folder' else tmp_path / 'mine'
    with pytest.raises(SystemExit) as stop:
        tool.main(['coco', str(out)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(out) in message and 'choose another OUT' in message
    assert tree(tmp_path) == {'mine': b'mine'}
