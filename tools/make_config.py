"""Write a config for your data: ``make_config.py KIND DATA > my_config.py``.

What the folder DATA holds, by KIND:

- ``coco``: images, and annotations in COCO's format, in files that have
  ``train`` or ``val`` in their names or their folders';
- ``masks``: folders of images and folders of label maps, PNGs whose pixels
  are numbers of classes, with ``train`` or ``val`` in their paths;
- ``folders``: ``train`` and ``val``, in each a folder of images per class.

A ``test`` is used for tests where there is one. Classes, channels, mean and
deviation and suffixes are read from the data. The config builds on one of
this project and starts from the released weights of its model, if there are
any.
"""

import argparse
import math
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
from mmengine.fileio import load
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import track
from yapf.yapflib import yapf_api

from mmoverlock import cli
from mmoverlock.data import DataError, Finding
from mmoverlock.data.checks import annotation_file, repeated_names
from mmoverlock.data.files import (
    CheckedPipeline,
    find,
    raise_first,
    read_json,
)
from mmoverlock.inference import IMAGES, left_out

ROOT = Path(__file__).parents[1]
SPLITS = ('train', 'val', 'test')
LOSSY = '.jpg', '.jpeg'
SAMPLES = 200  # images, for their channels, mean and deviation

HEADS = {  # of each kind, the default first, and the configs that have them
    'coco': {
        'mask_rcnn': 'mask_rcnn/overlock_{}_3x.py',
        'faster_rcnn': 'mask_rcnn/overlock_{}_3x.py',
        'cascade_mask_rcnn': 'cascade_mask_rcnn/overlock_{}_cascade_3x.py',
        'cascade_rcnn': 'cascade_mask_rcnn/overlock_{}_cascade_3x.py',
    },
    'masks': {
        'upernet': 'upernet/overlock_{}_160k.py',
        'semantic_fpn': 'drop_in/overlock_{}_semantic_fpn.py',
        'segformer': 'drop_in/overlock_{}_segformer_head.py',
    },
    'folders': {'overlock': 'imagenet/overlock_{}_300e.py'},
}
BOXES_ONLY = ('faster_rcnn', 'cascade_rcnn')


class Data(NamedTuple):
    """Images and annotations to learn from.

    Attributes:
        images (dict[str, list[Path]]): By split.
        splits (dict[str, dict]): Arguments of the datasets, by split.
        classes (list[str]): In the order of their labels.
    """

    images: dict
    splits: dict
    classes: list


class Pixels(NamedTuple):
    """Loading and statistics of images that are not RGB."""

    channels: int
    load: dict
    mean: list
    std: list


def fault(path, *what):
    """The error of a file; see `Finding`."""
    return DataError(Finding(str(path), *what))


# ------------------------------------------------------------ files of splits


def split_of(path):
    """The split that a path is of; its last part that names one decides."""
    for part in reversed(path.parts):
        found = re.search('(?<![a-z])(train|val|dev|test)', part.lower())
        if found:
            return found[1].replace('dev', 'val')
    return None


def sort_by_split(args, paths, what, most=1):
    """Find the paths of every split; there are some to train and validate."""
    found = {}
    for split in SPLITS:
        given = getattr(args, split)
        if given:
            chosen = [args.data / name for name in given]
            for path in chosen:
                if not path.exists():
                    raise cli.UserError(f'--{split}: {path} does not exist')
        else:
            chosen = [
                path
                for path in paths
                if split_of(path.relative_to(args.data)) == split
            ]
        if len(chosen) > most:
            raise cli.UserError(
                f'{" and ".join(map(str, chosen))} may all be of {split}; '
                f'name one after --{split}'
            )
        if chosen:
            found[split] = chosen
        elif split != 'test':
            if split_of(Path(args.data.name)):
                remedy = f'take the folder above {args.data}'
            else:
                remedy = f'name it after --{split}, or make one of a part'
            raise cli.UserError(
                f'no {what} in {args.data} is of {split} by its path from '
                f'there on; {remedy}'
            )
    return found


def find_images(folder, endings=IMAGES):
    """The images, or other files, in a folder and in those below it."""
    return find(folder, endings)


def image_folders(data):
    return sorted({image.parent for image in find_images(data)})


def relative(path, data):
    return path.relative_to(data).as_posix()


# --------------------------------------------------------------------- kinds


