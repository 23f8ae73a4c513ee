"""Checks of datasets, evaluators and models against each other.

Every check yields a `Finding` for each fault. Those of `CHECKS` and
`some_samples` are cheap, and run before every training and test;
`annotation_files` reads files anew, and is for ``tools/check_data.py``.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import zip_longest
from textwrap import shorten

import numpy as np
from mmengine.dataset import BaseDataset
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from .files import DataError, Finding, read_json

SAMPLES = 8  # that are loaded of every dataset before a run
# Parts of models whose classes are not those of the dataset.
OTHER_CLASSES = ('backbone', 'neck', 'rpn_head', 'semantic_head')
BROKEN = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass
class Split:
    """The datasets of a training or test, and what scores and learns them.

    Attributes:
        datasets (dict[str, Dataset]): By key of the config, wrapped ones too.
        metrics (list[tuple]): A name, the metric, and the datasets that it
            scores.
        model (nn.Module, optional): The model.
        trained (Sequence): The names that the model was trained on, as far
            as is known: see :func:`names_of`.
    """

    datasets: dict[str, Dataset]
    metrics: list[tuple] = field(default_factory=list)
    model: nn.Module | None = None
    trained: Sequence[Sequence[str]] = ()


def is_coco(dataset: Dataset) -> bool:
    """Whether a dataset reads and leaves out what CocoDataset does."""
    parse = getattr(dataset, 'parse_data_info', None)
    return getattr(parse, '__qualname__', '') == 'CocoDataset.parse_data_info'


# ---------------------------------------------------------------- classes


def class_names(split: Split) -> Iterator[Finding]:
    """Classes in another order or spelling than the categories of a file.

    pycocotools takes the categories whose names are classes, in the order of
    the file, and mmdet counts them through.
    """
    for dataset in split.datasets.values():
        categories = getattr(dataset, 'coco_categories', None)
        if categories and is_coco(dataset):
            yield from category_names(dataset.ann_file, categories, dataset)
    for name, _, api, datasets in _coco_metrics(split):
        categories = api.dataset['categories']
        yield from category_names(name, categories, datasets[0])


def category_names(
    file: str, categories: list[dict], dataset: Dataset
) -> Iterator[Finding]:
    """Classes of a dataset in another order or spelling than categories."""
    classes = _classes(dataset) or ()
    every = [category['name'] for category in categories]
    repeated = [*repeated_names(file, categories, classes)]
    if repeated:
        yield from repeated
        return
    names = [name for name in every if name in classes]
    for label, (own, name) in enumerate(zip_longest(names, classes)):
        if own == name:
            continue
        if name is None or name in every:
            yield Finding(
                file,
                'has its categories in another order than the classes',
                f'label {label} is {own!r} in it and {name!r} in the config',
                'predictions get the names of others',
            )
            return
        others = {n.lower(): n for n in every if n not in classes}
        near = get_close_matches(name.lower(), others, n=1)
        is_it = ''.join(f'; is it {others[n]!r} there?' for n in near)
        yield Finding(
            file,
            'has no category for a class',
            f'{name!r}{is_it}',
            'later classes get labels of earlier ones'
            if own
            else 'nothing is learned of it',
            # Those at the end shift no others.
            fault=bool(own or near),
        )
        return


def repeated_names(
    file: str, categories: list[dict], classes: Sequence[str]
) -> Iterator[Finding]:
    """Classes that several categories have the name of."""
    for name in dict.fromkeys(classes):
        ids = [c['id'] for c in categories if c['name'] == name]
        if len(ids) > 1:
            yield Finding(
                file,
                'has several categories of one name',
                f'{name!r}: {", ".join(map(str, ids))}',
                'MMDetection makes a class of each; remove those without '
                'annotations, or give them other names',
            )


def names_of(dataset: Dataset) -> tuple[Sequence[str], Sequence[str]]:
    """The classes and the folders that labels are numbers of, if any."""
    folders = getattr(dataset, 'folder_to_idx', None) or {}
    return _classes(dataset) or (), [*folders]


def _classes(dataset: Dataset) -> Sequence[str] | None:
    return getattr(dataset, 'metainfo', {}).get('classes')


def folder_names(split: Split) -> Iterator[Finding]:
    """Classes in another order than folders of their names.

    mmpretrain makes labels of the folders, in the order of the alphabet.
    """
    for key, dataset in split.datasets.items():
        classes, folders = names_of(dataset)
        yield from _moved(
            Finding(
                key,
                'has its folders in another order than the classes',
                effect='labels get the names of others',
            ),
            classes,
            folders,
        )


def trained_classes(split: Split) -> Iterator[Finding]:
    """Classes, or folders of them, in another order than in training."""
    if _reads_names(split.model):
        return
    for key, dataset in split.datasets.items():
        finding = Finding(
            key,
            'has its classes in another order than the training',
            effect='predictions are scored as others',
        )
        # Of a checkpoint, only classes are known.
        for names in zip(names_of(dataset), split.trained, strict=False):
            yield from _moved(finding, *names)


def _moved(
    finding: Finding, classes: Sequence[str], others: Sequence[str]
) -> Iterator[Finding]:
    """The first class that is another one of the others; names may differ."""
    labels = {name: label for label, name in enumerate(others)}
    for label, name in enumerate(classes):
        if labels.get(name, label) != label:
            entry = f'{name!r} is label {label}, and {labels[name]} there'
            yield finding._replace(entry=entry)
            return


def _reads_names(model: nn.Module | None) -> bool:
    """Whether a model reads the names of classes, and takes any."""
    texts = 'language_model', 'text_encoder'
    modules = model.named_modules() if model else ()
    return any(name.endswith(texts) for name, _ in modules)


def head_classes(split: Split) -> Iterator[Finding]:
    """Heads for more or fewer classes than a dataset has."""
    if _reads_names(split.model):
        return
    modules = dict(split.model.named_modules()) if split.model else {}
    if modules:
        modules['model'] = modules.pop('')  # last: it repeats its head's
    for key, dataset in split.datasets.items():
        count = len(_classes(dataset) or ())
        if not count:
            continue
        things = dataset.metainfo.get('thing_classes')
        allowed = {count, len(things or range(count))}
        for name, module in modules.items():
            number = getattr(module, 'num_classes', None)
            if (
                type(number) is not int
                or number in allowed
                or any(part in name for part in OTHER_CLASSES)
                or hasattr(module, 'boundary_threshold')  # mmseg's STDCHead
                or (getattr(module, 'out_channels', 0) == 1 and count < 3)
            ):
                continue
            more = number > count
            yield Finding(
                key,
                f'has {"fewer" if more else "more"} classes than a head',
                f'{count}, and {name}.num_classes is {number}',
                'a prediction of the others ends an evaluation, or has no name'
                if more
                else 'labels beyond the head are an error, or background',
            )


# -------------------------------------------------------------- evaluators


def _coco_metrics(split: Split) -> Iterator[tuple]:
    """Those that score by COCO's files: name, metric, API, datasets."""
    for name, metric, datasets in split.metrics:
        api = getattr(metric, '_coco_api', None)
        scores = hasattr(metric, 'metrics') and not metric.format_only
        if api and scores and datasets:
            yield name, metric, api, datasets


