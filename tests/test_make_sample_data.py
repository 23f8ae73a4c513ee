"""tools/make_sample_data.py: real layouts, exact masks, no harm to data."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import load_tool

SCRIPT = Path(__file__).parents[1] / 'tools' / 'make_sample_data.py'
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


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=float)


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'coco'
    tool.main(['coco', str(out), *OPTIONS])
    return out


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'ade' / 'ADEChallengeData2016'
    tool.main(['ade20k', str(out), *OPTIONS])
    return out


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'imagenet'
    tool.main(['imagenet', str(out), *OPTIONS])
    return out


def instances(coco, split):
    path = coco / 'annotations' / f'instances_{split}2017.json'
    return json.loads(path.read_text())


def decoded(annotation, height, width):
    """A segmentation's mask, as pycocotools decodes it."""
    mask_api = pytest.importorskip('pycocotools.mask')
    rle = mask_api.frPyObjects(annotation['segmentation'], height, width)
    if not annotation['iscrowd']:
        rle = mask_api.merge(rle)
    return mask_api.decode(rle).astype(bool)


def test_coco_files(coco):
    names = {'sample_data.json'}
    for split, count in COUNTS.items():
        names.add(f'annotations/instances_{split}2017.json')
        first = FIRST_ID[split]
        for image_id in range(first, first + count):
            names.add(f'{split}2017/{image_id:012d}.jpg')
    assert set(tree(coco)) == names


@pytest.mark.parametrize('split', COUNTS)
def test_coco_fields_are_the_real_ones(coco, split):
    data = instances(coco, split)
    assert set(data) == {
        *('info', 'licenses', 'images', 'annotations', 'categories')
    }
    licenses = {item['id'] for item in data['licenses']}
    image_ids = [image['id'] for image in data['images']]
    first = FIRST_ID[split]
    assert image_ids == list(range(first, first + COUNTS[split]))
    for image in data['images']:
        assert set(image) == {
            *('id', 'file_name', 'width', 'height', 'license')
        }
        assert image['license'] in licenses
        with Image.open(coco / f'{split}2017' / image['file_name']) as file:
            assert file.format == 'JPEG' and file.mode == 'RGB'
            assert file.size == (image['width'], image['height'])
        sides = sorted([image['width'], image['height']])
        assert sides[1] == SIZE and sides[0] >= 0.75 * SIZE
    ids = [annotation['id'] for annotation in data['annotations']]
    assert len(set(ids)) == len(ids) and min(ids) > 0
    for annotation in data['annotations']:
        assert set(annotation) == {
            *('id', 'image_id', 'category_id', 'bbox', 'area'),
            *('iscrowd', 'segmentation'),
        }
        assert annotation['image_id'] in image_ids
        assert annotation['iscrowd'] in (0, 1)
        if annotation['iscrowd']:
            assert set(annotation['segmentation']) == {'size', 'counts'}
        else:
            for polygon in annotation['segmentation']:
                assert len(polygon) >= 8 and len(polygon) % 2 == 0
                assert all(type(value) is float for value in polygon)


@pytest.mark.parametrize('split', COUNTS)
def test_coco_annotations_are_exactly_the_drawn_masks(coco, split):
    data = instances(coco, split)
    names = {item['id']: item['name'] for item in data['categories']}
    for index, image in enumerate(data['images'], start=1):
        canvas, jpeg = tool.draw_coco(split, index, SIZE, SEED)
        path = coco / f'{split}2017' / image['file_name']
        assert path.read_bytes() == jpeg
        annotations = [
            annotation
            for annotation in data['annotations']
            if annotation['image_id'] == image['id']
        ]
        assert len(annotations) == len(canvas.objects)
        for annotation, drawn, mask in zip(
            annotations, canvas.objects, canvas.masks(), strict=True
        ):
            assert names[annotation['category_id']] == drawn.name
            assert annotation['iscrowd'] == drawn.crowd
            found = decoded(annotation, image['height'], image['width'])
            np.testing.assert_array_equal(found, mask)
            assert annotation['area'] == mask.sum() >= 0.75 * drawn.area
            y, x = np.nonzero(mask)
            size = [np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotation['bbox'] == [x.min(), y.min(), *size]


def test_coco_shows_one_to_four_objects_crowds_and_empty_images(coco):
    data = instances(coco, 'train')
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


def test_coco_categories(coco):
    categories = instances(coco, 'val')['categories']
    assert categories == instances(coco, 'train')['categories']
    by_id = {item['id']: item for item in categories}
    assert len(categories) == len(by_id) == 80
    assert {k: by_id[k]['name'] for k in (1, 11, 13, 37, 67, 70, 90)} == {
        1: 'person',
        11: 'fire hydrant',
        13: 'stop sign',
        37: 'sports ball',
        67: 'dining table',
        70: 'toilet',
        90: 'toothbrush',
    }
    assert by_id[37]['supercategory'] == 'sports'
    assert by_id[53] == {
        'supercategory': 'food',
        'id': 53,
        'name': 'apple',
    }


def test_coco_categories_are_those_of_mmdet(coco):
    datasets = pytest.importorskip('mmdet.datasets')
    names = [item['name'] for item in instances(coco, 'val')['categories']]
    assert tuple(names) == datasets.CocoDataset.METAINFO['classes']


def ring(hole_rows):
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[hole_rows, 3:5] = False
    return mask


MASKS = {
    'one pixel': np.eye(1, dtype=bool),
    'hole': ring(slice(3, 6)),
    'hole one pixel high': ring(slice(3, 4)),
    'two holes': ring([2, 5]),
    'hole open at a corner': np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]]) == 1,
    'parts that touch in corners': np.eye(5, dtype=bool),
    'island in a hole': ring(slice(3, 6)) | (np.indices((9, 9)) == 4).all(0),
    'whole image': np.ones((4, 6), bool),
    'comb': np.arange(7)[None] % 2 + np.zeros((5, 1)) == 0,
}