def read_coco(args):
    files = [
        path
        for path in sorted(find_images(args.data, '.json'))
        if not path.name.startswith(('captions_', 'person_keypoints_'))
    ]
    files = sort_by_split(args, files, 'file of annotations (.json)')
    folders = image_folders(args.data)
    # Names in the file may start with folders.
    folders += [
        p for f in folders for p in f.parents if args.data in p.parents
    ]
    images, splits, names, used = {}, {}, {}, set()
    for split, [path] in files.items():
        raise_first(annotation_file(str(path)))
        contents = read_json(path)
        annotations = [
            annotation
            for annotation in contents.get('annotations') or ()
            if not annotation.get('iscrowd')  # of which nothing is learned
        ]
        if not annotations:
            if split == 'test':  # as of COCO
                continue
            raise fault(path, 'has no annotations, but maybe of crowds')
        listed = [image['file_name'] for image in contents['images']]
        near = [
            f for f in folders if split_of(f.relative_to(args.data)) == split
        ]
        near += [path.parent, args.data, *folders]
        folder = next((f for f in near if (f / listed[0]).is_file()), near[0])
        images[split] = [folder / name for name in listed]
        for image in images[split]:
            if not image.is_file():
                raise fault(image, 'does not exist', f'listed in {path}')
        categories = {c['id']: c['name'] for c in contents['categories']}
        names |= dict.fromkeys(categories.values())
        used |= {categories.get(a['category_id']) for a in annotations}
        raise_first(repeated_names(str(path), contents['categories'], used))
        if not all(a.get('segmentation') for a in annotations):
            args.head = args.head or BOXES_ONLY[0]
        splits[split] = {
            'ann_file': relative(path, args.data),
            'data_prefix': {'img': relative(folder, args.data)},
        }
    # Categories without an object, such as roots of a hierarchy, are left out.
    classes = [name for name in names if name in used]
    return Data(images, splits, classes)


def read_masks(args):
    init_default_scope('mmseg')
    folders = sort_by_split(
        args, image_folders(args.data), 'folder of images', most=math.inf
    )
    images, splits, pixels = {}, {}, 0
    for split, paths in folders.items():
        if getattr(args, split):
            groups = paths[:1], paths[1:]
        else:
            groups = [], []
            for path in paths:
                name = relative(path, args.data).lower()
                masks = re.search('mask|label|annot|seg|gt', name)
                groups[bool(masks)].append(path)
        if split == 'test' and not groups[1] and not args.test:  # no truth
            continue
        if not all(groups):
            raise cli.UserError(
                f'{" and ".join(map(str, paths))}: where are the images, and '
                f'where the label maps of {split}? Name two folders after '
                f'--{split}'
            )
        folder, masks = (Path(os.path.commonpath(group)) for group in groups)
        if masks in (folder, *folder.parents):
            raise cli.UserError(
                f'{masks} has images of {split} and label maps: move one of '
                'them to another folder, with the same folders in it'
            )
        splits[split] = {
            'type': 'BaseSegDataset',
            'data_prefix': {
                'img_path': relative(folder, args.data),
                'seg_map_path': relative(masks, args.data),
            },
            **find_suffixes(folder, masks),
        }
        dataset = DATASETS.build(
            dict(
                splits[split],
                data_root=str(args.data),
                pipeline=[dict(type='LoadAnnotations')],
            )
        )
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        images[split] = [Path(info['img_path']) for info in infos]
        pixels = pixels + count_labels(dataset, infos, split)
    classes, zero = number_classes(pixels, read_names(args), args)
    for arguments in splits.values():
        arguments['reduce_zero_label'] = zero
    return Data(images, splits, classes)


def find_suffixes(folder, masks):
    """The ends of the names of images and of their label maps.

    Returns:
        dict[str, str]: Arguments of ``BaseSegDataset``.
    """
    images = [
        path for path in find_images(folder) if masks not in path.parents
    ]
    first = images[0]
    name = relative(first.with_suffix(''), folder)

    def common(path):
        other = relative(path.with_suffix(''), masks)
        return len(os.path.commonprefix([name, other])), -len(other)

    exact = [m for m in find_images(masks) if m.suffix.lower() not in LOSSY]
    match = max(exact or find_images(masks), key=common)
    length, _ = common(match)
    if not length:
        raise DataError(
            f'{first} and {match}: the names of images and of their label '
            'maps have to be alike up to what they end in'
        )
    if not exact:
        effect = 'JPEG makes other labels of some; save maps as PNGs'
        raise fault(match, 'is a label map in JPEG', '', effect)
    suffix = relative(first, folder)[length:]
    for path in images:
        if not path.name.endswith(suffix):
            what = f'does not end in {suffix}, as others do'
            effect = 'MMSegmentation takes images of one suffix'
            raise fault(path, what, '', effect)
    return {
        'img_suffix': suffix,
        'seg_map_suffix': relative(match, masks)[length:],
    }