def evaluated_images(split: Split) -> Iterator[Finding]:
    """Evaluators whose file lists other images than the dataset has."""
    for name, _, api, datasets in _coco_metrics(split):
        paths = {
            info['img_id']: info['img_path']
            for dataset in datasets
            if isinstance(dataset, BaseDataset)
            for info in map(dataset.get_data_info, range(len(dataset)))
            if 'img_id' in info
        }
        for i, path in paths.items():
            if i not in api.imgs:
                yield Finding(
                    name,
                    'does not list images of the dataset',
                    f'image {i}, {path}',
                    'the evaluation ends with an AssertionError',
                )
                continue
            listed = api.imgs[i].get('file_name', path)
            if os.path.basename(listed) != os.path.basename(path):
                yield Finding(
                    name,
                    'lists other images than the dataset, under their ids',
                    f'image {i}: {listed}, and {path}',
                    'predictions are scored for another image',
                )


def evaluated_annotations(split: Split) -> Iterator[Finding]:
    """Annotations on which COCO's evaluation fails, or errs."""
    for name, metric, api, datasets in _coco_metrics(split):
        if not api.anns:
            yield Finding(
                name,
                'has no annotations',
                effect='all scores are -1',
                fault='annotations' in api.dataset,  # COCO's tests have none
            )
        classes = {*(_classes(datasets[0]) or ())}
        known = {c['id'] for c in api.cats.values() if c['name'] in classes}
        masks = 'segm' in metric.metrics
        for annotation in api.anns.values():
            if annotation.get('category_id') in known:
                entry = f'annotation {annotation["id"]!r}'
                for what, effect in _unscorable(annotation, masks):
                    yield Finding(name, what, entry, effect)


