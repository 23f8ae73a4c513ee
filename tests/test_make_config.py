"""tools/make_config.py: configs that it writes train, test and predict."""

import json
import re
import shlex
import shutil
import subprocess
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from PIL import Image
from yapf.yapflib import yapf_api

from mmoverlock import cli
from mmoverlock.data import DataError

tiny.need_openmmlab()
tool = tiny.load_tool('make_config')
# A task, a layout of drawn data, a metric, and levels of the channels, in
# OpenCV's order, that images are painted in.
KINDS = {
    'coco': ('det', 'coco', 'bbox_mAP', (200, 120, 40, 80)),
    'masks': ('seg', 'ade20k', 'mIoU', (90,)),
    'folders': ('cls', 'imagenet', 'top1', (60,)),
}
NAMES = [f'thing {i}' for i in range(120)]


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A folder of drawn data of every kind."""
    folder = tmp_path_factory.mktemp('drawn')
    for kind, (_, layout, *_) in KINDS.items():
        argv = layout, folder / kind, '--images=8', '--size=64'
        tiny.run_tool('make_sample_data', *argv)
    shutil.rmtree(folder / 'folders' / 'meta')
    return folder


@pytest.fixture
def copied(drawn, tmp_path):
    """Copies the data of a kind, to be changed."""
    return lambda kind: shutil.copytree(drawn / kind, tmp_path / kind)


def repaint(data, levels):
    """Replace images by PNGs with stripes, 10 above and below the levels."""
    for path in sorted(data.rglob('*.[jJ]*[gG]')):
        height, width, _ = cv2.imread(str(path)).shape
        pixels = np.full((height, width, len(levels)), levels, np.uint8)
        pixels[::2] += 10
        pixels[1::2] -= 10
        path.unlink()
        cv2.imwrite(str(path.with_suffix('.png')), pixels)
    for path in data.glob('annotations/*.json'):
        path.write_text(path.read_text().replace('.jpg', '.png'))


def write(config, *argv):
    """Write a config as a shell would; return it."""
    with Path(config).open('w') as file, redirect_stdout(file):
        tool.main([*map(str, argv)])
    cli.set_up()
    return Config.fromfile(config)


def make_tiny(config, kind):
    """Make the model of a config tiny, and its training short."""
    cfg = Config.fromfile(config)
    cfg.model.backbone.update(arch=tiny.ARCH, init_cfg=None)
    masks = cfg.model.type != 'FasterRCNN'
    options = {
        key: value
        for key, value in tiny.CONFIGS[KINDS[kind][0]][1].items()
        if key.startswith('model.') and (masks or 'mask' not in key)
    }
    if kind == 'masks':
        options['model.data_preprocessor.size'] = (32, 32)
        options['train_cfg'] = dict(max_iters=1, val_interval=1)
        options['default_hooks.checkpoint.interval'] = 1
        cfg.tta_pipeline = tiny.shrunk(cfg.tta_pipeline, 16)
    else:
        options['train_cfg.max_epochs'] = 1
    options['default_hooks.checkpoint.save_optimizer'] = False
    cfg.merge_from_dict(options | dict(load_from=None))
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        loader.dataset.pipeline = tiny.shrunk(loader.dataset.pipeline, 16)
        loader.dataset.indices = 2
    cfg.dump(config)


def assert_loads(cfg, levels):
    """Images of these levels load as they are, and are normalized."""
    color_type = 'grayscale' if len(levels) == 1 else 'unchanged'
    assert cfg.model.backbone.in_channels == len(levels)
    pipelines = [cfg.tta_pipeline] if 'tta_pipeline' in cfg else []
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.metainfo == cfg.metainfo
        pipelines.append(dataset.pipeline)
    for reader, step, *_ in pipelines:
        assert reader.color_type == color_type
        if step.type != 'Normalize':
            step = cfg.model.data_preprocessor
        np.testing.assert_allclose(step.mean, levels, rtol=0.01)
        np.testing.assert_allclose(step.std, [10] * len(levels), rtol=0.01)


def test_page(tmp_path, monkeypatch):
    """The commands of docs/own_data.md, with configs that are made tiny."""
    code = tiny.code_of('docs/own_data.md', 'shell')
    monkeypatch.chdir(tmp_path)
    predict = tiny.load_tool('predict')
    monkeypatch.setattr(predict, 'draw', lambda *args: None)
    lengths = {}
    for line in code.replace('\\\n', ' ').splitlines():
        python, m, package, name, *argv = shlex.split(line)
        assert (python, m, package) == ('python', '-m', 'mmoverlock')
        if name == 'check_data':
            continue  # it has run already
        if name == 'make_config':
            *argv, sign, config = argv
            assert sign == '>'
            kind, data, *_ = argv
            *_, metric, levels = KINDS[kind]
            repaint(Path(data), levels)
            if kind == 'masks':
                # Blank lines, as at the end, are no classes.
                text = '\n'.join([*NAMES, ' ', ''])
                Path(data, 'classes.txt').write_text(text, 'utf-8-sig')
            cfg = write(config, *argv)
            assert_loads(cfg, levels)
            assert kind != 'masks' or [*cfg.metainfo.classes] == NAMES
            lengths[kind] = cfg.train_cfg.get('max_epochs')
            lengths[kind] = lengths[kind] or cfg.train_cfg.max_iters
            make_tiny(config, kind)
            tiny.run_tool('check_data', config)  # nothing is faulty
            continue
        # Trainings are shorter, and so are the names of what they end with.
        for i, item in enumerate(argv):
            if found := re.fullmatch(r'(work_dirs/.*_)(\d+).pth', item):
                assert int(found[2]) == lengths[kind]
                argv[i] = f'{found[1]}1.pth'
        output = tiny.run_tool(name, *argv)
        if name == 'test':
            assert metric in output
    assert lengths.keys() == KINDS.keys()


def test_code_of_the_page(tmp_path, monkeypatch):
    """Masks of any suffix become labels; images fall to one of two sides."""
    masks = tmp_path / 'data/masks/train'
    masks.mkdir(parents=True)
    for name in 'a.JPG', 'b.png':
        Image.fromarray(np.uint8([[0, 255]]).repeat(2, 0)).save(masks / name)
    file = tmp_path / 'data/shapes/annotations/all.json'
    file.parent.mkdir(parents=True)
    numbered = [dict(id=i, image_id=i) for i in range(20)]
    file.write_text(json.dumps(dict(images=numbered, annotations=numbered)))
    monkeypatch.chdir(tmp_path)
    exec(tiny.code_of('docs/own_data.md', 'python'), {})
    labels = sorted(tmp_path.glob('data/scenes/annotations/train/*.png'))
    assert [cv2.imread(str(path), -1).max() for path in labels] == [1, 1]
    parts = [
        json.loads(file.with_name(f'{name}.json').read_text())
        for name in ('val', 'train')
    ]
    assert [len(part['images']) for part in parts] == [2, 18]
    assert all(part['annotations'] == part['images'] for part in parts)


def test_boxes_of_one_class(copied, tmp_path, monkeypatch):
    """A tuple of one, as many outputs, and no masks; lines are not long.

    Images are in folders of the folder of a split, as files name them, and
    annotations behind a link.
    """
    data = copied('coco')
    (data / 'annotations').rename(tmp_path / 'linked')
    (data / 'annotations').symlink_to(tmp_path / 'linked')
    for split in 'train2017', 'val2017':
        (data / split).rename(data / 'a')
        (data / split).mkdir()
        (data / 'a').rename(data / split / 'a')
        path = data / f'annotations/instances_{split}.json'
        contents = json.loads(path.read_text())
        contents['categories'] = [dict(id=1, name='shape')]
        for annotation in contents['annotations']:
            annotation.update(category_id=1, segmentation=[])
        for image in contents['images']:
            image['file_name'] = f'a/{image["file_name"]}'
        path.write_text(json.dumps(contents))
    config = tmp_path / 'coco.py'
    with monkeypatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', tiny.FORMAT_CODE)
        cfg = write(config, 'coco', data)
    for line in config.read_text().splitlines():
        assert len(line) < 80 or line.startswith(('data_root', 'load_from'))
    assert cfg.train_dataloader.dataset.data_prefix.img == 'train2017'
    assert cfg.metainfo.classes == ('shape',)
    assert 'in_channels' not in cfg.model.backbone
    make_tiny(config, 'coco')
    output = tiny.run_tool('train', config, '--work-dir', tmp_path)
    assert 'bbox_mAP' in output and 'segm' not in output


def test_classes_of_a_cascade(drawn, tmp_path):
    argv = 'coco', drawn / 'coco', '--head', 'cascade_mask_rcnn'
    heads = write(tmp_path / 'cascade.py', *argv).model.roi_head
    assert [head.num_classes for head in heads.bbox_head] == [5, 5, 5]
    assert heads.mask_head.num_classes == 5


FROM_0 = ['class 0', 'class 1', 'class 2']
FROM_1 = ['class 1', 'class 2', 'class 3']  # as they are in the maps


@pytest.mark.parametrize(
    ('labels', 'names', 'zero', 'expected'),
    [
        ([0, 2, 255], '', False, (FROM_0, False)),
        ([1, 2, 3], '', False, (FROM_1, True)),  # nothing is 0
        ([0, 1, 2, 3], '', True, (FROM_1, True)),
        # A name less than numbers, as in ADE20K
        ([0, 1, 2], 'ab', False, (['a', 'b'], True)),
        ([0, 1], 'abc', False, (['a', 'b', 'c'], False)),
        ([0, 1], 'a', False, (['background', 'a'], False)),
        ([0, 255], '', False, 'one class, and 255 is none'),
        ([0, 1], '', True, 'that is one class'),
        ([0, 1, 4, 9], 'abc', False, 'there are 3 classes'),
        ([0, 85, 170], '', False, 'look like gray levels'),
    ],
)
def test_labels(labels, names, zero, expected):
    """The classes, and whether 0 is none."""
    pixels = np.zeros(256, int)
    pixels[labels] = 7
    args = [*names], Namespace(data='maps', zero_is_unlabeled=zero)
    if isinstance(expected, tuple):
        assert tool.number_classes(pixels, *args) == expected
        return
    with pytest.raises(DataError, match=expected):
        tool.number_classes(pixels, *args)


LISTED = 'annotations/instances_train2017.json'
CROWDS = """sed -i 's/"iscrowd": 0/"iscrowd": 1/g'"""
RENAME = """sed -i 's/"skis"/"kite"/; s/"pizza"/"kite"/'"""
MAP = 'annotations/training/ADE_train_00000003.png'
# As where every scene has a folder for each
MIX = """mkdir -p train/{1,2}/{rgb,gt}
for i in 1 2; do
mv images/training/*$i.jpg train/$i/rgb
mv annotations/training/*$i.png train/$i/gt
done; rm -r {images,annotations}/training"""
CLASS = 'train/n11939491'


@pytest.mark.parametrize(
    ('kind', 'damage', 'words'),
    [
        ('coco', f'cp {LISTED} a/train.json', f'{LISTED} may all be of train'),
        ('coco', 'rm train2017/*2.jpg', f'2.jpg does not exist .*{LISTED}'),
        ('coco', f'rm {LISTED}', 'name it after --train'),
        ('coco', f'{CROWDS} {LISTED}', f'{LISTED} has no annotations, but'),
        ('coco', f'{RENAME} {LISTED}', f"{LISTED} .* one name .'kite': "),
        ('masks', f'cp images/training/*3.jpg {MAP}', f'{MAP} is .* several'),
        ('masks', 'touch images/training/a.bmp', 'a.bmp does not end in .jpg'),
        ('masks', MIX, 'masks/train has images of train and label maps'),
        ('folders', f'truncate -s 9 {CLASS}/*', f'{CLASS}/.*JPEG is damaged'),
        ('folders', f'rm {CLASS}/*', 'n11939491: 0 images'),
        ('folders', 'rm -r train/*', 'train has .* has no folders'),
        ('folders', f'rm -r {CLASS}', 'val has other classes .*: n11939491'),
        ('folders/train', '', 'take the folder above .*/folders/train$'),
    ],
)
def test_faults(copied, kind, damage, words):
    """One line each, with the file."""
    kind, *below = kind.split('/')
    data = copied(kind).joinpath(*below)
    (data / 'a').mkdir()
    subprocess.run(['bash', '-ec', damage], cwd=data, check=True)
    output = tiny.run_tool('make_config', kind, data, status=2)
    last = output.splitlines()[-1]
    assert re.search(words, last) and str(data) in last


