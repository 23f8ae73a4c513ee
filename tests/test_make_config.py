"""tools/make_config.py: configs that it writes train, test and predict."""

import importlib
import json
import re
import shlex
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from yapf.yapflib import yapf_api

from mmoverlock import cli
from mmoverlock.data import DataError

tiny.need_openmmlab()
tool = tiny.load_tool('make_config')
KINDS = {  # a task, and a layout of drawn data
    'coco': ('det', 'coco'),
    'masks': ('seg', 'ade20k'),
    'folders': ('cls', 'imagenet'),
}


def gray(pixels):
    return pixels[..., 0]


def four(pixels):
    """With a fourth channel that is far from the others."""
    return np.dstack([pixels, pixels[..., 0] // 8])


COLOR_TYPES = {None: None, gray: 'grayscale', four: 'unchanged'}


def repaint(data, change):
    """Replace the images of a folder, which are PNGs then."""
    for path in sorted(data.rglob('*.[jJ]*[gG]')):
        pixels = np.asarray(Image.open(path))
        path.unlink()
        Image.fromarray(change(pixels)).save(path.with_suffix('.png'))
    for path in data.glob('annotations/*.json'):
        path.write_text(path.read_text().replace('.jpg', '.png'))


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A folder of drawn data of every kind."""
    folder = tmp_path_factory.mktemp('drawn')
    for kind, (_, layout) in KINDS.items():
        argv = layout, folder / kind, '--images=8', '--size=64'
        tiny.run_tool('make_sample_data', *argv)
    shutil.rmtree(folder / 'folders' / 'meta')
    return folder


@pytest.fixture
def copied(drawn, tmp_path):
    """Copies the data of a kind, to be changed."""
    return lambda kind: shutil.copytree(drawn / kind, tmp_path / kind)


def write(data, *options):
    """Write a config beside the data, as a shell would; return its path."""
    config = data.with_suffix('.py')
    with config.open('w') as file, redirect_stdout(file):
        tool.main([data.name, str(data), '--arch', 'xt', *options])
    return config


def read(config):
    cli.set_up()
    return Config.fromfile(config)


def make_tiny(config):
    """Write a config of the same for a tiny model and few iterations."""
    kind, cfg = config.stem, read(config)
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
    path = config.with_name(f'tiny_{config.name}')
    cfg.dump(path)
    return path


def step(config):
    """The model after a forward pass of two images with finite losses."""
    cfg = read(make_tiny(config))
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    model = MODELS.build(cfg.model).train()
    batch = pseudo_collate([dataset[0], dataset[1]])
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    assert model.parse_losses(losses)[0].isfinite()
    return model


def measure(data):
    """Mean and deviation of the training images, a mean of images' moments."""
    moments = []
    for path in data.rglob('train*/**/*.png'):
        if 'annotations' not in path.parts:
            image = np.atleast_3d(cv2.imread(str(path), -1)).astype(float)
            moments.append([image.mean((0, 1)), (image**2).mean((0, 1))])
    mean, square = np.mean(moments, 0)
    return mean, np.sqrt(square - mean**2)


def assert_loads(config, data, change):
    """The config loads and normalizes images as they are."""
    cfg = read(config)
    wanted = [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]
    if change:
        wanted = measure(data)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.pipeline[0].get('color_type') == COLOR_TYPES[change]
        assert dataset.metainfo == cfg.metainfo
        step = dataset.pipeline[1]
        if step.type != 'Normalize':
            step = cfg.model.data_preprocessor
        np.testing.assert_allclose([step.mean, step.std], wanted, rtol=1e-3)


def test_page(tmp_path, monkeypatch):
    """The commands of docs/own_data.md, with configs that are made tiny."""
    text = (tiny.ROOT / 'docs' / 'own_data.md').read_text()
    blocks = re.findall('^```shell\n(.*?)^```', text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    predict = tiny.load_tool('predict')
    monkeypatch.setattr(predict, 'draw', lambda *args: None)
    lengths = {}
    changes = {'coco': four, 'masks': None, 'folders': gray}
    for line in ''.join(blocks).replace('\\\n', ' ').splitlines():
        python, m, package, name, *argv = shlex.split(line)
        assert (python, m, package) == ('python', '-m', 'mmoverlock')
        if name == 'make_config':
            *argv, sign, written = argv
            assert sign == '>'
            kind, data = argv[0], Path(argv[1])
            if changes[kind]:
                repaint(data, changes[kind])
            config = Path(f'{kind}.py')
            with config.open('w') as file, redirect_stdout(file):
                tool.main(argv)
            assert_loads(config, data, changes[kind])
            train = read(config).train_cfg
            lengths[written] = train.get('max_epochs') or train.max_iters
            make_tiny(config).rename(written)
            continue
        # Trainings are shorter, and so are the names of what they end with.
        for i, item in enumerate(argv):
            found = re.fullmatch(
                r'(work_dirs/.*/(?:epoch|iter)_)(\d+).pth', item
            )
            if found:
                assert int(found[2]) == lengths[argv[0]]
                [argv[i]] = Path().glob(f'{found[1]}?.pth')
        output = tiny.run_tool(name, *argv)
        if name == 'test':
            metric = {'coco': 'bbox_mAP', 'masks': 'mIoU', 'folders': 'top1'}
            assert metric[kind] in output
        elif name == 'predict':
            found = json.loads(Path(argv[-1], 'predictions.json').read_text())
            assert len(found['images']) == 8
            classes = found.get('classes')
            names = classes or [item['name'] for item in found['categories']]
            assert names == [*read(written).metainfo.classes]
    assert len(lengths) == 3


def test_classes(copied, drawn, monkeypatch):
    """A tuple of one, as many outputs, and boxes without masks; or five.

    Of label maps, here of gray images, the names in a file.
    """
    data = copied('coco')
    for path in data.glob('annotations/*.json'):
        contents = json.loads(path.read_text())
        contents['categories'] = [dict(id=1, name='shape')]
        for annotation in contents['annotations']:
            annotation.update(category_id=1, segmentation=[])
        path.write_text(json.dumps(contents))
    config = write(data)
    assert "metainfo = dict(classes=('shape',))" in config.read_text()
    cfg = read(config)
    assert cfg.model.type == 'FasterRCNN'
    assert cfg.model.roi_head.bbox_head.num_classes == 1
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == 'bbox'
    assert not step(config).with_mask

    options = '--head', 'cascade_mask_rcnn'
    heads = read(write(drawn / 'coco', *options)).model.roi_head
    assert [head.num_classes for head in heads.bbox_head] == [5, 5, 5]
    assert heads.mask_head.num_classes == 5

    data = copied('masks')
    repaint(data / 'images', gray)
    names = [f'thing {i}' for i in range(120)]  # one less than labels
    (data / 'classes.txt').write_text('\n'.join(names))
    # As yapf writes it, which is left out elsewhere.
    monkeypatch.setattr(yapf_api, 'FormatCode', None)
    importlib.reload(yapf_api)
    config = write(data)
    for line in config.read_text().splitlines():
        assert len(line) < 80 or line.startswith(('data_root', 'load_from'))
    cfg = read(config)
    assert [*cfg.metainfo.classes] == names
    assert cfg.model.decode_head.num_classes == 120
    assert cfg.model.auxiliary_head.num_classes == 120
    assert cfg.test_dataloader.dataset.reduce_zero_label
    assert cfg.tta_pipeline[0].color_type == 'grayscale'
    assert_loads(config, data, gray)
    step(config)


def number(labels, names=(), ignored=0, zero=False):
    pixels = np.zeros(256, int)
    pixels[labels] = 7
    pixels[255] = ignored
    args = Namespace(data='maps', zero_is_unlabeled=zero)
    names, zero = tool.number_classes(pixels, [*names], args)
    return ' '.join(names), zero


@pytest.mark.parametrize(
    'given, expected',
    [
        (
            dict(labels=[0, 1, 2], ignored=5),
            ('class 0 class 1 class 2', False),
        ),
        (dict(labels=[1, 2]), ('class 0 class 1', True)),  # nothing is 0
        (dict(labels=[0, 1, 2], zero=True), ('class 0 class 1', True)),
        # A name less than numbers, as in ADE20K
        (dict(labels=[0, 1, 2], names='ab'), ('a b', True)),
        (dict(labels=[0, 1], names='abc'), ('a b c', False)),
        (dict(labels=[0, 1], names='a'), ('background a', False)),
        (dict(labels=[0, 2]), ('class 0 class 1 class 2', False)),
        (dict(labels=[0], ignored=5), 'one class, and 255 is none'),
        (dict(labels=[0, 1], zero=True), 'that is one class'),
        (dict(labels=[0, 1, 4, 9], names='abc'), 'there are 3 classes'),
        (dict(labels=[0, 85, 170]), 'look like grey levels'),
    ],
)
def test_labels(given, expected):
    """The classes, and whether 0 is none."""
    if isinstance(expected, tuple):
        assert number(**given) == expected
        return
    with pytest.raises(DataError, match=expected):
        number(**given)


def fails(data, *options):
    argv = data.name, data, '--arch', 'xt', *options
    return tiny.run_tool('make_config', *argv, status=2).splitlines()[-1]


def test_faults(copied):
    """One line each, with the file."""
    data = copied('coco')
    listed = data / 'annotations/instances_train2017.json'
    other = shutil.copy(listed, data / 'train.json')
    assert f'{listed} and {other} may all be of train' in fails(data)
    other.unlink()
    image = data / 'train2017/000000000002.jpg'
    image.unlink()
    assert f'{image} does not exist (listed in {listed})' in fails(data)
    listed.unlink()
    assert 'name it after --train' in fails(data)

    data = copied('masks')
    path = data / 'annotations/training/ADE_train_00000003.png'
    Image.new('RGB', Image.open(path).size).save(path)
    assert f'{path} is a label map of several channels' in fails(data)
    odd = data / 'images/training/odd.bmp'
    Image.new('RGB', (8, 8)).save(odd)
    assert f'{odd} does not end in .jpg' in fails(data)

    data = copied('folders')
    folder = data / 'train/n11939491'
    [image] = folder.iterdir()
    image.write_bytes(b'no image')
    assert f'{image} is damaged' in fails(data)
    image.unlink()
    said = fails(data)
    assert 'train has to hold a folder of images for each' in said
    assert 'n11939491: 0 images' in said
    folder.rmdir()
    said = fails(data)
    assert re.search('folders/val has other classes than .*n11939491', said)


@pytest.mark.parametrize(
    'names, maps, expected',
    [
        ('a1.jpg a10.jpg', 'a1.png a10.png', '.jpg .png'),
        ('x/1_rgb.png', 'x/1_gt.png x/11_gt.png', 'rgb.png gt.png'),
        ('1.jpg 2.jpg', '1_mask.png 2_mask.png', '.jpg _mask.png'),
        ('img_1.jpg', 'mask_1.png', None),
    ],
)
@pytest.mark.parametrize('masks', ['masks', 'images/masks'])
def test_suffixes(tmp_path, names, maps, expected, masks):
    """What names of images and label maps that belong together end in."""
    folders = tmp_path / 'images', tmp_path / masks
    for folder, files in zip(folders, (names, maps), strict=True):
        for name in files.split():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    if expected:
        assert ' '.join(tool.find_suffixes(*folders).values()) == expected
        return
    with pytest.raises(DataError, match='img_1.jpg and .*mask_1.png: the n'):
        tool.find_suffixes(*folders)


def test_splits():
    for path, split in {
        'annotations_trainval2017/instances_val2017.json': 'val',
        'train/_annotations.coco.json': 'train',
        'images/validation': 'val',
        'leftImg8bit/train/aachen': 'train',
        'constrained/x': None,
    }.items():
        assert tool.split_of(Path(path)) == split


def test_other_images(tmp_path):
    """Gray ones among colored ones are colored; four channels are not."""
    color, plain = tmp_path / 'a.png', tmp_path / 'b.png'
    Image.new('RGB', (4, 4), (9, 5, 1)).save(color)
    Image.new('L', (4, 4), 5).save(plain)
    assert tool.read_pixels([plain, color]) is None
    Image.new('RGBA', (4, 4), (9, 5, 1, 255)).save(plain)
    assert tool.read_pixels([color, plain]) is None  # it is opaque
    Image.new('RGBA', (4, 4), (9, 5, 1, 40)).save(plain)
    with pytest.raises(DataError, match=f'{color} has 3 .* {plain} 4 '):
        tool.read_pixels([color, plain])


def test_deep_images(tmp_path):
    """Of 16 bits, and with more bands than OpenCV reads."""
    path = tmp_path / 'a.png'
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(path)
    found = tool.read_pixels([path])
    assert found.load == {'color_type': 'unchanged', 'to_float32': True}
    assert (found.channels, found.mean) == (1, [3000.0])
    tifffile = pytest.importorskip('tifffile')
    path = tmp_path / 'a.tif'
    bands = np.zeros((8, 8, 7), np.float32) + np.arange(7, dtype=np.float32)
    tifffile.imwrite(path, bands, photometric='minisblack')
    found = tool.read_pixels([path])
    assert (found.channels, found.mean) == (7, [0, 1, 2, 3, 4, 5, 6])
    loaded = LoadImageFromFile(**found.load)(dict(img_path=str(path)))
    np.testing.assert_array_equal(loaded['img'], bands)
    bands = bands.transpose(2, 0, 1)
    tifffile.imwrite(path, bands, photometric='minisblack')
    with pytest.raises(DataError, match='a.tif has its channels first'):
        tool.read_pixels([path])
