"""tools/make_config.py: configs that it writes train, test and predict."""

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
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from tiny import ROOT, load_tool

from mmoverlock import cli
from mmoverlock.data import DataError
from mmoverlock.inference import input_channels

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

tool = load_tool('make_config')
LAYOUT = {'coco': 'coco', 'masks': 'ade20k', 'folders': 'imagenet'}
SCENE = ('--zero-is-unlabeled',)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A folder of drawn data of every kind."""
    folder = tmp_path_factory.mktemp('drawn')
    for kind, layout in LAYOUT.items():
        load_tool('make_sample_data').main(
            [layout, str(folder / kind), '--images=8', '--size=64']
        )
    shutil.rmtree(folder / 'folders' / 'meta')
    return folder


@pytest.fixture
def copied(drawn, tmp_path):
    """Copies the data of a kind, to be changed."""
    return lambda kind: shutil.copytree(drawn / kind, tmp_path / kind)


def write(folder, kind, *options):
    """Write a config in a folder beside the data, as a shell would."""
    config = folder / f'{kind}.py'
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with config.open('w') as file:
            patch.setattr('sys.stdout', file)
            tool.main([kind, str(folder / kind), '--arch', 'xt', *options])
    for line in config.read_text().splitlines():
        assert len(line) < 80 or line.startswith('data_root')
    return config


def read(config):
    cli.set_up()
    return Config.fromfile(config)


def shrink(node):
    """Divide the sizes of images in the steps of a pipeline by 16."""
    if isinstance(node, list):
        return [shrink(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: sixteenth(value)
        if key in ('scale', 'scales', 'crop_size')
        else shrink(value)
        for key, value in node.items()
    }


def sixteenth(size):
    if isinstance(size, int):
        return size // 16
    return type(size)(map(sixteenth, size))


def make_tiny(config):
    """Write a config of the same for a tiny model and few iterations."""
    cfg = read(config)
    backbone = cfg.model.backbone
    backbone.update(
        init_cfg=None,
        arch=dict(
            depths=(1, 1, 1, 1),
            channels=(8, 16, 24, 32),
            focus_depths=(1, 1),
            focus_heads=(2, 2),
        ),
    )
    options = {
        'coco': {'model.neck.in_channels': [8, 16, 32, 40]},
        'masks': {
            'model.decode_head.in_channels': [8, 16, 32, 40],
            'model.decode_head.channels': 16,
            'model.auxiliary_head.in_channels': 32,
            'model.data_preprocessor.size': (32, 32),
        },
        'folders': {'model.head.in_channels': [32, 40]},
    }[config.stem]
    if config.stem == 'coco':
        rcnn = cfg.model.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 16
        cfg.model.train_cfg.rpn.allowed_border = -1
        cfg.model.train_cfg.rpn_proposal.max_per_img = 50
        cfg.model.test_cfg.rpn.max_per_img = 20
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    if config.stem == 'masks':
        options['train_cfg'] = dict(max_iters=2, val_interval=2)
        options['default_hooks.checkpoint.interval'] = 2
        cfg.tta_pipeline = shrink(cfg.tta_pipeline)
    else:
        options['train_cfg.max_epochs'] = 1
    cfg.merge_from_dict(options | dict(load_from=None))
    cfg.train_dataloader.batch_size = 2
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.pipeline = shrink(loader.dataset.pipeline)
        if split != 'train':
            loader.dataset.indices = 2
    tiny = config.with_name(f'tiny_{config.name}')
    cfg.dump(tiny)
    return tiny


def use(config, images, capsys):
    """Train, test and predict; returns what was predicted."""
    config = make_tiny(config)
    work_dir = config.parent / 'work'
    argv = [str(config), '--work-dir', str(work_dir)]
    load_tool('train').main(argv)
    [checkpoint] = [
        path
        for path in work_dir.glob('*.pth')
        if path.name in ('epoch_1.pth', 'iter_2.pth')
    ]
    capsys.readouterr()
    load_tool('test').main([argv[0], str(checkpoint), *argv[1:]])
    metric = {'coco': 'bbox_mAP', 'masks': 'mIoU', 'folders': 'top1'}
    kind = config.stem.removeprefix('tiny_')
    assert metric[kind] in capsys.readouterr().out
    load_tool('predict').main(
        [
            *(str(config), str(checkpoint), str(images)),
            *('--out', str(config.parent / 'out'), '--score-thr', '0'),
        ]
    )
    path = config.parent / 'out' / 'predictions.json'
    return json.loads(path.read_text())


def repaint(folder, change):
    """Replace all images by others; their names may change too."""
    for path in sorted(folder.rglob('*')):
        if path.suffix in ('.jpg', '.JPEG'):
            pixels = np.asarray(Image.open(path))
            path.unlink()
            Image.fromarray(change(pixels)).save(path.with_suffix('.png'))


def gray(pixels):
    return pixels[..., 0]


def four(pixels):
    """With a fourth channel that is far from the others."""
    extra = (pixels[..., :1] // 8).astype(np.uint8)
    return np.concatenate([pixels, extra], axis=2)


@pytest.fixture
def made(copied, tmp_path):
    """Write the config of drawn data whose images are changed."""

    def make(kind, change, *options):
        data = copied(kind)
        if change:
            repaint(data, change)
            for path in data.glob('annotations/*.json'):
                path.write_text(path.read_text().replace('.jpg', '.png'))
        options += SCENE if kind == 'masks' else ()
        return write(tmp_path, kind, *options), data

    return make


def step_loss(config):
    """The sum of losses of two images of the training set."""
    cfg = read(make_tiny(config))
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    model = MODELS.build(cfg.model).train()
    batch = pseudo_collate([dataset[0], dataset[1]])
    batch = model.data_preprocessor(batch, True)
    losses = model(**batch, mode='loss')
    return model, float(model.parse_losses(losses)[0])


CHANGES = {
    None: (3, None),
    gray: (1, 'grayscale'),
    four: (4, 'unchanged'),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('kind', LAYOUT)
def test_channels(made, kind, change):
    config, data = made(kind, change)
    cfg = read(config)
    channels, color = CHANGES[change]
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.pipeline[0].get('color_type') == color
        assert dataset.metainfo == cfg.metainfo
        if change is None:
            mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
        else:
            mean, std = measure(data)
        step = dataset.pipeline[1]
        if step.type != 'Normalize':
            step = cfg.model.data_preprocessor
        np.testing.assert_allclose(step.mean, mean, rtol=1e-3)
        np.testing.assert_allclose(step.std, std, rtol=1e-3)
    model, loss = step_loss(config)
    assert np.isfinite(loss)
    assert input_channels(model) == channels


def measure(data):
    """Mean and deviation of the training images, a mean of images' moments."""
    moments = []
    for path in data.rglob('train*/**/*.png'):
        if 'annotations' not in path.parts:
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            image = np.atleast_3d(image).astype(float)
            moments.append([image.mean((0, 1)), (image**2).mean((0, 1))])
    mean, square = np.mean(moments, 0)
    return mean, np.sqrt(square - mean**2)


