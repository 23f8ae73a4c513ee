"""tools/make_sample_data.py: real layouts, masks as drawn, no harm to data.

That the project's configs load it is in test_stock_tools.py.
"""

from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

tiny.need_openmmlab()
from mmdet.datasets import CocoDataset  # noqa: E402
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES  # noqa: E402
from mmseg.datasets import ADE20KDataset  # noqa: E402

tool = tiny.load_tool('make_sample_data')


def draw(dataset, out, images, seed=3):
    options = f'--images={images}', '--size=64', f'--seed={seed}'
    tool.main([dataset, str(out), *options])


def tree(folder):
    """The files below a folder and their bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def test_coco(tmp_path):
    """Names as in COCO; masks that objects are seen in, crowds, no objects."""
    draw('coco', tmp_path, 20)
    coco = COCO(tmp_path / 'annotations' / 'instances_train2017.json')
    names = [coco.cats[i]['name'] for i in sorted(coco.cats)]
    assert names == [*CocoDataset.METAINFO['classes']]
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert {*coco.cats} == {*range(1, 91)} - unused
    holes, crowds, objects = [], [], Counter()
    for annotation in coco.anns.values():
        if annotation['iscrowd']:
            crowds.append(annotation['image_id'])
        else:
            objects[annotation['image_id']] += 1
        mask = coco.annToMask(annotation)
        # Only what another object covers in its middle is no outline.
        holes.append(mask.sum() - annotation['area'])
        rle = coco_masks.encode(np.asfortranarray(mask))
        assert annotation['bbox'] == coco_masks.toBbox(rle).tolist()
    assert min(holes) == 0 and np.mean(np.equal(holes, 0)) > 0.9
    assert crowds == [5, 15]
    assert {*objects} == {*range(1, 20)} and max(objects.values()) == 4


def test_ade20k(tmp_path):
    """Indices of the classes, and few lines between them, which are none."""
    draw('ade20k', tmp_path, 20)
    classes = ADE20KDataset.METAINFO['classes']
    stuff = {name: value for name, (value, _) in tool.ADE_STUFF.items()}
    drawn = stuff | tool.ADE_OBJECTS
    assert all(classes[i - 1] == name for name, i in drawn.items())
    seen = set()
    for path in tmp_path.rglob('*.png'):
        labels = np.asarray(Image.open(path))
        assert labels.ndim == 2 and 0 < (labels == 0).mean() < 0.1
        seen |= {*np.unique(labels).tolist()}
    assert seen == {0, *drawn.values()}


def test_imagenet(tmp_path):
    """Images are in the folders of their labels, with ImageNet's names."""
    draw('imagenet', tmp_path, 10)
    labels = {folder: label for folder, label, _ in tool.IMAGENET_CLASSES}
    assert sorted(labels.items()) == [*labels.items()]  # as the real ones
    names = [IMAGENET_CATEGORIES[i].split(',')[0] for i in labels.values()]
    assert ', '.join(names) == (
        'airliner, envelope, mountain tent, remote control, tennis ball, '
        'banana, pizza, daisy'
    )
    for split, count in dict(train=10, val=8).items():
        listed = (tmp_path / 'meta' / f'{split}.txt').read_text().splitlines()
        assert len(listed) == count
        for name, label in map(str.split, listed):
            assert int(label) == labels[name.split('/')[0]]
            assert (tmp_path / split / name).is_file()


@pytest.mark.parametrize('dataset', tool.DATASETS)
def test_seeds(dataset, tmp_path):
    """The same seed draws the same, and an image depends on no other.

    What is drawn says so.
    """
    for name, images, seed in (('a', 4, 1), ('b', 5, 1), ('c', 4, 2)):
        draw(dataset, tmp_path / name, images, seed)
    first, more, other = (tree(tmp_path / name) for name in 'abc')
    files = [name for name in first if name.endswith(('jpg', 'png', 'JPEG'))]
    assert len(files) == (24 if dataset == 'ade20k' else 12)
    assert all(first[name] == more[name] != other[name] for name in files)
    assert len({first[name] for name in files}) == len(files)
    assert b'not downloaded' in first['DRAWN.txt']


def test_data_of_the_user(tmp_path):
    """The folder or file is named, nothing is changed."""
    (tmp_path / 'mine').write_text('mine')
    for out in tmp_path, tmp_path / 'mine':
        said = tiny.run_tool('make_sample_data', 'coco', out, status=2)
        assert str(out) in said and 'another OUT' in said
        assert tree(tmp_path) == {'mine': b'mine'}
