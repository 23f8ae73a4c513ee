"""The datasets and evaluators of a config, before they are built."""

import os
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict
from torch.utils.data import Dataset

from .files import DataError

# By a part of the dataset type: what to unpack, and the layout to draw.
SOURCES = {
    'Coco': (
        'train2017.zip, val2017.zip and annotations_trainval2017.zip from '
        'https://cocodataset.org/#download',
        'coco',
    ),
    'ADE20K': (
        'ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu',
        'ade20k',
    ),
    'ImageNet': ('ILSVRC2012 from https://image-net.org', 'imagenet'),
}

# mmpretrain downloads these where they are missing.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


def check_data(cfg: Config, *splits: str) -> None:
    """Check that the files of datasets and evaluators exist.

    Splits are any of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        DataError: If a file or folder is missing, with how to get it, or
            classes are a text, whose letters would be taken for names.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        where = f'{split}_dataloader.dataset'
        for key, dataset in unwrap(loader.get('dataset'), where):
            for path in _paths(dataset):
                if '://' not in path and not os.path.exists(path):
                    raise DataError(
                        f'data missing: {path} does not exist ({key}). '
                        + _help(dataset)
                    )
            metainfo = dataset.get('metainfo') or {}
            for classes in (metainfo.get('classes'), dataset.get('classes')):
                if isinstance(classes, str) and not os.path.isfile(classes):
                    raise DataError(
                        f'{key}: the classes {classes!r} are no file of names,'
                        f' and no list; a tuple of one is ({classes!r},)'
                    )
        for key, evaluator in evaluators(cfg, split):
            path = evaluator.get('ann_file') or ''
            if path and '://' not in path and not os.path.isfile(path):
                raise DataError(f'{key}.ann_file {path} does not exist')


def unwrap(
    dataset: Dataset | ConfigDict | None, key: str = 'dataset'
) -> Iterator[tuple[str, Any]]:
    """The datasets in wrappers, such as those of a ``ConcatDataset``.

    Args:
        dataset (Dataset | ConfigDict | None): A dataset, or the config of one.
        key (str): Where it is in a config.

    Yields:
        tuple[str, Dataset | ConfigDict]: Where one that wraps no other is.
    """
    dataset = getattr(dataset, '_dataset', dataset)  # what mmengine slices
    one = getattr(dataset, 'dataset', None)
    several = getattr(dataset, 'datasets', None) or ()
    for i, inner in enumerate(several):
        yield from unwrap(inner, f'{key}.datasets.{i}')
    if one is not None:
        yield from unwrap(one, f'{key}.dataset')
    elif dataset is not None and not several:
        yield key, dataset


def evaluators(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """Yield the metrics of an evaluator: their keys and configs."""
    key = f'{split}_evaluator'
    found = cfg.get(key) or []
    if 'metrics' in found:  # of an evaluator of a type of its own
        key, found = f'{key}.metrics', found['metrics']
    if isinstance(found, dict):
        yield key, found
    else:
        yield from ((f'{key}.{i}', item) for i, item in enumerate(found))


def name_of(kind: type | str) -> str:
    """The name of a type, which a config has as a name, path or class."""
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def _paths(dataset: ConfigDict) -> list[str]:
    kind = name_of(dataset['type'])
    if kind in DOWNLOADED:
        return []
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or ''
    ann_file = dataset.get('ann_file') or ''
    if not prefix and 'ImageNet' in kind:
        prefix = dataset.get('split', '')
        listed = f'meta/{prefix}.txt'  # which it reads if it is there
        if not ann_file and os.path.isfile(os.path.join(root, listed)):
            ann_file = listed
    prefixes = prefix.values() if isinstance(prefix, dict) else [prefix]
    names = [name for name in (*prefixes, ann_file) if name]
    return [os.path.join(root, name) for name in names or [''] if root or name]


def _help(dataset: ConfigDict) -> str:
    kind = name_of(dataset['type'])
    root = (dataset.get('data_root') or 'its data_root').rstrip('/')
    own = (dataset.get('metainfo') or {}).get('classes')
    change = (
        'change the config, whose paths start in the folder that the tool is '
        'run in'
    )
    for name, (source, layout) in SOURCES.items():
        if name in kind and not (own and os.path.exists(root)):
            get = (
                change.capitalize() if own else f'Unpack {source} into {root}'
            )
            return (
                f'{get}, or draw sample data: '
                f'python tools/make_sample_data.py {layout} {root}'
            )
    return f'Put the {kind} there or {change}'
