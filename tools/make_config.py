"""Write a config for your data: ``make_config.py KIND DATA > my_config.py``.

What the folder DATA holds, by KIND:

- ``coco``: images, and annotations in COCO's format, in files that have
  ``train`` or ``val`` in their names or their folders';
- ``masks``: folders of images and folders of label maps, PNGs whose pixels
  are numbers of classes, with ``train`` or ``val`` in their paths;
- ``folders``: ``train`` and ``val``, in each a folder of images per class.

A ``test`` is used for tests where there is one. Classes, channels, mean and
deviation, suffixes and ignored labels are read from the data. The config
builds on one of this project and starts from the released weights of its
model, if there are any.
"""

import argparse
import math
import os
import re
import sys
import textwrap
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import mmcv
import numpy as np
from mmengine.fileio import load
from mmengine.registry import DATASETS, init_default_scope
from rich.console import Console
from rich.progress import track

from mmoverlock import cli
from mmoverlock.data import DataError, Finding
from mmoverlock.data.checks import annotation_file
from mmoverlock.data.files import CheckedPipeline, check_image, read_json
from mmoverlock.inference import IMAGES

ROOT = Path(__file__).parents[1]
SPLITS = ('train', 'val', 'test')
SAMPLES = 200  # images, for their channels, mean and deviation
WIDTH = 79

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


@dataclass
class Data:
    """What there is to learn from.

    Attributes:
        images (dict[str, list[Path]]): By split.
        splits (dict[str, dict]): Arguments of the datasets, by split.
        classes (list[str] | int): In the order of their labels; or how many,
            where nothing names them.
        counts (dict): What is annotated for training, by class.
        unit (str): What is counted.
        shared (dict): Arguments that the datasets have in common.
        ignored (int): The label that is none.
    """

    images: dict
    splits: dict
    classes: list | int
    counts: dict
    unit: str
    shared: dict = field(default_factory=dict)
    ignored: int = 255


@dataclass
class Pixels:
    """How images are loaded, if not as RGB, and what they are like."""

    channels: int
    load: dict
    mean: list
    std: list


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
    found = {split: [] for split in SPLITS}
    for path in paths:
        found.get(split_of(path.relative_to(args.data)), []).append(path)
    for split in SPLITS:
        given = getattr(args, split)
        if given:
            found[split] = [args.data / name for name in given]
            for path in found[split]:
                if not path.exists():
                    raise cli.UserError(f'--{split}: {path} does not exist')
        elif split != 'test' and not found[split]:
            raise cli.UserError(
                f'no {what} in {args.data} has {split} in its path; name it '
                f'after --{split}, or set some aside for it'
            )
        if len(found[split]) > most:
            raise cli.UserError(
                f'{" and ".join(map(str, found[split]))} may all be of '
                f'{split}; name one after --{split}'
            )
    return {split: paths for split, paths in found.items() if paths}


def image_folders(data):
    """The folders in which there are images."""
    return [
        Path(folder)
        for folder, _, names in sorted(os.walk(data, followlinks=True))
        if any(name.lower().endswith(IMAGES) for name in names)
    ]


def relative(path, data):
    return path.relative_to(data).as_posix()


# --------------------------------------------------------------------- kinds