USED = [('coco', four), ('masks', gray), ('folders', four)]


@pytest.mark.parametrize('kind, change', USED)
def test_use(made, capsys, kind, change):
    """It trains, tests and predicts."""
    config, data = made(kind, change)
    folder = {
        'coco': 'val2017',
        'masks': 'images/validation',
        'folders': 'val',
    }[kind]
    found = use(config, data / folder, capsys)
    assert len(found['images']) == 8
    names = found.get('classes') or [c['name'] for c in found['categories']]
    assert names == [*read(config).metainfo.classes]


def test_one_class(made, capsys):
    """A tuple of one, as many outputs, and boxes without masks."""
    config, data = made('coco', None)
    for path in data.glob('annotations/*.json'):
        contents = json.loads(path.read_text())
        [contents['categories'][0]] = [dict(id=1, name='shape')]
        for annotation in contents['annotations']:
            annotation.update(category_id=1, segmentation=[])
        path.write_text(json.dumps(contents))
    config = write(config.parent, 'coco')
    assert "metainfo = dict(classes=('shape',))" in config.read_text()
    cfg = read(config)
    assert cfg.model.type == 'FasterRCNN'
    assert cfg.model.roi_head.bbox_head.num_classes == 1
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == 'bbox'
    model, loss = step_loss(config)
    assert np.isfinite(loss)
    assert not model.with_mask
    with pytest.raises(SystemExit):
        write(config.parent, 'coco', '--head', 'mask_rcnn')
    assert 'annotation ' in capsys.readouterr().err


def test_cascade(made):
    config, _ = made('coco', None, '--head', 'cascade_mask_rcnn')
    heads = read(config).model.roi_head
    assert [head.num_classes for head in heads.bbox_head] == [5, 5, 5]
    assert heads.mask_head.num_classes == 5
    _, loss = step_loss(config)
    assert np.isfinite(loss)


def number(labels, names=(), ignored=0, zero=False):
    pixels = np.zeros(256, int)
    pixels[labels] = 7
    pixels[255] = ignored
    args = Namespace(data='maps', zero_is_unlabeled=zero)
    return tool.number_classes(pixels, [*names], args)