def count_labels(dataset, infos, split):
    """Count the pixels of every label; 256 numbers."""
    pipeline = CheckedPipeline(dataset)

    def count(info):
        labels = pipeline.load(info)['gt_seg_map']
        return np.bincount(labels.ravel(), minlength=256)

    with ThreadPool(os.cpu_count()) as pool:
        counts = pool.imap(count, infos, chunksize=8)
        label = f'label maps of {split}'
        return sum(track(counts, description=label, total=len(infos)))


def number_classes(pixels, names, args):
    """Tell the classes from the labels.

    Args:
        pixels (ndarray): Of every label.
        names (list[str]): Of the classes; empty if nothing names them.
        args (argparse.Namespace): The options.

    Returns:
        tuple[list[str], bool]: The classes, and whether label 0 is none.
    """
    labels = np.flatnonzero(pixels[:255]).tolist()
    what = f'the label maps of {args.data} have the labels ' + ', '.join(
        map(str, np.flatnonzero(pixels))
    )
    last = labels[-1]
    zero = args.zero_is_unlabeled or labels[0] > 0
    if len(names) == last == 1 and not zero:
        names = ['background', *names]
    zero = zero or len(names) == last > 0
    count = len(names) or last + 1 - zero
    if last - zero >= count:
        raise DataError(f'{what}, and there are {count} classes')
    if count < 2:
        raise DataError(
            f'{what}: that is one class, and 255 is none; what is not of it '
            'should be labeled as a class too, by 0 and 1'
        )
    if not names and len(labels) < count / 16:
        raise DataError(
            f'{what}: these look like gray levels, not numbers of classes; '
            'save maps with 0, 1, 2 and so on, and 255 where a pixel is to be '
            'ignored, or name all classes'
        )
    # Without names, they have the numbers that are in the maps.
    return names or [f'class {i + zero}' for i in range(count)], zero


def read_names(args):
    """The names of classes in a file, one a line."""
    path = args.classes or args.data / 'classes.txt'
    if args.classes and not path.is_file():
        raise cli.UserError(f'--classes {path} does not exist')
    lines = path.read_text('utf-8-sig').splitlines() if path.is_file() else []
    return [*filter(None, map(str.strip, lines))]


def read_folders(args):
    folders = [path for path in sorted(args.data.iterdir()) if path.is_dir()]
    folders = sort_by_split(args, folders, 'folder')
    images, splits = {}, {}
    for split, [folder] in folders.items():
        found = {
            path.name: find_images(path)
            for path in sorted(folder.iterdir())
            if path.is_dir()
        }
        if split == 'test' and not found:  # no truth
            continue
        if split == 'train':
            classes = found
        if len(found) < 2 or not all(found.values()):
            counts = (f'{k}: {len(v)} images' for k, v in found.items())
            raise DataError(
                f'{folder} has to hold a folder of images for each of two '
                'classes or more, and has '
                + (', '.join(counts) or 'no folders')
            )
        if [*found] != [*classes]:
            odd = found.keys() ^ classes.keys()
            raise DataError(
                f'{folder} has other classes than {folders["train"][0]}: '
                f'{", ".join(sorted(odd))}; labels are the numbers of folders'
            )
        images[split] = sum(found.values(), [])
        splits[split] = {
            '_delete_': True,
            'type': 'CustomDataset',
            'data_prefix': relative(folder, args.data),
            'extensions': IMAGES,
        }
    return Data(images, splits, [*classes])


# -------------------------------------------------------------------- images


