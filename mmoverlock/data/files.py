"""Image files, label maps and JSON files, one at a time."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import mmcv
import numpy as np
from mmengine.dataset import BaseDataset, Compose
from PIL import Image


class Finding(NamedTuple):
    """A fault of data, or a remark.

    Attributes:
        file (str): The file, or the key of the config.
        what (str): What it is or has, equal for all findings of a kind.
        entry (str): Which of its entries, and the values.
        effect (str): What it does to a training.
        fault (bool): Whether it breaks or misleads a training. Else it is
            left out or changed in silence, or nothing is there to learn.
    """

    file: str
    what: str
    entry: str = ''
    effect: str = ''
    fault: bool = True

    def __str__(self) -> str:
        entry = self.entry and f' ({self.entry})'
        effect = self.effect and f': {self.effect}'
        return f'{self.file} {self.what}{entry}{effect}'.strip()


class DataError(ValueError):
    """Data that cannot be used; the message names the file.

    Args:
        finding (Finding | str): Why. A worker process passes the message on,
            at the end of a traceback.
    """

    def __init__(self, finding: Finding | str):
        super().__init__(str(finding))
        if isinstance(finding, str):
            finding = Finding('', finding)
        self.finding = finding

    def __str__(self) -> str:
        return super().__str__().rpartition('DataError: ')[2].strip()


def find(
    folder: Path, endings: str | tuple[str, ...], apart: Iterable[Path] = ()
) -> list[Path]:
    """Find the files of some endings in a folder and in those below it.

    Links are followed, but not back to a folder that they are in.

    Args:
        folder (Path): Where to start.
        endings (str | tuple[str, ...]): In lower case; those of files may be
            in upper.
        apart (Iterable[Path]): Folders that are left out below it.
    """
    found = []
    above = {str(folder): {os.path.realpath(p) for p in (folder, *apart)}}
    for root, below, names in os.walk(folder, followlinks=True):
        known = above.pop(root)
        paths = {name: os.path.join(root, name) for name in sorted(below)}
        reals = {name: os.path.realpath(path) for name, path in paths.items()}
        below[:] = [name for name in paths if reals[name] not in known]
        above |= {paths[name]: known | {reals[name]} for name in below}
        found += [
            Path(root, name)
            for name in sorted(names)
            if name.lower().endswith(endings)
        ]
    return found


def raise_first(findings: Iterable[Finding]) -> None:
    """Raise `DataError` at the first fault."""
    for finding in findings:
        if finding.fault:
            raise DataError(finding)


class CheckedPipeline(Compose):
    """The pipeline of a dataset, with errors that name the sample's files.

    Images that are cut off, images and label maps of another size than
    annotated, and labels that are no class are errors too.

    Args:
        dataset (BaseDataset): The dataset.
    """

    def __init__(self, dataset: BaseDataset):
        super().__init__(dataset.pipeline.transforms)
        self.classes = len(dataset.metainfo.get('classes') or ())
        self.ignored = getattr(dataset, 'ignore_index', None)  # mmseg has it

    def __call__(self, data: dict) -> dict | None:
        return self._run(self.transforms, data)

    def load(self, data: dict) -> dict | None:
        """Only load a sample, without what changes or packs it."""
        return self._run(filter(_loads, self.transforms), data)

    def _run(self, steps: Iterable[Callable], data: dict) -> dict | None:
        files = [data.get('img_path'), data.get('seg_map_path')]
        files = [file for file in files if isinstance(file, str)]
        size = data.get('height'), data.get('width')
        step = None
        try:
            # Whether it needs the files, the pipeline knows.
            with suppress(OSError):
                for file in files:
                    _check_end(file)
            if 'gt_label' in data:
                labels = np.asarray(data['gt_label'])
                raise_first(self._unknown_labels(labels, files))
            for step in steps:
                labeled = 'gt_seg_map' in data
                data = step(data)
                if data is None:
                    return None
                if _loads(step):
                    raise_first(_other_size(data, files, size))
                    if 'gt_seg_map' in data and not labeled:
                        raise_first(self._label_map(data, files))
        except DataError:
            raise
        except Exception as error:
            for file in files:
                check_image(file)
            if not files:
                raise
            raise RuntimeError(
                f'the pipeline fails for {" and ".join(files)}, in '
                f'{type(step).__name__}: {type(error).__name__}: {error}'
            ) from error
        return data

    def _label_map(self, data: dict, files: list[str]) -> Iterator[Finding]:
        labels, shape = data['gt_seg_map'], data.get('ori_shape')
        path = files[-1]
        if labels.ndim > 2:
            yield Finding(
                path,
                'is a label map of several channels',
                f'of shape {labels.shape}',
                'MMSegmentation reads one number a pixel, from images of one '
                'channel or with a palette',
            )
        if shape and labels.shape != shape:
            yield Finding(
                path,
                'has another size than its image',
                f'{_size(labels.shape)} pixels, and {_size(shape)} of '
                f'{files[0]}',
            )
        if labels.dtype == np.uint8:
            with suppress(OSError), Image.open(path) as image:
                # Modes of more than 8 bits
                if image.mode[0] in 'IF' and np.max(image) > 255:
                    yield Finding(
                        path,
                        'has labels beyond 255',
                        f'{np.max(image)}',
                        'MMSegmentation keeps 8 bits, so that 256 becomes 0',
                    )
        if self.ignored is not None:
            yield from self._unknown_labels(labels, files)

    def _unknown_labels(
        self, labels: np.ndarray, files: list[str]
    ) -> Iterator[Finding]:
        if not self.classes or labels.dtype.kind not in 'iu':
            return
        unknown = (labels >= self.classes) & (labels != self.ignored)
        if unknown.any():
            yield Finding(
                files[-1],
                'has a label that is no class',
                f'{labels[unknown].max()}; those of the {self.classes} '
                f'classes are from 0 to {self.classes - 1}',
            )


def _loads(step: Callable) -> bool:
    return type(step).__name__.startswith('Load')


def _size(shape: Sequence[int]) -> str:
    return f'{shape[1]} x {shape[0]}'


def _other_size(
    data: dict, files: list[str], size: tuple
) -> Iterator[Finding]:
    shape = data.get('ori_shape')
    if None not in size and shape and tuple(shape) != size:
        yield Finding(
            files[0],
            'has another size than annotated',
            f'{_size(shape)} pixels as loaded, annotated as {_size(size)}',
            'resized, or turned by its EXIF orientation: boxes and masks '
            'land elsewhere',
        )


def _check_end(path: str) -> None:
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
        raise DataError(Finding(path, 'is cut off: a JPEG without its end'))


def check_image(path: str) -> None:
    """Raise `DataError` if a file is missing, or an image that is damaged."""
    if '://' in path:
        return
    if not os.path.exists(path):
        raise DataError(Finding(path, 'does not exist'))
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in Image.registered_extensions():
        return
    try:
        with Image.open(path) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can fail in any way
        if cv2.imread(path, cv2.IMREAD_UNCHANGED) is None:
            with suppress(Exception):  # it may not be installed
                mmcv.imread(path, 'unchanged', backend='tifffile')
                return
            raise DataError(
                Finding(path, 'is damaged or no image', str(error))
            ) from error


def read_json(path: str) -> Any:
    """Read a JSON file; raise `DataError` if it is empty or damaged."""
    try:
        with open(path, 'rb') as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        if not os.path.getsize(path):
            raise DataError(Finding(path, 'is empty')) from error
        raise DataError(
            Finding(path, 'is cut off or no JSON file', str(error))
        ) from error