@pytest.mark.parametrize(
    'given, expected',
    [
        (dict(labels=[0, 1, 2]), (3, False, 255)),
        (dict(labels=[0, 1, 2], ignored=5), (3, False, 255)),
        # Nothing is 0.
        (dict(labels=[1, 2, 3]), (3, True, 255)),
        (dict(labels=[0, 1, 2], zero=True), (2, True, 255)),
        # A name less than numbers, as in ADE20K.
        (dict(labels=[0, 1, 2], names='ab'), (['a', 'b'], True, 255)),
        (dict(labels=[0, 1], names='abc'), (['a', 'b', 'c'], False, 255)),
        # A number that is far from all others.
        (dict(labels=[0, 1, 2, 250]), (3, False, 250)),
        (dict(labels=[0, 1, 250], names='ab'), (['a', 'b'], False, 250)),
        (dict(labels=[0, 1], names='a'), (['background', 'a'], False, 255)),
        # Some do not occur.
        (dict(labels=[0, 3, 5]), (6, False, 255)),
    ],
)
def test_labels(given, expected):
    assert number(**given) == expected


@pytest.mark.parametrize(
    'given, words',
    [
        (dict(labels=[0], ignored=5), 'nothing is left to learn'),
        (dict(labels=[0]), 'that is one class'),
        (dict(labels=[0, 1], zero=True), 'that is one class'),
        (dict(labels=[0, 1, 4, 9], names='abc'), 'there are 3 classes'),
        (dict(labels=[0, 85, 170]), 'look like grey levels'),
        (dict(labels=[0, 1, 2, 250], zero=True), 'save 255 for 250'),
    ],
)
def test_labels_that_are_none(given, words):
    with pytest.raises(DataError, match=words):
        number(**given)


def test_ignored_label(made):
    """It is ignored by heads, crops, padding and scores."""
    config, data = made('masks', None)
    for path in data.glob('annotations/*/*.png'):
        labels = np.asarray(Image.open(path)) % 3
        labels[:4] = 250
        Image.fromarray(labels.astype(np.uint8)).save(path)
    (data / 'classes.txt').write_text('sky\nsea\nsand\n')
    config = write(config.parent, 'masks')
    cfg = read(config)
    assert cfg.metainfo.classes == ('sky', 'sea', 'sand')
    assert cfg.val_evaluator.ignore_index == 250
    assert cfg.train_dataloader.dataset.ignore_index == 250
    model, loss = step_loss(config)
    assert np.isfinite(loss)
    assert model.decode_head.ignore_index == 250
    assert model.auxiliary_head.ignore_index == 250
    assert model.data_preprocessor.seg_pad_val == 250
    crop = cfg.train_dataloader.dataset.pipeline[3]
    assert (crop.type, crop.ignore_index) == ('RandomCrop', 250)


def fails(folder, kind, capsys, *options):
    with pytest.raises(SystemExit) as stop:
        write(folder, kind, *options)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_faults(drawn, copied, tmp_path, capsys):
    """One line each, with the file."""
    for kind in LAYOUT:
        copied(kind)
    json_file = tmp_path / 'coco/annotations/instances_train2017.json'
    image = tmp_path / 'coco/train2017/000000000002.jpg'
    image.unlink()
    said = fails(tmp_path, 'coco', capsys)
    assert f'{image} does not exist (listed in {json_file})' in said
    json_file.write_text('{"images": [')
    assert f'{json_file} is cut off' in fails(tmp_path, 'coco', capsys)
    json_file.unlink()
    assert 'name it after --train' in fails(tmp_path, 'coco', capsys)

    maps = tmp_path / 'masks/annotations/training'
    path = maps / 'ADE_train_00000003.png'
    labels = np.asarray(Image.open(path))
    Image.fromarray(np.stack([labels] * 3, -1)).save(path)
    said = fails(tmp_path, 'masks', capsys)
    assert f'{path} is a label map of several channels' in said
    path.unlink()
    assert f'{path} does not exist' in fails(tmp_path, 'masks', capsys)
    odd = tmp_path / 'masks/images/training/odd.bmp'
    Image.new('RGB', (8, 8)).save(odd)
    assert f'{odd} does not end in .jpg' in fails(tmp_path, 'masks', capsys)

    shutil.rmtree(tmp_path / 'folders/val/n11939491')
    said = fails(tmp_path, 'folders', capsys)
    assert 'folders/val has other classes than' in said
    assert 'n11939491' in said
    image = next((tmp_path / 'folders/train/n11939491').iterdir())
    shutil.copytree(
        tmp_path / 'folders/train/n11939491',
        tmp_path / 'folders/val/n11939491',
    )
    image.write_bytes(b'no image')
    assert f'{image} is damaged' in fails(tmp_path, 'folders', capsys)


