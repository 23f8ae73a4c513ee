"""Data that cannot be used ends a run with an error that names the file.

mmdet leaves some annotations out in silence, OpenCV before 4.12 fills images
that are cut off with gray, and many errors of data pipelines name no file.
"""

import json
import logging
import math
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from PIL import Image, ImageOps

# By a part of the dataset type.
DATASET_HELP = {
    'Coco': 'Unpack train2017.zip, val2017.zip and annotations_trainval2017'
    '.zip from https://cocodataset.org/#download so that {root} holds '
    'train2017/, val2017/ and annotations/, or draw sample data: '
    'python tools/make_sample_data.py coco {root}',
    'ADE20K': 'Unpack ADEChallengeData2016.zip of the MIT scene parsing '
    'benchmark, http://sceneparsing.csail.mit.edu, so that {root} holds '
    'images/ and annotations/, or draw sample data: '
    'python tools/make_sample_data.py ade20k {root}',
    'ImageNet': 'Get ILSVRC2012 from https://image-net.org (this needs an '
    'account) so that {root} holds train/ and val/ with one folder per class, '
    'or draw sample data: python tools/make_sample_data.py imagenet {root}',
}

# mmpretrain downloads these where they are missing.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


class DataError(ValueError):
    """Data that cannot be used; the message names the file."""

    def __str__(self):
        # A worker process passes it on at the end of a traceback.
        return super().__str__().rpartition('DataError: ')[2].strip()


# ----------------------------------------------------------------- images


class CheckedPipeline(Compose):
    """The pipeline of a dataset, with errors that name the sample's files.

    Images that are cut off, label maps of another size than their images and
    labels that are no class are errors too.

    Args:
        dataset (BaseDataset): The dataset.
    """

    def __init__(self, dataset: BaseDataset):
        super().__init__(dataset.pipeline.transforms)
        self.classes = len(dataset.metainfo.get('classes') or ())
        self.ignored = getattr(dataset, 'ignore_index', None)  # mmseg has it

    def __call__(self, data: dict) -> dict | None:
        files = [data.get('img_path'), data.get('seg_map_path')]
        files = [file for file in files if isinstance(file, str)]
        try:
            # Whether it needs the files, the pipeline knows.
            with suppress(OSError, Image.DecompressionBombError):
                for file in files:
                    _check_end(file)
                if len(files) == 2:
                    _check_sizes(*files)
            sample = super().__call__(data)
            self._check_labels(sample, files)
        except DataError:
            raise
        except Exception as error:
            for file in files:
                _check_image(file)
            if str(error).startswith('failed to load image'):  # of mmcv
                raise DataError(f'{files[0]} is damaged: {error}') from error
            if not files:
                raise
            raise RuntimeError(
                f'the pipeline fails for {" and ".join(files)}: '
                f'{type(error).__name__}: {error}'
            ) from error
        return sample

    def _check_labels(self, sample, files):
        truth = sample and sample.get('data_samples')
        if not isinstance(truth, BaseDataElement):
            return
        if 'gt_label' in truth:
            labels = truth.gt_label
        elif 'gt_sem_seg' in truth and self.ignored is not None:
            labels = truth.gt_sem_seg.data
        else:
            return
        unknown = (labels >= self.classes) & (labels != self.ignored)
        if self.classes and unknown.any():
            raise DataError(
                f'{files[-1]} has the label {int(labels[unknown].max())}; '
                f'those of the {self.classes} classes are from 0 to '
                f'{self.classes - 1}'
            )


def _check_end(path):
    with open(path, 'rb') as file:
        if file.read(2) != b'\xff\xd8':  # no JPEG
            return
        file.seek(-2, os.SEEK_END)
        if file.read() == b'\xff\xd9':
            return
        file.seek(0)
        data = file.read()
    # The end comes after the last scan, but other data may follow it.
    if data.rfind(b'\xff\xd9') <= data.rfind(b'\xff\xda'):
        raise DataError(f'{path} is cut off: a JPEG without its end')


def _check_sizes(path, labels_path):
    with Image.open(path) as image, Image.open(labels_path) as labels:
        if labels.size == image.size:
            return
        size = ImageOps.exif_transpose(image).size
    if labels.size != size:
        raise DataError(
            f'{labels_path} has {labels.width} x {labels.height} pixels, and '
            f'its image {path} has {size[0]} x {size[1]}'
        )