def test_test_without_truth(copied, tmp_path):
    """It is left out, as those of other kinds are, unless it is named."""
    data = copied('masks')
    shutil.copytree(data / 'images' / 'validation', data / 'images' / 'test')
    cfg = write(tmp_path / 'masks.py', 'masks', data)
    assert cfg.test_dataloader == cfg.val_dataloader
    argv = 'make_config', 'masks', data, '--test', 'images/test'
    assert 'Name two folders' in tiny.run_tool(*argv, status=2)


@pytest.mark.parametrize(
    ('names', 'maps', 'expected'),
    [
        ('a1.jpg a10.jpg', 'a1.png a10.png', '.jpg .png'),
        ('x/1_rgb.png', 'x/1_gt.png x/11_gt.png', 'rgb.png gt.png'),
        ('1.jpg 2.jpg', '1_mask.png 2_mask.png', '.jpg _mask.png'),
        ('a1.jpg', 'a1.jpg a1.png', '.jpg .png'),
        ('a1.jpg', 'a1.jpg', 'a1.jpg is a label map in JPEG'),
        ('img_1.jpg', 'mask_1.png', 'img_1.jpg and .*mask_1.png: the n'),
    ],
)
def test_suffixes(tmp_path, names, maps, expected):
    """They are found where label maps are in the folder of images."""
    folders = tmp_path, tmp_path / 'masks'
    for folder, files in zip(folders, (names, maps), strict=True):
        for name in files.split():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    if len(expected.split()) == 2:
        assert ' '.join(tool.find_suffixes(*folders).values()) == expected
        return
    with pytest.raises(DataError, match=expected):
        tool.find_suffixes(*folders)