def _unscorable(annotation: dict, masks: bool) -> Iterator[tuple[str, str]]:
    number = annotation['id']
    if not isinstance(number, int | float):
        yield 'has ids that are no numbers', 'the evaluation ends in an error'
    elif number == 0:
        yield (
            'has an annotation with the id 0',
            'COCO takes 0 for no match: a perfect prediction scores 0',
        )
    if 'iscrowd' not in annotation:
        yield (
            'has annotations without iscrowd',
            "the evaluation ends with KeyError: 'iscrowd'",
        )
    if masks and not _is_mask(annotation.get('segmentation')):
        yield (
            'has annotations without a mask, or polygons of one or two points',
            'the evaluation of masks ends in an error',
        )


def _is_mask(mask: list | dict | None) -> bool:
    """Whether pycocotools reads a segmentation as a mask."""
    # By the length of the first polygon it tells polygons from boxes.
    return isinstance(mask, dict) or bool(mask and len(mask[0]) > 4)


# -------------------------------------------------------------- label maps


def two_class_masks(split: Split) -> Iterator[Finding]:
    """Masks of 0 and 255 where there are two classes; 255 is ignored."""
    for dataset in split.datasets.values():
        folder = getattr(dataset, 'data_prefix', {}).get('seg_map_path')
        ignored = getattr(dataset, 'ignore_index', None)
        if ignored is None or not folder or len(_classes(dataset) or ()) != 2:
            continue
        steps = dataset.pipeline.transforms
        if not any(hasattr(step, '_load_seg_map') for step in steps):
            continue
        seen = set()
        for i in range(len(dataset)):
            with suppress(Exception):  # for other checks
                sample = dataset.pipeline.load(dataset.get_data_info(i))
                seen |= {*np.unique(sample['gt_seg_map']).tolist()}
            if 1 in seen:
                break
        if ignored in seen and 1 not in seen:
            yield Finding(
                folder,
                'has label maps without class 1',
                f'their labels are {", ".join(map(str, sorted(seen)))}',
                f'{ignored} is ignored, and class 1 never learned; a mask of '
                '0 and 255 needs the numbers of classes instead',
            )


def some_samples(split: Split) -> Iterator[Finding]:
    """Faults of samples that are far from each other."""
    for dataset in split.datasets.values():
        if isinstance(dataset, BaseDataset):
            last = len(dataset) - 1
            for i in {*np.linspace(0, last, SAMPLES).astype(int).tolist()}:
                yield from sample_faults(dataset, i)


def sample_faults(
    dataset: BaseDataset, i: int, seen: set | None = None
) -> list[Finding]:
    """The fault of a sample, if it has one.

    Args:
        dataset (BaseDataset): With a `CheckedPipeline`.
        i (int): The index of the sample.
        seen (set, optional): Gets the labels of which something is learned;
            with it, there are notes too. Defaults to None.
    """
    try:
        sample = dataset.pipeline.load(dataset.get_data_info(i))
        if seen is None:
            return []
        seen.update(_labels(sample))
        return [*_read_otherwise(sample)]
    except DataError as error:
        return [error.finding]
    except Exception:  # it may need steps that are not run
        return []


def _read_otherwise(sample: dict) -> Iterator[Finding]:
    """Notes on an image that is read otherwise than its file shows it."""
    pixels, path = sample['img'], sample['img_path']
    with Image.open(path) as image:
        stored = str(image.tile)  # as in 'RGB;16B'; what is next may load it
        turned = image.getexif().get(0x0112, 1)
    if ';16' in stored and pixels.dtype == np.uint8:
        yield Finding(
            path,
            'has 16 bits a channel',
            effect="8 are read, unless color_type is 'unchanged'",
            fault=False,
        )
    # Other turns show in the size, for which there is an error.
    same = turned in (2, 3, 4) or pixels.shape[0] == pixels.shape[1]
    if turned > 1 and same and {'gt_bboxes', 'gt_seg_map'} & sample.keys():
        yield Finding(
            path,
            'is turned by its EXIF orientation',
            f'orientation {turned}',
            'boxes and label maps have to be of what is turned, but with '
            "color_type='unchanged', which reads it as it is",
            fault=False,
        )