@pytest.mark.parametrize(
    'names, maps, expected',
    [
        (['a1.jpg', 'a10.jpg'], ['a1.png', 'a10.png'], ('.jpg', '.png')),
        (
            ['x/1_rgb.png'],
            ['x/1_gt.png', 'x/11_gt.png'],
            ('rgb.png', 'gt.png'),
        ),
        (
            ['1.jpg', '2.jpg'],
            ['1_mask.png', '2_mask.png'],
            ('.jpg', '_mask.png'),
        ),
    ],
)
def test_suffixes(tmp_path, names, maps, expected):
    for folder, files in (('images', names), ('masks', maps)):
        for name in files:
            (tmp_path / folder / name).parent.mkdir(
                parents=True, exist_ok=True
            )
            (tmp_path / folder / name).touch()
    found = tool.find_suffixes(tmp_path / 'images', tmp_path / 'masks')
    assert (found['img_suffix'], found['seg_map_suffix']) == expected


def test_suffixes_that_are_none(tmp_path):
    for name in ('images/img_1.jpg', 'masks/mask_1.png'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(DataError, match='img_1.jpg and .*mask_1.png: the n'):
        tool.find_suffixes(tmp_path / 'images', tmp_path / 'masks')


def test_splits():
    for path, split in {
        'annotations_trainval2017/instances_val2017.json': 'val',
        'train/_annotations.coco.json': 'train',
        'images/validation': 'val',
        'leftImg8bit/train/aachen': 'train',
        'constrained/x': None,
    }.items():
        assert tool.split_of(Path(path)) == split


def test_images_that_differ(tmp_path):
    """Gray ones among colored ones are colored; four channels are not."""
    color, plain = tmp_path / 'a.png', tmp_path / 'b.png'
    Image.new('RGB', (4, 4), (9, 5, 1)).save(color)
    Image.new('L', (4, 4), 5).save(plain)
    found = tool.read_pixels([color, plain])
    assert (found.channels, found.load) == (3, {})
    assert found.mean == [3.0, 5.0, 7.0]
    opaque = tmp_path / 'c.png'
    Image.new('RGBA', (4, 4), (9, 5, 1, 255)).save(opaque)
    assert tool.read_pixels([color, opaque]).channels == 3
    Image.new('RGBA', (4, 4), (9, 5, 1, 40)).save(opaque)
    with pytest.raises(DataError, match=f'{color} has 3 .* {opaque} 4 '):
        tool.read_pixels([color, opaque])


def test_deep_images(tmp_path):
    """Of 16 bits, and with more bands than OpenCV reads."""
    path = tmp_path / 'a.png'
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(path)
    found = tool.read_pixels([path])
    assert found.load == {'color_type': 'unchanged', 'to_float32': True}
    assert (found.channels, found.mean) == (1, [3000.0])
    tifffile = pytest.importorskip('tifffile')
    bands = np.zeros((8, 8, 7), np.float32) + np.arange(7, dtype=np.float32)
    tifffile.imwrite(tmp_path / 'a.tif', bands, photometric='minisblack')
    found = tool.read_pixels([tmp_path / 'a.tif'])
    assert (found.channels, found.mean) == (7, [0, 1, 2, 3, 4, 5, 6])
    loaded = LoadImageFromFile(**found.load)(
        dict(img_path=str(tmp_path / 'a.tif'))
    )
    np.testing.assert_array_equal(loaded['img'], bands)
    bands = bands.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / 'a.tif', bands, photometric='minisblack')
    with pytest.raises(DataError, match='a.tif has its channels first'):
        tool.read_pixels([tmp_path / 'a.tif'])


def test_page(tmp_path, monkeypatch):
    """The commands of docs/own_data.md, with configs that are made tiny."""
    text = (ROOT / 'docs' / 'own_data.md').read_text()
    blocks = re.findall('^```shell\n(.*?)^```', text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    lengths = {}
    for line in ''.join(blocks).replace('\\\n', ' ').splitlines():
        words = shlex.split(line)
        assert words[:3] == ['python', '-m', 'mmoverlock']
        tool, argv = load_tool(words[3]), words[4:]
        if words[3] == 'make_config':
            *argv, sign, name = argv
            assert sign == '>'
            kind = argv[0]
            config = tmp_path / f'{kind}.py'
            with config.open('w') as file, redirect_stdout(file):
                tool.main(argv)
            train = read(config).train_cfg
            lengths[name] = train.get('max_epochs') or train.max_iters
            make_tiny(config).rename(name)
            continue
        # Trainings are shorter, and so are the names of what they end with.
        for i, item in enumerate(argv):
            found = re.fullmatch(
                r'(work_dirs/.*/(?:epoch|iter)_)(\d+)\.pth', item
            )
            if found:
                assert int(found[2]) == lengths[argv[0]]
                [argv[i]] = map(str, Path().glob(f'{found[1]}?.pth'))
        tool.main(argv)
    for name in ('shapes', 'scenes', 'objects'):
        found = tmp_path / 'predicted' / name / 'predictions.json'
        assert len(json.loads(found.read_text())['images']) == 8
        # Few iterations too are logged and drawn.
        assert (tmp_path / 'work_dirs' / name / 'curves.png').exists()