@pytest.mark.parametrize('name', MASKS)
def test_polygons_decode_exactly(name):
    check_exact(MASKS[name])


def test_polygons_of_random_masks_decode_exactly():
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = rng.integers(3, 20, 2)
        mask = rng.random(shape) < rng.uniform(0.2, 0.8)
        mask[0, 0] = True
        check_exact(mask)


def check_exact(mask):
    for crowd in (False, True):
        annotation = tool.coco_annotation(mask, crowd)
        np.testing.assert_array_equal(decoded(annotation, *mask.shape), mask)
        assert annotation['area'] == mask.sum()
    assert all(tool.signed_area(loop) > 0 for loop in tool.polygons(mask))


def test_ade20k_files(ade20k):
    names = {'sample_data.json'}
    for split, count in COUNTS.items():
        for index in range(1, count + 1):
            name = f'{ADE_FOLDERS[split]}/ADE_{split}_{index:08d}'
            names |= {f'images/{name}.jpg', f'annotations/{name}.png'}
    assert set(tree(ade20k)) == names


def test_ade20k_labels(ade20k):
    objects = {67, 68, 91, 115, 120}
    stuff = {1, 3, 4, 6, 7, 10, 17, 27, 47}
    seen = set()
    for path in (ade20k / 'annotations').rglob('*.png'):
        with Image.open(path) as file:
            assert file.mode == 'L'
            labels = np.asarray(file)
        folder = path.relative_to(ade20k / 'annotations').with_suffix('.jpg')
        with Image.open(ade20k / 'images' / folder) as file:
            assert file.format == 'JPEG' and file.mode == 'RGB'
            assert file.size == labels.shape[::-1]
        sides = sorted(labels.shape)
        assert sides[1] == SIZE and sides[0] >= 0.75 * SIZE
        values = set(np.unique(labels).tolist())
        assert len(values & stuff) >= 2 and values & objects
        assert 0 < (labels == 0).mean() < 0.1
        seen |= values
    assert seen == {0} | objects | stuff


def test_ade20k_labels_are_what_is_drawn(ade20k):
    for index in range(1, 9):
        canvas, labels, jpeg = tool.draw_ade20k('val', index, SIZE, SEED)
        name = f'validation/ADE_val_{index:08d}'
        assert (ade20k / 'images' / f'{name}.jpg').read_bytes() == jpeg
        with Image.open(ade20k / 'annotations' / f'{name}.png') as file:
            np.testing.assert_array_equal(np.asarray(file), labels)
        for drawn, mask in zip(canvas.objects, canvas.masks(), strict=True):
            assert (labels[mask] == tool.ADE_INDICES[drawn.name]).all()


def test_ade20k_indices_are_those_of_mmseg():
    datasets = pytest.importorskip('mmseg.datasets')
    classes = datasets.ADE20KDataset.METAINFO['classes']
    stuff = ['wall', 'sky', 'floor', 'ceiling', 'road', 'grass', 'mountain']
    stuff += ['sea', 'sand']
    indices = {name: getattr(tool, name.upper()).index for name in stuff}
    indices |= tool.ADE_INDICES
    for name, index in indices.items():
        assert classes[index - 1] == name


def test_imagenet_files(imagenet):
    """Images are in the folders that the lists say, one object each."""
    files = tree(imagenet)
    labels = {folder: label for folder, label, _ in tool.IMAGENET_CLASSES}
    names = {'sample_data.json', 'meta/train.txt', 'meta/val.txt'}
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
            drawn = tool.draw_imagenet(split, index, SIZE, SEED)
            assert drawn == (folder, int(label), files[f'{split}/{name}'])
            with Image.open(imagenet / split / name) as image:
                assert image.format == 'JPEG' and image.mode == 'RGB'
                assert max(image.size) == SIZE
    assert set(files) == names


def test_imagenet_classes_are_those_of_mmpretrain():
    pytest.importorskip('mmpretrain')
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    folders, labels, _ = zip(*tool.IMAGENET_CLASSES, strict=True)
    assert sorted(folders) == list(folders)  # as the real labels do
    assert sorted(labels) == list(labels)
    names = [IMAGENET_CATEGORIES[label].split(',')[0] for label in labels]
    assert names == [
        *('airliner', 'envelope', 'mountain tent', 'remote control'),
        *('tennis ball', 'banana', 'pizza', 'daisy'),
    ]