def _labels(sample: dict) -> list[int]:
    ignored = np.asarray(sample.get('gt_ignore_flags', ()), bool)
    boxes = np.asarray(sample.get('gt_bboxes_labels', ()))[~ignored]
    others = [sample.get(key, ()) for key in ('gt_label', 'gt_seg_map')]
    return [i for found in (boxes, *others) for i in np.unique(found).tolist()]


def unseen_classes(split: Split, seen: set) -> Iterator[Finding]:
    """Classes that no sample of a training has."""
    classes = {
        label: (key, name)
        for key, dataset in split.datasets.items()
        for label, name in enumerate(_classes(dataset) or ())
    }
    for label, (key, name) in classes.items() if seen else ():
        if label not in seen:
            yield Finding(
                key,
                'has nothing of a class, but maybe crowds',
                repr(name),
                'nothing is learned of it',
                fault=False,
            )


# -------------------------------------------------------- whole files


def annotation_files(split: Split) -> Iterator[Finding]:
    """Faults of files in COCO's format, and what mmdet leaves out."""
    for dataset in split.datasets.values():
        if is_coco(dataset) and os.path.isfile(dataset.ann_file):
            yield from annotation_file(
                dataset.ann_file,
                dataset.cat_ids,
                {} if dataset.test_mode else dataset.filter_cfg,
                any(
                    getattr(step, 'poly2mask', True) is False
                    for step in dataset.pipeline.transforms
                ),
            )


def annotation_file(
    path: str,
    category_ids: list[int] | None = None,
    filter_cfg: dict | None = None,
    polygons: bool = False,
) -> Iterator[Finding]:
    """Faults of a file in COCO's format, and what mmdet leaves out.

    Args:
        path (str): The file.
        category_ids (list[int], optional): Those of the dataset's classes.
            Defaults to None: all.
        filter_cfg (dict, optional): Of the dataset, in training.
        polygons (bool): Whether other masks are left out, as where
            LoadAnnotations has ``poly2mask=False``. Defaults to False.

    Raises:
        DataError: If the file cannot be read.
    """
    contents = read_json(path)
    filter_cfg = filter_cfg or {}
    try:
        images = {image['id']: image for image in contents['images']}
        known = {item['id'] for item in contents['categories']}
        if category_ids is not None:
            known = {*category_ids}
        annotations = contents.get('annotations', [])  # tests have none
        yield from _repeated(path, 'image', contents['images'])
        if not images:
            yield Finding(path, 'has no images')
        annotated, boxes = set(), {i: [] for i in images}
        for annotation in annotations:
            try:
                entry = f'annotation {annotation["id"]!r}'
                what = _why_left_out(annotation, images, known, polygons)
                if annotation['category_id'] in known:
                    annotated.add(annotation['image_id'])
                if not what:
                    boxes.get(annotation['image_id'], []).append(
                        [annotation['category_id'], *annotation['bbox']]
                    )
                    yield from _misplaced(path, annotation, images, entry)
            except BROKEN as error:
                # Without the mask, which may be long
                where = shorten(f'{dict(annotation, segmentation=...)}', 200)
                yield _not_coco(path, error, f' in {where}')
                continue
            if what:
                yield _left_out(path, what, entry)
        yield from _repeated(path, 'annotation', annotations)
        yield from _repeated_files(path, images, boxes)
        least = filter_cfg.get('min_size', 0)
        for i, image in images.items():
            what = None
            if min(image['width'], image['height']) < least:
                what = f'images of less than {least} pixels'
            if filter_cfg.get('filter_empty_gt') and i not in annotated:
                what = 'images without annotations'
            if what:
                yield _left_out(path, what, f'image {i}')
    except BROKEN as error:
        yield _not_coco(path, error)


def _not_coco(path: str, error: Exception, where: str = '') -> Finding:
    return Finding(
        path,
        'is not in the format of COCO',
        f'{type(error).__name__}: {error}{where}',
    )


def _left_out(path: str, what: str, entry: str) -> Finding:
    effect = 'MMDetection leaves them out'
    return Finding(path, f'has {what}', entry, effect, fault=False)