def read_coco(args):
    files = [
        path
        for path in sorted(args.data.rglob('*.json'))
        if not path.name.startswith(('captions_', 'person_keypoints_'))
    ]
    files = sort_by_split(args, files, 'file of annotations (.json)')
    folders = image_folders(args.data)
    images, splits, counts, names, no_mask = {}, {}, {}, [], None
    for split, [path] in files.items():
        for finding in annotation_file(str(path)):
            if finding.fault:
                raise DataError(finding)
        contents = read_json(path)
        annotations = contents.get('annotations')
        if not annotations:
            if split == 'test':  # as of COCO
                continue
            raise DataError(Finding(str(path), 'has no annotations'))
        listed = [image['file_name'] for image in contents['images']]
        folder = next(
            (
                folder
                for folder in sorted(
                    [path.parent, args.data, *folders],
                    key=lambda f: split_of(f.relative_to(args.data)) != split,
                )
                if (folder / listed[0]).is_file()
            ),
            None,
        )
        if folder is None:
            raise DataError(
                Finding(
                    str(path),
                    f'lists images that are in no folder of {args.data}',
                    listed[0],
                )
            )
        images[split] = [folder / name for name in listed]
        for image in images[split]:
            if not image.is_file():
                raise DataError(
                    Finding(str(image), 'does not exist', f'listed in {path}')
                )
        categories = {c['id']: c['name'] for c in contents['categories']}
        counts[split] = Counter(
            categories.get(a['category_id']) for a in annotations
        )
        names += [n for n in categories.values() if n not in names]
        for annotation in annotations:
            if not annotation.get('segmentation'):
                no_mask = no_mask or f'{path}: annotation {annotation["id"]}'
        splits[split] = {
            'ann_file': relative(path, args.data),
            'data_prefix': {'img': relative(folder, args.data)},
        }
    if args.head is None and no_mask:
        args.head = BOXES_ONLY[0]
    if args.head not in (None, *BOXES_ONLY) and no_mask:
        raise cli.UserError(
            f'{no_mask} has no mask; boxes are enough for --head '
            + ' and '.join(BOXES_ONLY)
        )
    # Categories without an object, such as roots of a hierarchy, are left out.
    found = sum(counts.values(), Counter())
    classes = [name for name in names if found[name]]
    return Data(images, splits, classes, counts['train'], 'objects')


def read_masks(args):
    init_default_scope('mmseg')
    folders = sort_by_split(
        args, image_folders(args.data), 'folder of images', most=math.inf
    )
    images, splits, suffixes, pixels = {}, {}, {}, {}
    for split, paths in folders.items():
        if getattr(args, split):
            groups = paths[:1], paths[1:]
        else:
            groups = [], []
            for path in paths:
                name = relative(path, args.data).lower()
                masks = re.search('mask|label|annot|seg|gt', name)
                groups[bool(masks)].append(path)
        if not all(groups):
            raise cli.UserError(
                f'{" and ".join(map(str, paths))}: where are the images, and '
                f'where the label maps of {split}? Name two folders after '
                f'--{split}'
            )
        folder, masks = (Path(os.path.commonpath(group)) for group in groups)
        suffixes[split] = find_suffixes(folder, masks)
        splits[split] = {
            'data_prefix': {
                'img_path': relative(folder, args.data),
                'seg_map_path': relative(masks, args.data),
            }
        }
        dataset = DATASETS.build(
            dict(
                type='BaseSegDataset',
                data_root=str(args.data),
                **splits[split],
                **suffixes[split],
                pipeline=[dict(type='LoadAnnotations')],
            )
        )
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        images[split] = [Path(info['img_path']) for info in infos]
        pixels[split] = count_labels(dataset, infos, split)
    for split, found in suffixes.items():
        if found != suffixes['train']:
            raise cli.UserError(
                f'images and label maps of {split} end in {found}, those of '
                f'train in {suffixes["train"]}; name them alike'
            )
    classes, zero, ignored = number_classes(
        sum(pixels.values()), read_names(args), args
    )
    shared = dict(suffixes['train'])
    if zero:
        shared['reduce_zero_label'] = True
    if ignored != 255:
        shared['ignore_index'] = ignored
    size = classes if isinstance(classes, int) else len(classes)
    counted = pixels['train'][zero : size + zero].tolist()
    keys = classes
    if isinstance(classes, int):
        keys = [f'class {i}' for i in range(size)]
    counts = dict(zip(keys, counted, strict=True))
    return Data(images, splits, classes, counts, 'pixels', shared, ignored)