def _check_image(path):
    suffix = os.path.splitext(path)[1].lower()
    if '://' in path or suffix not in Image.registered_extensions():
        return
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError as error:
        raise DataError(f'{path} does not exist') from error
    except Exception as error:  # damaged bytes can fail in any way
        raise DataError(f'{path} is damaged or no image: {error}') from error


# ------------------------------------------------------------ annotations


def check_coco(
    path: str,
    category_ids: list[int] | None = None,
    filter_cfg: dict | None = None,
) -> Counter:
    """Count what mmdet's CocoDataset leaves out of an annotation file.

    Args:
        path (str): A file in COCO's format.
        category_ids (list[int], optional): Those of the dataset's classes.
            Defaults to None: all.
        filter_cfg (dict, optional): Of the dataset, in training. Defaults to
            None.

    Returns:
        Counter: How many, by what and why.

    Raises:
        DataError: If the file cannot be used.
    """
    contents = read_json(path)
    counts, annotation = Counter(), None
    try:
        images = {image['id']: image for image in contents['images']}
        if category_ids is None:
            category_ids = [item['id'] for item in contents['categories']]
        known, annotated = {*category_ids}, set()
        for annotation in contents['annotations']:
            image = images.get(annotation['image_id'])
            reason = _why_left_out(annotation, image, known)
            if reason:
                counts[f'annotations {reason}'] += 1
            if annotation['category_id'] in known:
                annotated.add(annotation['image_id'])
        annotation = None
        filter_cfg = filter_cfg or {}
        least = filter_cfg.get('min_size', 0)
        for image in images.values():
            if filter_cfg.get('filter_empty_gt') and (
                image['id'] not in annotated
            ):
                counts['images without annotations'] += 1
            elif min(image['width'], image['height']) < least:
                counts[f'images of less than {least} pixels'] += 1
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(annotation, dict):
            annotation.pop('segmentation', None)  # it may be long
        raise DataError(
            f'{path} is not in the format of COCO: '
            f'{type(error).__name__}: {error} '
            + shorten(str(annotation or ''), 200)
        ) from error
    if not images:
        raise DataError(f'{path} has no images')
    return counts


def _why_left_out(annotation, image, category_ids):
    if annotation.get('ignore'):
        return None  # as the file asks
    if image is None:
        return 'of images that are not listed'
    box = annotation['bbox']
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f'{box} is no [x, y, width, height]')
    mask = annotation.get('segmentation')
    size = [image['height'], image['width']]
    if isinstance(mask, dict) and mask.get('size', size) != size:
        raise ValueError(f'a mask of {mask["size"]} pixels, not {size}')
    if annotation['category_id'] not in category_ids:
        return f'of category {annotation["category_id"]}, which is no class'
    x, y, width, height = box
    if (
        annotation['area'] <= 0
        or width < 1
        or height < 1
        or min(x + width, image['width']) <= max(x, 0)
        or min(y + height, image['height']) <= max(y, 0)
    ):
        return 'with a box that is empty or outside the image'
    return None