@pytest.mark.parametrize('dataset', tool.DATASETS)
def test_same_seed_same_bytes(dataset, tmp_path):
    options = ['--images=4', '--size=64']
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        out = str(tmp_path / name)
        tool.main([dataset, out, *options, f'--seed={seed}'])
    first, again, other = (tree(tmp_path / name) for name in 'abc')
    assert first == again
    assert first.keys() == other.keys()
    files = [name for name in first if not name.startswith('meta/')]
    assert all(first[name] != other[name] for name in files)


@pytest.mark.parametrize('dataset', tool.DATASETS)
def test_an_image_depends_on_no_other(dataset, tmp_path):
    for images in (2, 12):
        out = str(tmp_path / str(images))
        tool.main([dataset, out, f'--images={images}', '--size=64'])
    few, many = tree(tmp_path / '2'), tree(tmp_path / '12')
    files = [name for name in few if name.endswith(('jpg', 'png', 'JPEG'))]
    assert len(files) == {'coco': 10, 'ade20k': 20, 'imagenet': 10}[dataset]
    assert all(few[name] == many[name] for name in files)
    train = [name for name in files if 'train' in name]
    assert {few[name] for name in train}.isdisjoint(
        few[name] for name in files if name not in train
    )
    if dataset == 'coco':
        few = instances(tmp_path / '2', 'train')['annotations']
        many = instances(tmp_path / '12', 'train')['annotations']
        assert few == many[: len(few)]


def test_says_that_it_is_drawn(tmp_path, capsys):
    out = tmp_path / 'coco'
    tool.main(['coco', str(out), '--images=1', '--size=64'])
    assert json.loads((out / 'sample_data.json').read_text()) == {
        'dataset': 'coco',
        'images': 1,
        'size': 64,
        'seed': 0,
        'format_version': 1,
        'note': tool.NOTE,
        'complete': True,
    }
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert str(out) in last_line and 'not downloaded' in last_line
    with pytest.raises(SystemExit):
        tool.main(['--help'])
    assert 'Nothing is downloaded' in capsys.readouterr().out


def test_complete_dataset_is_left_at_once(coco, capsys, monkeypatch):
    before = tree(coco)
    monkeypatch.setattr(tool, 'draw_coco', None)
    tool.main(['coco', str(coco), *OPTIONS])
    assert 'Already there' in capsys.readouterr().out
    assert tree(coco) == before


@pytest.mark.parametrize('dataset', tool.DATASETS)
def test_interrupted_run_is_resumed(dataset, request, tmp_path, monkeypatch):
    complete = request.getfixturevalue(dataset)
    out = tmp_path / 'data'
    command = [dataset, str(out), *OPTIONS]
    replace = Path.replace
    written = []

    def interrupt(path, target):
        if len(written) == 12:
            raise KeyboardInterrupt
        written.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', interrupt)
        with pytest.raises(KeyboardInterrupt):
            tool.main(command)
    assert json.loads((out / tool.MARKER).read_text())['complete'] is False
    assert len(written) == 12
    (out / 'mine.txt').write_text('mine')

    tool.main(command)
    files = tree(out)
    assert files.pop('mine.txt') == b'mine'
    assert files == tree(complete)


def assert_refused(command, out, capsys):
    """Exit status 2, the folder named, no traceback, nothing changed."""
    before = tree(out)
    with pytest.raises(SystemExit) as exit_info:
        tool.main(command)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert str(out) in message and 'choose another OUT' in message
    assert 'Traceback' not in message
    assert tree(out) == before


@pytest.mark.parametrize(
    'contents',
    ['a real dataset', '[]', '{}', '{"complete": true}'],
)
def test_foreign_folder_is_refused(contents, tmp_path, capsys):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_val2017.json').write_text('real')
    if not contents.startswith('a'):
        (tmp_path / tool.MARKER).write_text(contents)
    assert_refused(['coco', str(tmp_path)], tmp_path, capsys)


@pytest.mark.parametrize(
    'command',
    [
        ['coco', *OPTIONS[:2], '--seed=4'],
        ['coco', *OPTIONS[1:], '--images=21'],
        ['ade20k', *OPTIONS],
    ],
)
def test_other_arguments_are_refused(command, coco, capsys):
    assert_refused([command[0], str(coco), *command[1:]], coco, capsys)


def test_real_data_put_into_an_unfinished_folder_is_kept(tmp_path, capsys):
    command = ['coco', str(tmp_path), '--images=1', '--size=64']
    tool.main(command)
    marker = tmp_path / tool.MARKER
    marker.write_text(marker.read_text().replace('true', 'false'))
    path = tmp_path / 'annotations' / 'instances_train2017.json'
    path.write_text('real')
    assert_refused(command, tmp_path, capsys)


def test_runs_as_a_script(tmp_path):
    command = [sys.executable, SCRIPT, 'coco', tmp_path / 'coco']
    command += ['--images=1', '--size=64']
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith('Wrote 1 train and 8 val images')
    assert len(tree(tmp_path / 'coco')) == 1 + 2 + 1 + 8