def find_suffixes(folder, masks):
    """What the names of images, and of their label maps, end in."""
    found = {
        root: sorted(
            path
            for path in root.rglob('*')
            if path.suffix.lower() in IMAGES
            and (root == masks or masks not in path.parents)
        )
        for root in (folder, masks)
    }
    first = found[folder][0]
    name = relative(first.with_suffix(''), folder)

    def common(path):
        other = relative(path.with_suffix(''), masks)
        shared = os.path.commonprefix([name, other])
        return len(shared), -len(other)

    match = max(found[masks], key=common)
    length, _ = common(match)
    if not length:
        raise DataError(
            f'{first} and {match}: the names of images and of their label '
            'maps have to be alike up to what they end in'
        )
    result = {
        'img_suffix': relative(first, folder)[length:],
        'seg_map_suffix': relative(match, masks)[length:],
    }
    for path in found[folder]:
        if not path.name.endswith(result['img_suffix']):
            raise DataError(
                Finding(
                    str(path),
                    f'does not end in {result["img_suffix"]}, as others do',
                    effect='MMSegmentation takes images of one suffix',
                )
            )
    return result


def count_labels(dataset, infos, split):
    """Count the pixels of every label; 256 numbers."""
    pipeline = CheckedPipeline(dataset)

    def count(info):
        labels = pipeline.load(info)['gt_seg_map']
        return np.bincount(labels.ravel(), minlength=256)

    total = 0
    with ThreadPool(os.cpu_count()) as pool:
        for found in track(
            pool.imap(count, infos, chunksize=8),
            description=f'label maps of {split}',
            total=len(infos),
            console=Console(stderr=True),
        ):
            total = total + found
    return total


def number_classes(pixels, names, args):
    """Tell the classes from the labels.

    Args:
        pixels (ndarray): Of every label.
        names (list[str]): Of the classes; empty if nothing names them.
        args (argparse.Namespace): The options.

    Returns:
        tuple[list[str] | int, bool, int]: The classes or their number,
        whether label 0 is none of them, and the label to ignore.
    """
    labels = np.flatnonzero(pixels[:255]).tolist()
    what = f'the label maps of {args.data} have the labels ' + ', '.join(
        map(str, np.flatnonzero(pixels))
    )
    if labels == [0] and pixels[255]:
        raise DataError(
            f'{what}: MMSegmentation ignores 255, and nothing is left to '
            'learn; save masks of two classes with 0 and 1'
        )
    ignored = 255
    few, last = labels[:-1], labels[-1]
    top = few[-1] if few else last
    if last > max(len(names), top + 1) and len(few) == top - few[0] + 1:
        ignored, labels = last, few  # all others are counted through
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
            f'{what}: that is one class, and all is of it; what is not should '
            'be labelled as a class too'
        )
    if not names and len(labels) < count / 16:
        raise DataError(
            f'{what}: these look like grey levels, not numbers of classes; '
            'save maps with 0, 1, 2 and so on, or name all classes'
        )
    if zero and ignored != 255:
        raise DataError(
            f'{what}, of which 0 and {ignored} are no classes; save 255 for '
            f'{ignored}'
        )
    return names or count, zero, ignored


def read_names(args):
    """The names of classes in a file, one a line."""
    path = args.classes or args.data / 'classes.txt'
    if args.classes and not path.is_file():
        raise cli.UserError(f'--classes {path} does not exist')
    return path.read_text().splitlines() if path.is_file() else []