def read_json(path: str):
    """Read a JSON file.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        problem = f'is cut off or no JSON file: {error}'
        if not os.path.getsize(path):
            problem = 'is empty'
        raise DataError(f'{path} {problem}') from error


# ---------------------------------------------------------------- datasets


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the files of datasets and evaluators exist.

    Args:
        cfg (Config): The config.
        splits (str): Any of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        DataError: If a file or folder is missing, with how to get it.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for key, dataset in _configs(loader, f'{split}_dataloader'):
            for path in _paths(dataset):
                if '://' not in path and not os.path.exists(path):
                    raise DataError(
                        f'data missing: {path} does not exist ({key}). '
                        + _help(dataset)
                    )
        evaluators = cfg.get(f'{split}_evaluator') or []
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        for evaluator in evaluators:
            path = evaluator.get('ann_file') or ''
            if path and '://' not in path and not os.path.isfile(path):
                raise DataError(
                    f'{split}_evaluator.ann_file {path} does not exist'
                )


def checked(runner_type: type) -> type:
    """Derive a runner class whose errors name the files of faulty data.

    Args:
        runner_type (type): ``Runner``, or another one that has its
            ``build_dataloader``.

    Returns:
        type: The class. It also logs what datasets leave out.
    """

    class CheckedRunner(runner_type):
        @classmethod
        def build_dataloader(cls, dataloader, *args, **kwargs):
            try:
                loader = super().build_dataloader(dataloader, *args, **kwargs)
            except Exception as error:
                _explain(dataloader, error)
                raise
            for dataset in _built(loader.dataset):
                if isinstance(dataset, BaseDataset):
                    _report(dataset)
                    dataset.pipeline = CheckedPipeline(dataset)
            return loader

    return CheckedRunner


def _explain(dataloader, error):
    """Raise `DataError` if data are why datasets could not be built."""
    paths = []
    for _, dataset in _configs(dataloader, ''):
        files = _paths(dataset)
        paths += files
        with DATASETS.switch_scope_and_registry(None) as registry:
            coco = _is_coco(registry.get(dataset.type))
        for file in files:
            if file.endswith('.json') and os.path.isfile(file):
                check_coco(file) if coco else read_json(file)
    where = ' and '.join(paths)
    empty = 'at least one array' in str(error)  # which numpy concatenates
    if empty or 'Found 0 files' in str(error):
        raise DataError(
            f'nothing to load in {where}: there are no images, or none has '
            'annotations of the classes of the dataset'
        ) from error
    if isinstance(error, ValueError):  # as for a line that lacks its label
        raise DataError(f'{where} cannot be loaded: {error}') from error


def _left_out(dataset):
    """Count what a dataset leaves out; returns (where, Counter)."""
    folder = dataset.data_prefix.get('seg_map_path')
    path = dataset.ann_file
    if _is_coco(type(dataset)) and os.path.isfile(path):
        filter_cfg = None if dataset.test_mode else dataset.filter_cfg
        return path, check_coco(path, dataset.cat_ids, filter_cfg)
    # mmseg takes the images that are in a folder.
    if folder and not path and hasattr(dataset, 'img_suffix'):
        images = Path(dataset.data_prefix['img_path'])
        suffix = dataset.seg_map_suffix
        names = [
            str(path.relative_to(folder)).removesuffix(suffix)
            for path in Path(folder).rglob(f'*{suffix}')
        ]
        missing = sum(
            not Path(images, name + dataset.img_suffix).exists()
            for name in names
        )
        return folder, Counter({'label maps without an image': missing})
    return '', Counter()


def _report(dataset):
    """Log what a dataset has left out."""
    where, counts = _left_out(dataset)
    left_out = (f'{n} {what}' for what, n in counts.most_common(8) if n)
    text = '; '.join(left_out)
    if text:
        print_log(f'{where}: left out {text}', 'current', logging.WARNING)


def _is_coco(dataset_type):
    """Whether a dataset reads and leaves out what CocoDataset does."""
    parse = getattr(dataset_type, 'parse_data_info', None)
    name = getattr(parse, '__qualname__', '')
    return name == 'CocoDataset.parse_data_info'


def _built(dataset):
    """The datasets in a dataset or wrapper."""
    inner = getattr(dataset, 'datasets', None) or [
        getattr(dataset, 'dataset', None)
    ]
    if inner == [None]:
        return [dataset]
    return [leaf for item in inner for leaf in _built(item)]


def _configs(config, key):
    """Yield (key, config) of the datasets in a dataloader or wrapper."""
    inner = {
        f'{key}.datasets.{i}': dataset
        for i, dataset in enumerate(config.get('datasets', []))
    }
    if 'dataset' in config:
        inner[f'{key}.dataset'] = config.dataset
    for inner_key, dataset in inner.items():
        yield from _configs(dataset, inner_key)
    if config and not inner:
        yield key, config


def _paths(dataset):
    if dataset.type in DOWNLOADED:
        return []
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or ''
    ann_file = dataset.get('ann_file') or ''
    if not prefix and 'ImageNet' in str(dataset.type):
        prefix = dataset.get('split', '')
        listed = f'meta/{prefix}.txt'  # which it reads if it is there
        if not ann_file and os.path.isfile(os.path.join(root, listed)):
            ann_file = listed
    prefixes = prefix.values() if isinstance(prefix, dict) else [prefix]
    names = [name for name in (*prefixes, ann_file) if name]
    return [os.path.join(root, name) for name in names or [''] if root or name]


def _help(dataset):
    root = (dataset.get('data_root') or 'its data_root').rstrip('/')
    for name, text in DATASET_HELP.items():
        if name in str(dataset.type):
            return text.format(root=root)
    return f'Put the {dataset.type} there or change the config.'