def decode(path):
    """Load an image as it is; returns (H, W, C) and the backend.

    Raises:
        DataError: If nothing loads it, or not with its channels last.
    """
    image, backend = cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 'cv2'
    if path.suffix.lower() in ('.tif', '.tiff'):
        with suppress(Exception):  # it may not be installed, or fail
            bands = mmcv.imread(str(path), 'unchanged', backend='tifffile')
            # OpenCV reads a part of the bands.
            if image is None or image.shape != bands.shape:
                image, backend = bands, 'tifffile'
    if image is None:
        raise fault(path, 'is damaged, or no image that can be loaded')
    image = np.atleast_3d(image)
    if image.shape[0] < min(image.shape[1:]):
        effect = 'LoadImageFromFile takes (height, width, channels)'
        shape = f'of shape {image.shape}'
        raise fault(path, 'has its channels first', shape, effect)
    return image, backend


def read_pixels(paths):
    """See how images are loaded; measure mean and deviation if not as RGB.

    Args:
        paths (list[Path]): Those for training, some of which are read.

    Returns:
        Pixels | None: None for RGB, or gray among it, in which gray is color.
    """
    chosen = np.linspace(0, len(paths) - 1, min(SAMPLES, len(paths)))
    kinds, moments = {}, []
    chosen = [paths[i] for i in chosen.astype(int)]
    for path in track(chosen, description='images'):
        image, backend = decode(path)
        opaque = image.dtype == np.uint8 and image.shape[2] == 4
        if opaque and (image[..., 3] == 255).all():
            image = image[..., :3]  # no more than a picture
        kinds.setdefault((image.shape[2], image.dtype, backend), path)
        flat = image.reshape(-1, image.shape[2]).astype(np.float64)
        moments.append([flat.mean(0), (flat**2).mean(0)])
    gray, color = (1, 'cv2'), (3, 'cv2')
    if {gray, color} == {gray, *((kind[0], kind[2]) for kind in kinds)}:
        if any(dtype == np.uint8 for _, dtype, _ in kinds):
            return None
    if len(kinds) > 1:
        (a, first), (b, second), *_ = kinds.items()
        raise DataError(
            f'{first} has {a[0]} channels of {a[1]}, and {second} {b[0]} of '
            f'{b[1]}'
        )
    [(channels, dtype, backend)] = kinds
    options = {'color_type': 'unchanged'}
    if backend != 'cv2':
        options['imdecode_backend'] = backend
    if dtype != np.uint8:
        options['to_float32'] = True
    elif channels == 1:
        options['color_type'] = 'grayscale'
    mean, squares = np.mean(moments, axis=0)
    deviation = np.sqrt((squares - mean**2).clip(0))
    deviation[deviation <= 1e-6 * abs(mean)] = 1  # of bands of one value
    rows = mean, deviation
    rounded = [[float(f'{value:.4g}') for value in row] for row in rows]
    return Pixels(channels, options, *rounded)


# -------------------------------------------------------------------- config


class Code(str):
    """An expression of a config."""

    __repr__ = str.__str__


NUM_CLASSES = {'num_classes': Code('num_classes')}


def code(value):
    """A value as code, dicts as calls of ``dict``."""
    if isinstance(value, dict):
        items = [f'{key}={code(item)}' for key, item in value.items()]
        return f'dict({", ".join(items)})'
    if isinstance(value, list):
        return f'[{", ".join(map(code, value))}]'
    return repr(value)


def assign(name, value):
    return f'{name} = {code(value)}'


def by_split(name, values):
    """Assignments of the values; without a test's, it gets validation's."""
    lines = [assign(f'{split}_{name}', values[split]) for split in values]
    if 'test' not in values:
        lines.append(f'test_{name} = val_{name}')
    return lines


def datasets(data, **loader):
    """Assignments of the dataloaders, with their options."""
    loaders = {}
    for split, arguments in data.splits.items():
        pipeline = 'train_pipeline' if split == 'train' else 'test_pipeline'
        dataset = dict(
            **arguments,
            data_root=Code('data_root'),
            metainfo=Code('metainfo'),
            pipeline=Code(pipeline),
        )
        loaders[split] = dict(loader, dataset=dataset)
    return by_split('dataloader', loaders)