def read_folders(args):
    folders = [path for path in sorted(args.data.iterdir()) if path.is_dir()]
    folders = sort_by_split(args, folders, 'folder')
    images, splits, classes, suffixes = {}, {}, {}, set()
    for split, [folder] in folders.items():
        classes[split] = [
            p.name for p in sorted(folder.iterdir()) if p.is_dir()
        ]
        if split == 'test' and not classes[split]:  # no truth
            continue
        if classes[split] != classes['train']:
            odd = {*classes[split]} ^ {*classes['train']}
            raise DataError(
                f'{folder} has other classes than {folders["train"][0]}: '
                f'{", ".join(sorted(odd))}; labels are the numbers of folders'
            )
        images[split] = []
        for name in classes[split]:
            found = [
                path
                for path in sorted((folder / name).rglob('*'))
                if path.suffix.lower() in IMAGES
            ]
            if not found:
                raise DataError(f'{folder / name} has no images')
            images[split] += found
        splits[split] = {'data_prefix': relative(folder, args.data)}
        suffixes |= {path.suffix.lower() for path in images[split]}
    if len(classes['train']) < 2:
        raise DataError(
            f'{folders["train"][0]} has {len(classes["train"])} folders of '
            'images; to tell classes apart takes two'
        )
    folder = folders['train'][0]
    counts = Counter(p.relative_to(folder).parts[0] for p in images['train'])
    # What mmpretrain takes by itself.
    known = {'.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif'}
    shared = {} if suffixes <= known else {'extensions': sorted(suffixes)}
    return Data(images, splits, classes['train'], counts, 'images', shared)


# -------------------------------------------------------------------- images


def decode(path):
    """Load an image as it is; returns the pixels and the backend.

    Raises:
        DataError: If nothing loads it, or not with its channels last.
    """
    found = {}
    for backend in ('cv2', 'tifffile')[
        : 1 + path.suffix.lower().startswith('.tif')
    ]:
        with suppress(Exception):  # a file can fail in any way
            image = mmcv.imread(str(path), 'unchanged', backend=backend)
            if image is not None:
                found[backend] = np.atleast_3d(image)
    if not found:
        check_image(str(path))
        raise DataError(Finding(str(path), 'is no image that can be loaded'))
    (backend, image), *others = found.items()
    # OpenCV reads a part of the bands.
    if others and others[0][1].shape != image.shape:
        [(backend, image)] = others
    if image.shape[0] < min(image.shape[1:]):
        raise DataError(
            Finding(
                str(path),
                'has its channels first',
                f'of shape {image.shape}',
                'LoadImageFromFile takes (height, width, channels)',
            )
        )
    return image, backend


def read_pixels(paths):
    """See how images are loaded; measure mean and deviation.

    Args:
        paths (list[Path]): Those for training, some of which are read.

    Returns:
        Pixels: The mean and deviation of channels as they are loaded.
    """
    chosen = np.linspace(0, len(paths) - 1, min(SAMPLES, len(paths)))
    kinds, sums = {}, []
    for path in track(
        [paths[i] for i in chosen.astype(int)],
        description='images',
        console=Console(stderr=True),
    ):
        image, backend = decode(path)
        opaque = np.iinfo(image.dtype).max if image.dtype.kind == 'u' else None
        if image.shape[2] == 4 and (image[..., 3] == opaque).all():
            image = image[..., :3]  # no more than a picture
        kind = image.shape[2], image.dtype, backend
        kinds.setdefault(kind, path)
        flat = image.reshape(-1, image.shape[2]).astype(np.float64)
        sums.append(np.stack([flat.mean(0), (flat**2).mean(0)]))
    if {k[::2] for k in kinds} <= {(1, 'cv2'), (3, 'cv2')} and (
        {k[0] for k in kinds} != {1}
    ):
        channels, options = 3, {}
    elif len(kinds) > 1:
        (a, first), (b, second) = list(kinds.items())[:2]
        raise DataError(
            f'{first} has {a[0]} channels of {a[1]}, and {second} {b[0]} of '
            f'{b[1]}'
        )
    else:
        [(channels, dtype, backend)] = kinds
        gray = channels == 1 and dtype == np.uint8
        options = {'color_type': 'grayscale' if gray else 'unchanged'}
        if backend != 'cv2':
            options['imdecode_backend'] = backend
        if dtype != np.uint8:
            options['to_float32'] = True
    # A gray one among others is loaded in color.
    mean, squares = sum(sums) / len(sums)
    std = np.sqrt(squares - mean**2)
    return Pixels(
        channels,
        options,
        *([float(f'{value:.4g}') for value in row] for row in (mean, std)),
    )