def test_folders(tmp_path):
    """Images that are left out are counted."""
    for name in 'a/1.PNG', 'a/2.gif', 'b/3.gif', 'b/4.HEIC', 'b/5.json':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'b' / '6.bin').touch()  # which ends in a letter of .json
    assert tool.find_images(tmp_path, '.json') == [tmp_path / 'b' / '5.json']
    (tmp_path / 'c').symlink_to('a')  # one that validates on its training set
    found = tool.find_images(tmp_path)
    assert found == [tmp_path / name / '1.PNG' for name in ('a', 'c')]
    (tmp_path / 'c').unlink()
    output = tiny.run_tool('make_config', 'folders', tmp_path, status=2)
    assert f'{tmp_path}: left out are 2 .gif, 1 .heic; read are ' in output


@pytest.mark.parametrize(
    ('path', 'split'),
    [
        ('annotations_trainval2017/instances_val2017.json', 'val'),
        ('leftImg8bit/train/aachen', 'train'),
        ('constrained/x', None),
    ],
)
def test_splits(path, split):
    assert tool.split_of(Path(path)) == split


def test_other_images(tmp_path):
    """Gray ones among colored ones are colored; four channels are not."""
    color, other = tmp_path / 'a.png', tmp_path / 'b.png'
    Image.new('RGB', (4, 4), (9, 5, 1)).save(color)
    # The second is opaque.
    for mode, pixel in ('L', 5), ('RGBA', (9, 5, 1, 255)):
        Image.new(mode, (4, 4), pixel).save(other)
        assert tool.read_pixels([other, color]) is None
    Image.new('RGBA', (4, 4), (9, 5, 1, 40)).save(other)
    with pytest.raises(DataError, match=f'{color} has 3 .* {other} 4 '):
        tool.read_pixels([color, other])