def _repeated(path: str, kind: str, entries: list[dict]) -> Iterator[Finding]:
    for i, count in Counter(entry['id'] for entry in entries).items():
        if count > 1:
            yield Finding(
                path,
                f'has several {kind}s with one id',
                f'{kind} {i!r}',
                'only the last of them is kept, or mmdet stops',
            )


def _repeated_files(
    path: str, images: dict[int, dict], boxes: dict[int, list]
) -> Iterator[Finding]:
    """Images that are listed several times, with other objects each."""
    first = {}
    for i, image in images.items():
        name = image.get('file_name', i)  # LVIS has addresses in their place
        other = first.setdefault(name, i)
        if sorted(boxes[other]) != sorted(boxes[i]):
            yield Finding(
                path,
                'lists a file as several images, with other objects each',
                f'images {other!r} and {i!r}, {name}',
                'objects of one are background in the other',
            )


def _misplaced(
    path: str, annotation: dict, images: dict[int, dict], entry: str
) -> Iterator[Finding]:
    """Boxes that reach out of their images, and masks out of their boxes."""
    image = images.get(annotation['image_id'])
    if image is None or annotation.get('ignore'):
        return
    x, y, width, height = annotation['bbox']
    right, bottom = x + width, y + height
    beyond = max(right - image['width'], bottom - image['height'], -x, -y)
    if beyond > 1:  # of a rounded one
        yield Finding(
            path,
            'has boxes that reach beyond their image',
            entry,
            'they are cut at its edge in training, and not in an evaluation; '
            'boxes are [x, y, width, height]',
            fault=False,
        )
    mask = annotation.get('segmentation')
    if _is_mask(mask):
        left, top, width, height = _bounds(mask)
        inside = max(min(right, left + width) - max(x, left), 0)
        inside *= max(min(bottom, top + height) - max(y, top), 0)
        if 2 * inside < width * height:
            yield Finding(
                path,
                'has masks that are not in their boxes',
                entry,
                'of a mask, what is in the box is learned',
            )


def _bounds(mask: list | dict) -> list[float]:
    """The box around a mask: left, top, width and height."""
    if isinstance(mask, list):
        xs, ys = ([v for part in mask for v in part[k::2]] for k in (0, 1))
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    from pycocotools import mask as coco_masks

    if isinstance(mask['counts'], list):
        mask = coco_masks.frPyObjects(mask, *mask['size'])
    return coco_masks.toBbox(mask).tolist()


def _why_left_out(
    annotation: dict,
    images: dict[int, dict],
    known: set[int],
    polygons: bool,
) -> str | None:
    """The annotations that mmdet leaves out as it does this one, if it does.

    Raises:
        Exception: One of ``BROKEN``, if it is not in the format.
    """
    if annotation.get('ignore'):
        return None  # as the file asks
    image = images.get(annotation['image_id'])
    if image is None:
        return 'annotations of images that are not listed'
    x, y, width, height = box = annotation['bbox']
    if not all(map(math.isfinite, box)):
        raise ValueError(f'{box} is no [x, y, width, height]')
    mask = annotation.get('segmentation')
    size = [image['height'], image['width']]
    if isinstance(mask, dict) and [*mask.get('size', size)] != size:
        raise ValueError(f'a mask of {mask["size"]} pixels, not {size}')
    category = annotation['category_id']
    if category not in known:
        return f'annotations of category {category}, which is no class'
    if annotation['area'] <= 0:
        return 'annotations of area 0'
    if width < 1 or height < 1:
        return 'annotations with a box of less than a pixel'
    if min(x + width, image['width']) <= max(x, 0) or (
        min(y + height, image['height']) <= max(y, 0)
    ):
        return 'annotations with a box outside the image'
    if mask and not annotation.get('iscrowd'):
        if isinstance(mask, dict):
            if polygons:
                return 'annotations with a mask that is no polygon'
        elif not any(len(p) >= 6 and len(p) % 2 == 0 for p in mask):
            return (
                'annotations without a polygon of three whole points or more, '
                'where masks are learned'
            )
    return None


CHECKS = (
    class_names,
    folder_names,
    trained_classes,
    head_classes,
    evaluated_images,
    evaluated_annotations,
    two_class_masks,
)