def normalize(pixels, key):
    """Settings to load and normalize images that are not RGB.

    Args:
        pixels (Pixels): What they are like.
        key (str): What turns BGR into RGB in the data preprocessor.

    Returns:
        tuple[list[str], dict]: Lines on the pipelines, and what to change of
        the data preprocessor.
    """
    steps = [dict(type='LoadImageFromFile', **pixels.load)]
    values = dict(mean=pixels.mean, std=pixels.std)
    # The weights are for RGB, and OpenCV loads BGR.
    turn = pixels.channels == 3 and 'imdecode_backend' not in pixels.load
    if turn:
        values = {name: numbers[::-1] for name, numbers in values.items()}
    # Those of mmdet and mmseg have one mean, or three.
    if key == 'bgr_to_rgb' and pixels.channels not in (1, 3):
        steps.append(dict(type='Normalize', **values, to_rgb=False))
        values = dict(mean=None, std=None)
    lines = [
        assign('load', steps),
        'train_pipeline[:1] = load',
        'test_pipeline[:1] = load',
    ]
    return lines, {**values, key: turn}


def write_coco(args, data, pixels, model):
    boxes = args.head in BOXES_ONLY
    steps, metric = [], {}
    roi_head = dict(bbox_head=NUM_CLASSES, mask_head=NUM_CLASSES)
    if args.head.startswith('cascade'):
        roi_head['bbox_head'] = Code(
            '[dict(head, num_classes=num_classes) '
            'for head in _base_.model.roi_head.bbox_head]'
        )
    elif boxes:
        model['type'] = 'FasterRCNN'
    if boxes:
        roi_head |= dict(mask_roi_extractor=None, mask_head=None)
        metric = dict(metric='bbox')
        steps = [
            'train_pipeline[1].with_mask = False',
            'test_pipeline[2].with_mask = False',
        ]
    model['roi_head'] = roi_head
    evaluators = {}
    for split, arguments in data.splits.items():
        if split != 'train':
            file = Code(f'data_root + {arguments["ann_file"]!r}')
            evaluators[split] = dict(ann_file=file, **metric)
    lines = [*datasets(data), *by_split('evaluator', evaluators)]
    warm_up = 36 * len(data.images['train']) // 2 // 10
    if warm_up < 500:
        lines += [
            '',
            'param_scheduler = _base_.param_scheduler',
            f'param_scheduler[0].end = {warm_up}  # iterations of warm-up',
        ]
    return steps, lines


def write_masks(args, data, pixels, model):
    steps, lines = [], datasets(data)
    if pixels:
        steps.append('del train_pipeline[-2]  # PhotoMetricDistortion')
        lines += [
            'tta_pipeline = _base_.tta_pipeline',
            'tta_pipeline[:1] = load',
        ]
        # Tools of mmseg read it at the top level.
        lines.append("data_preprocessor = model['data_preprocessor']")
    model['decode_head'] = NUM_CLASSES
    if args.head == 'upernet':
        model['auxiliary_head'] = NUM_CLASSES
    # 20 for an image, in steps of 1000.
    count = round(len(data.images['train']) * 20, -3)
    count = min(max(count, 4000), 160_000)
    interval = count // 10
    return steps, [
        *lines,
        '',
        f'max_iters = {count}',
        f'train_cfg = dict(max_iters=max_iters, val_interval={interval})',
        'param_scheduler = _base_.param_scheduler',
        'param_scheduler[0].end = param_scheduler[1].begin = '
        f'{min(1500, count // 20)}',
        'param_scheduler[1].end = max_iters',
        f'default_hooks = dict(checkpoint=dict(interval={interval}))',
    ]


def write_folders(args, data, pixels, model):
    model['data_preprocessor'] |= NUM_CLASSES
    model['head'] = NUM_CLASSES
    steps, lines = [], datasets(data, batch_size=64)
    if pixels:
        steps = [
            'del train_pipeline[3:-1]  # RandAugment and RandomErasing',
            "train_pipeline[1].backend = test_pipeline[1].backend = 'cv2'",
        ]
    if len(data.classes) < 5:
        lines.append('# Of five classes or more, the five first count too.')
        lines += by_split('evaluator', {'val': dict(topk=(1,))})
    return steps, [
        *lines,
        '',
        '# To tune trained weights, which takes less than to train them.',
        'epochs = 30',
        'train_cfg = dict(max_epochs=epochs)',
        'param_scheduler = _base_.param_scheduler',
        'param_scheduler[0].end = param_scheduler[1].begin = 2',
        'param_scheduler[1].end = epochs',
        'optim_wrapper = dict(optimizer=dict(lr=1e-4))',
        'custom_hooks = []  # averaged weights take more iterations',
    ]


