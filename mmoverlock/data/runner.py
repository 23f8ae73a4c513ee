"""Runners that check their data."""

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..checkpoint import dataset_meta
from .checks import (
    CHECKS,
    Split,
    annotation_file,
    category_names,
    is_coco,
    names_of,
    some_samples,
    trained_classes,
)
from .config import evaluators, unwrap
from .files import CheckedPipeline, DataError, raise_first, read_json


def make_split(
    cfg: Config,
    name: str,
    dataset: Dataset,
    evaluator: Evaluator | None,
    model: nn.Module | None,
    trained: Sequence[Sequence[str]] = (),
) -> Split:
    """Collect what a `Split` of train, val or test has."""
    datasets = dict(unwrap(dataset, f'{name}_dataloader.dataset'))
    metrics = []
    built = evaluator.metrics if evaluator else []
    configs = zip(evaluators(cfg, name), built, strict=False)  # tools add some
    for (key, config), metric in configs:
        scored = [*datasets.values()]
        if hasattr(evaluator, 'dataset_prefixes'):  # one metric for each
            scored = scored[len(metrics) : len(metrics) + 1]
        file = f'{key}.ann_file {config.get("ann_file")}'
        metrics.append((file, metric, scored))
    return Split(datasets, metrics, model, trained)


class CheckData(Hook):
    """Runs the cheap checks before training and testing."""

    def before_run(self, runner: Runner) -> None:
        """Raise `DataError` at the first fault of what is built."""
        trained = ()
        for name in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{name}_loop')
            if isinstance(loop, BaseLoop):
                split = make_split(
                    runner.cfg,
                    name,
                    loop.dataloader.dataset,
                    getattr(loop, 'evaluator', None),
                    runner.model,
                    trained,
                )
                for check in (*CHECKS, some_samples):
                    raise_first(check(split))
                trained = trained or names_of(
                    next(iter(split.datasets.values()))
                )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Raise `DataError` if a test has moved the classes of a training."""
        loop = runner._test_loop
        if isinstance(loop, BaseLoop):
            classes = dataset_meta(checkpoint).get('classes') or ()
            split = make_split(
                runner.cfg,
                'test',
                loop.dataloader.dataset,
                None,
                runner.model,
                [classes],
            )
            raise_first(trained_classes(split))


def checked(runner_type: type) -> type:
    """Derive a runner class whose errors name the files of faulty data.

    ``runner_type`` is mmengine's, or one that has its ``build_dataloader``.
    """

    class CheckedRunner(runner_type):
        @classmethod
        def build_dataloader(
            cls, dataloader: DataLoader | dict, *args: Any, **kwargs: Any
        ) -> DataLoader:
            try:
                with _kept_categories() as kept:
                    loader = super().build_dataloader(
                        dataloader, *args, **kwargs
                    )
            except Exception as error:
                _explain(error)
                raise
            for _, dataset in unwrap(loader.dataset):
                if isinstance(dataset, BaseDataset):
                    dataset.coco_categories = kept.get(dataset.ann_file)
                    dataset.pipeline = CheckedPipeline(dataset)
            return loader

    return CheckedRunner


@contextmanager
def _kept_categories() -> Iterator[dict]:
    """Keep the categories of COCO's files, which mmdet reads and drops."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        yield {}
        return
    kept, init = {}, COCO.__init__

    def read(self: COCO, annotation_file: str | None = None) -> None:
        init(self, annotation_file)
        kept[annotation_file] = self.dataset.get('categories')

    COCO.__init__ = read
    try:
        yield kept
    finally:
        COCO.__init__ = init


def _explain(error: Exception) -> None:
    """Raise `DataError` if data are why a dataset could not be loaded."""
    dataset, is_empty = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get('self')
        if frame.f_code.co_name == 'full_init':
            dataset = owner
        elif frame.f_code.co_name == '_serialize_data':
            is_empty = not owner.data_list
    if not isinstance(dataset, BaseDataset):
        return
    path = dataset.ann_file
    if path.endswith('.json') and os.path.isfile(path):
        contents = read_json(path)
        if is_coco(dataset):
            raise_first(annotation_file(path))
            categories = contents['categories']
            raise_first(category_names(path, categories, dataset))
    where = ' and '.join(filter(None, [*dataset.data_prefix.values(), path]))
    if is_empty:
        raise DataError(
            f'nothing to load in {where}: there are no images, or none has '
            'annotations of the classes of the dataset'
        ) from error
    # As for a line that lacks its label, or a folder without images.
    if isinstance(error, ValueError | RuntimeError):
        raise DataError(f'{where} cannot be loaded: {error}') from error