# -------------------------------------------------------------------- config


class Code(str):
    """An expression of a config."""

    __repr__ = str.__str__


def source(value, column=0, indent=0):
    """Write a value as code, in lines of 79.

    Args:
        value: Dicts, lists, tuples and leaves.
        column (int): Where it starts.
        indent (int): Of the line that it starts in.
    """
    if isinstance(value, dict):
        start, end = 'dict(', ')'
        items = [(f'{key}=', item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        start, end = '[]' if isinstance(value, list) else '()'
        items = [('', item) for item in value]
    else:
        return repr(value)
    line = ', '.join(key + source(item, -9999) for key, item in items)
    if isinstance(value, tuple) and len(value) == 1:
        line += ','
    if column + len(start + line + end) <= WIDTH:
        return start + line + end
    inner = ' ' * (indent + 4)
    if len(inner + line) <= WIDTH:
        return f'{start}\n{inner}{line}\n{" " * indent}{end}'
    lines = ['']
    for key, item in items:
        text = inner + key + source(item, len(inner + key) + 1, len(inner))
        text += ',' * (len(items) > 1 or start == '(')
        more = f'{lines[-1]} {text.strip()}'
        # Names are packed, all else has a line of its own.
        if lines[-1] and not key and len(more) <= WIDTH:
            text = f'{lines.pop()} {text.strip()}'
        lines.append(text)
    return '\n'.join([start, *filter(None, lines), ' ' * indent + end])


def assign(name, value):
    return f'{name} = {source(value, len(name) + 3)}'


def normalize(pixels, key):
    """How images that are not RGB are loaded and normalized.

    Args:
        pixels (Pixels): What they are like.
        key (str): What turns BGR into RGB.

    Returns:
        tuple[list, dict]: Steps of the pipelines, and what to change of the
        data preprocessor.
    """
    steps = [dict(type='LoadImageFromFile', **pixels.load)]
    values = dict(mean=pixels.mean, std=pixels.std)
    # Those of mmdet and mmseg have one mean, or three.
    if key == 'bgr_to_rgb' and pixels.channels not in (1, 3):
        steps.append(dict(type='Normalize', **values, to_rgb=False))
        values = dict(mean=None, std=None)
    return steps, {**values, key: False}


def datasets(data, pipelines, loader=None, **options):
    """Assignments of the three dataloaders, without a test to the second."""
    lines = []
    for split, arguments in data.splits.items():
        dataset = options | dict(
            data_root=Code('data_root'),
            metainfo=Code('metainfo'),
            **arguments,
            **data.shared,
        )
        if pipelines:
            name = 'train' if split == 'train' else 'test'
            dataset['pipeline'] = Code(f'{name}_pipeline')
        settings = dict(loader or {}, dataset=dataset)
        lines.append(assign(f'{split}_dataloader', settings))
    if 'test' not in data.splits:
        lines.append('test_dataloader = val_dataloader')
    return lines


def write_coco(args, data, pixels, weights):
    boxes = args.head in BOXES_ONLY
    cascade = args.head.startswith('cascade')
    preprocessor, lines = {}, []
    head = dict(num_classes=Code('num_classes'))
    if cascade:
        lines += [
            'bbox_heads = [',
            '    dict(head, num_classes=num_classes)',
            '    for head in _base_.model.roi_head.bbox_head',
            ']',
        ]
        roi_head = dict(bbox_head=Code('bbox_heads'))
    else:
        roi_head = dict(bbox_head=head)
    if boxes:
        roi_head |= dict(mask_roi_extractor=None, mask_head=None)
    else:
        roi_head |= dict(mask_head=head)
    steps = []
    if boxes or pixels.load:
        steps += PIPELINES
    if boxes:
        steps += [
            'train_pipeline[1].with_mask = False',
            'test_pipeline[2].with_mask = False',
        ]
    if pixels.load:
        loading, preprocessor = normalize(pixels, 'bgr_to_rgb')
        steps += [assign('load', loading), *LOAD]
    model = model_of(pixels, weights, preprocessor)
    if boxes and not cascade:
        model = dict(type='FasterRCNN') | model
    lines += [assign('model', model | dict(roi_head=roi_head)), '']
    lines += [*steps, ''] if steps else []
    lines += datasets(data, bool(steps))
    for split, arguments in data.splits.items():
        if split != 'train':
            file = Code(f'data_root + {arguments["ann_file"]!r}')
            evaluator = dict(ann_file=file)
            if boxes:
                evaluator['metric'] = 'bbox'
            lines.append(assign(f'{split}_evaluator', evaluator))
    if 'test' not in data.splits:
        lines.append('test_evaluator = val_evaluator')
    warm_up = 36 * len(data.images['train']) // 2 // 10
    if warm_up < 500:
        lines += [
            '',
            'param_scheduler = _base_.param_scheduler',
            f'param_scheduler[0].end = {warm_up}  # iterations of warm-up',
        ]
    return lines


PIPELINES = [
    'train_pipeline = _base_.train_pipeline',
    'test_pipeline = _base_.test_pipeline',
]
LOAD = ['train_pipeline[:1] = load', 'test_pipeline[:1] = load']


def model_of(pixels, weights, preprocessor):
    """What of a model the images and weights change."""
    model, backbone = {}, {}
    if preprocessor:
        model['data_preprocessor'] = preprocessor
    if pixels.channels != 3:
        backbone['in_channels'] = pixels.channels
    if weights:
        backbone['init_cfg'] = None  # load_from has them
    if backbone:
        model['backbone'] = backbone
    return model


def write_masks(args, data, pixels, weights):
    head = dict(num_classes=Code('num_classes'))
    preprocessor, steps = {}, []
    if data.ignored != 255:
        steps += [f'train_pipeline[3].ignore_index = {data.ignored}']
    if pixels.load:
        loading, preprocessor = normalize(pixels, 'bgr_to_rgb')
        steps += [
            'tta_pipeline = _base_.tta_pipeline',
            assign('load', loading),
            *LOAD,
            'tta_pipeline[:1] = load',
            'del train_pipeline[-2]  # PhotoMetricDistortion, for RGB',
        ]
    if data.ignored != 255:
        head['ignore_index'] = data.ignored
        preprocessor = preprocessor | dict(seg_pad_val=data.ignored)
    lines = []
    if preprocessor:  # which tools of mmseg read at the top level
        lines.append(assign('data_preprocessor', preprocessor))
        preprocessor = Code('data_preprocessor')
    model = model_of(pixels, weights, preprocessor) | dict(decode_head=head)
    if args.head == 'upernet':
        model['auxiliary_head'] = head
    lines += [assign('model', model), '']
    lines += [*PIPELINES, *steps, ''] if steps else []
    lines += datasets(data, bool(steps), type='BaseSegDataset')
    if data.ignored != 255:
        evaluator = dict(ignore_index=data.ignored)
        lines.append(assign('val_evaluator', evaluator))
        lines.append('test_evaluator = val_evaluator')
    # 20 for an image, in steps of 1000.
    count = round(len(data.images['train']) * 20, -3)
    count = min(max(count, 4000), 160_000)
    interval = count // 10
    return [
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


def write_folders(args, data, pixels, weights):
    preprocessor = dict(num_classes=Code('num_classes'))
    steps = PIPELINES
    if pixels.load:
        loading, values = normalize(pixels, 'to_rgb')
        preprocessor |= values
        # The augmentation of the base is for RGB.
        crop = dict(scale=224, interpolation='bicubic')
        train = [
            Code('load'),
            dict(type='RandomResizedCrop', **crop),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ]
        test = [
            Code('load'),
            dict(
                type='ResizeEdge',
                scale=Code('_base_.test_pipeline[1].scale'),
                edge='short',
                interpolation='bicubic',
            ),
            dict(type='CenterCrop', crop_size=224),
            dict(type='PackInputs'),
        ]
        steps = [
            assign('load', loading[0]),
            assign('train_pipeline', train),
            assign('test_pipeline', test),
        ]
    model = model_of(pixels, None, preprocessor)
    model['head'] = dict(num_classes=Code('num_classes'))
    lines = [assign('model', model), '', *steps, '']
    lines += datasets(
        data,
        True,
        dict(batch_size=64),
        _delete_=True,
        type='CustomDataset',
    )
    if len(data.classes) < 5:
        lines += [
            'val_evaluator = dict(topk=(1,))  # five need as many classes',
            'test_evaluator = val_evaluator',
        ]
    return [
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


KINDS = {
    'coco': (read_coco, write_coco, 16),
    'masks': (read_masks, write_masks, 16),
    'folders': (read_folders, write_folders, 64),
}


def write(args):
    """Read the data; returns the text of the config."""
    read, finish, batch = KINDS[args.kind]
    data = read(args)
    args.head = args.head or next(iter(HEADS[args.kind]))
    base = HEADS[args.kind][args.head].format(args.arch)
    if not (ROOT / 'configs' / base).is_file():
        raise cli.UserError(f'--head {args.head} is there for --arch t only')
    pixels = read_pixels(data.images['train'])
    weights = weights_of(base)
    names = data.classes
    lines = list(map('# {}'.format, describe(data, pixels)))
    lines += [assign('_base_', f'mmoverlock::{base}'), '']
    root = args.data.as_posix().rstrip('/') + '/'
    lines.append(assign('data_root', root))
    if isinstance(names, int):
        lines += [
            f'num_classes = {names}',
            '# Put their names here.',
            "classes = [f'class {i}' for i in range(num_classes)]",
            'metainfo = dict(classes=classes)',
        ]
    else:
        lines += [
            assign('metainfo', dict(classes=tuple(names))),
            f'num_classes = {len(names)}',
        ]
    lines += [
        '',
        *finish(args, data, pixels, weights),
        f'# The learning rate is for {batch} images a step.',
        f'auto_scale_lr = dict(enable=True, base_batch_size={batch})',
    ]
    if weights:
        folder, _, name = weights.rpartition('/')
        lines += [
            'load_from = (  # set None to start without',
            f"    '{folder}/'",
            f'    {name!r}',
            ')',
        ]
    return '\n'.join(lines) + '\n'


def describe(data, pixels):
    """Lines on the data, for the head of the config."""
    images = ', '.join(
        f'{split} {len(data.images[split])}' for split in data.splits
    )
    mean, std = pixels.mean, pixels.std
    kept = ''
    if not pixels.load:  # and so BGR
        mean, std = mean[::-1], std[::-1]
        kept = ' (RGB; the model has those of ImageNet, as its weights want)'
    counts = sorted(data.counts.items(), key=lambda item: -item[1])
    counts = [f'{name} {count}' for name, count in counts if count]
    more = f' and {len(counts) - 20} more' if len(counts) > 20 else ''
    for text in (
        f'Images: {images}. Mean {mean}, deviation {std}{kept}.',
        f'{data.unit.capitalize()} of train: {", ".join(counts[:20])}{more}.',
    ):
        yield from textwrap.wrap(text, WIDTH - 2)


def weights_of(config):
    """Where the released weights of a config are, if there are any."""
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
        with redirect_stdout(sys.stderr):  # of packages that print
            text = write(args)
    print(text, end='')


if __name__ == '__main__':
    main()