# By kind: what reads the data; what completes the model, and returns lines on
# its pipelines and all further ones; what turns BGR into RGB in the data
# preprocessor; the images of a step.
KINDS = {
    'coco': (read_coco, write_coco, 'bgr_to_rgb', 16),
    'masks': (read_masks, write_masks, 'bgr_to_rgb', 16),
    'folders': (read_folders, write_folders, 'to_rgb', 64),
}


def write(args):
    """Read the data; returns the text of the config."""
    read, finish, key, batch = KINDS[args.kind]
    if args.kind != 'coco':  # which lists its images
        line = left_out(args.data, IMAGES)
        if line:
            print(line)
    data = read(args)
    args.head = args.head or next(iter(HEADS[args.kind]))
    base = HEADS[args.kind][args.head].format(args.arch)
    if not (ROOT / 'configs' / base).is_file():
        raise cli.UserError(f'--head {args.head} is there for --arch t only')
    pixels = read_pixels(data.images['train'])
    weights = weights_of(base)
    loading, preprocessor, backbone = [], {}, {}
    if pixels:
        loading, preprocessor = normalize(pixels, key)
        backbone['in_channels'] = pixels.channels
    if weights:
        backbone['init_cfg'] = None  # load_from has them
    model = dict(data_preprocessor=preprocessor, backbone=backbone)
    images = ', '.join(
        f'{split} {len(paths)}' for split, paths in data.images.items()
    )
    steps, rest = finish(args, data, pixels, model)
    model = {key: value for key, value in model.items() if value}
    lines = [
        f'# Images: {images}.',
        assign('_base_', f'mmoverlock::{base}'),
        '',
        assign('data_root', args.data.as_posix().rstrip('/') + '/'),
        assign('metainfo', dict(classes=tuple(data.classes))),
        f'num_classes = {len(data.classes)}',
        '',
        assign('model', model),
        '',
        'train_pipeline = _base_.train_pipeline',
        'test_pipeline = _base_.test_pipeline',
        *steps,
        *loading,
        '',
        *rest,
        f'# The learning rate is for {batch} images a step.',
        f'auto_scale_lr = dict(enable=True, base_batch_size={batch})',
    ]
    if weights:
        lines += ['# None starts without.', assign('load_from', weights)]
    style = dict(based_on_style='facebook', column_limit=79)
    return yapf_api.FormatCode('\n'.join([*lines, '']), style_config=style)[0]


def weights_of(config):
    """The URL of the released weights of a config, None without any."""
    path = ROOT / 'configs' / Path(config).parent / 'metafile.yml'
    for model in load(path)['Models']:
        if model['Config'] == f'configs/{config}':
            return model.get('Weights')
    return None


# -------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('kind', choices=KINDS)
    parser.add_argument('data', type=Path, metavar='DATA')
    parser.add_argument(
        '--arch',
        choices=['xt', 't', 's', 'b'],
        default='t',
        help='default: %(default)s',
    )
    parser.add_argument(
        '--head',
        choices=[name for heads in HEADS.values() for name in heads],
        help='default: the first of the kind, or faster_rcnn without masks; '
        + '; '.join(f'{k}: {", ".join(heads)}' for k, heads in HEADS.items()),
    )
    for split in SPLITS:
        parser.add_argument(
            f'--{split}',
            nargs='+',
            metavar='PATH',
            help=f'what is for {split}, from DATA on, where its path does not '
            'say so: a file of annotations, a folder of images and one of '
            'label maps, or a folder of classes',
        )
    parser.add_argument(
        '--classes',
        type=Path,
        metavar='FILE',
        help='for masks: the names of classes, one a line; default: '
        'DATA/classes.txt',
    )
    parser.add_argument(
        '--zero-is-unlabeled',
        action='store_true',
        help='for masks: 0 is no class; default: if there is a name less than '
        'numbers, or no 0',
    )
    return parser


def main(argv=None):
    cli.set_up()
    with cli.user_errors('make_config.py'):
        args = build_parser().parse_args(argv)
        if not args.data.is_dir():
            raise cli.UserError(f'{args.data} is no folder')
        if args.head and args.head not in HEADS[args.kind]:
            raise cli.UserError(
                f'--head {args.head} is not for {args.kind}; there are '
                + ', '.join(HEADS[args.kind])
            )
        with redirect_stdout(sys.stderr):  # of packages that print, and bars
            text = write(args)
    print(text, end='')


if __name__ == '__main__':
    main()