def test_deep_images(tmp_path):
    """Of 16 bits, of which three are loaded as BGR, and a fourth is kept."""
    path = tmp_path / 'a.png'
    for channels in 1, 3, 4:
        pixels = np.full((4, 4, 4), [100, 300, 500, 65535], np.uint16)
        pixels[0, :, :3] += 80
        cv2.imwrite(str(path), pixels[..., :channels])
        found = tool.read_pixels([path])
        assert found.load == {'color_type': 'unchanged', 'to_float32': True}
        assert found.mean == [120.0, 320.0, 520.0, 65540.0][:channels]
        _, preprocessor = tool.normalize(found, 'bgr_to_rgb')
        assert preprocessor['bgr_to_rgb'] == (channels == 3)
        if channels == 3:
            assert preprocessor['mean'] == found.mean[::-1]
    assert found.std[3] == 1  # of a band of one value
    cv2.imwrite(str(path), pixels[..., :3])
    shallow = tmp_path / 'b.png'
    cv2.imwrite(str(shallow), np.uint8(pixels[..., :3] // 3))
    assert tool.read_pixels([path, shallow]) is None  # all are read as RGB


def test_bands(tmp_path):
    """More than OpenCV reads."""
    tifffile = pytest.importorskip('tifffile')
    path = tmp_path / 'a.tif'
    bands = np.full((8, 8, 7), range(7), np.float32)
    tifffile.imwrite(path, bands, photometric='minisblack')
    found = tool.read_pixels([path])
    assert (found.channels, found.mean) == (7, [*range(7)])
    loaded = LoadImageFromFile(**found.load)(dict(img_path=str(path)))
    np.testing.assert_array_equal(loaded['img'], bands)
    bands = bands.transpose(2, 0, 1)
    tifffile.imwrite(path, bands, photometric='minisblack')
    with pytest.raises(DataError, match='a.tif has its channels first'):
        tool.read_pixels([path])
