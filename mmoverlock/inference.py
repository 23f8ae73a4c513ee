"""Trained models on images of the user, as all tools run them."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from glob import glob
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import (
    DATASETS,
    MODELS,
    TRANSFORMS,
    VISUALIZERS,
    Registry,
    init_default_scope,
)
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from PIL import Image
from torch import Tensor, nn

from .checkpoint import dataset_meta as checkpoint_meta
from .checkpoint import read
from .data import unwrap
from .data.files import find
from .models.weights import fit

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.mkv', '.mov', '.mp4', '.webm')
# By package of models
VISUALIZERS_OF = {
    'mmdet': 'DetLocalVisualizer',
    'mmseg': 'SegLocalVisualizer',
    'mmpretrain': 'UniversalVisualizer',
}


class ConfigError(ValueError):
    """A config that lacks what inference needs; the message says what."""


class UnreadableImage(ValueError):
    """A file that cannot be read as an image; the message says why."""


# ------------------------------------------------------------------- configs


def scope_of(cfg: Config) -> str | None:
    """The package that a config is for, if that can be told.

    It is the ``default_scope`` or, where there is none because types are
    classes, the one of ``VISUALIZERS_OF`` that the model is from.
    """
    scope = cfg.get('default_scope')
    kind = (cfg.get('model') or {}).get('type')
    if scope or not kind or (isinstance(kind, str) and '.' not in kind):
        return scope
    bases = getattr(_class_of(MODELS, kind), '__mro__', ())
    packages = [base.__module__.split('.')[0] for base in bases]
    return next((name for name in packages if name in VISUALIZERS_OF), None)


def dataset_of(cfg: Config, *splits: str) -> ConfigDict | None:
    """The config of the first dataset that there is, wrapped as it is.

    Splits are any of ``'train'``, ``'val'`` and ``'test'``; where the config
    has none of them, it is None.
    """
    loaders = (cfg.get(f'{split}_dataloader') or {} for split in splits)
    return next(filter(None, (item.get('dataset') for item in loaders)), None)


def dataset_meta(cfg: Config) -> dict:
    """The classes of a config, and other metadata.

    It is the ``metainfo`` of the test set, else of the validation set, else
    of the training set; empty if that does not name its classes.

    Raises:
        ConfigError: If a file of classes does not exist.
    """
    init_default_scope(scope_of(cfg))
    datasets = unwrap(dataset_of(cfg, 'test', 'val', 'train'))
    metas = (_meta_of(dataset) for _, dataset in datasets)
    return next((meta for meta in metas if meta.get('classes')), {})


def _meta_of(dataset: ConfigDict) -> dict:
    given = dict(dataset.get('metainfo') or {})
    if dataset.get('classes'):  # as datasets of mmpretrain take them too
        given.setdefault('classes', dataset.classes)
    kind = _class_of(DATASETS, dataset.get('type'))
    if not hasattr(kind, '_load_metainfo'):
        return given
    meta = kind._load_metainfo(given)  # which reads files
    if isinstance(meta.get('classes'), str):
        raise ConfigError(
            f'the file of classes {meta["classes"]}, which the config names, '
            'does not exist'
        )
    return meta


def _class_of(registry: Registry, kind: type | str | None) -> type | None:
    """The class that a type is or names."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as found:
        return found.get(kind)


# -------------------------------------------------------------------- models


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config, with its data preprocessor."""
    init_default_scope(scope_of(cfg))
    settings = dict(cfg.model)
    if cfg.get('data_preprocessor'):
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(settings)


def init_model(
    cfg: Config, checkpoint: str | None = None, device: str = 'cpu'
) -> nn.Module:
    """Build the model of a config for inference, branches merged.

    Args:
        cfg (Config): The config of a detector, segmentor or classifier.
        checkpoint (str, optional): A file or URL with all weights of the
            model. Defaults to None: as initialized.
        device (str): Where the model goes. Defaults to 'cpu'.

    Returns:
        nn.Module: The model in eval mode, with ``dataset_meta``: the classes
        that the checkpoint was trained on or, where it does not say, those of
        the config.

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
        ConfigError: See :func:`dataset_meta`.
    """
    model = build_model(cfg)
    meta = {}
    if checkpoint:
        contents = read(checkpoint)
        fitting = fit(contents['state_dict'], model, checkpoint, ())
        model.load_state_dict(fitting, strict=False)
        meta = checkpoint_meta(contents)
    if not meta.get('classes'):
        meta = dataset_meta(cfg) | meta
    model.dataset_meta = meta
    for module in model.modules():
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    return model.to(device).eval()


def input_channels(model: nn.Module) -> int:
    """The channels of the images that a model with a backbone takes."""
    modules = model.backbone.modules()
    return next(m.in_channels for m in modules if isinstance(m, nn.Conv2d))


# -------------------------------------------------------------------- images


def build_pipeline(cfg: Config) -> Compose:
    """The test pipeline of a config, less what loads the truth.

    It is that of the test set, else that of the validation set, else what the
    config calls ``test_pipeline``. Files are read from the local disk.

    Raises:
        ConfigError: If there is none.
    """
    init_default_scope(scope_of(cfg))
    datasets = (dataset_of(cfg, 'test'), dataset_of(cfg, 'val'))
    found = [_steps(dataset) for dataset in filter(None, datasets)]
    steps = next(filter(None, [*found, cfg.get('test_pipeline')]), None)
    if not steps:
        raise ConfigError(
            'how images are read is not in the config: it has neither a test '
            'nor a validation set with a pipeline; write test_pipeline = '
            '[...] into it'
        )
    return Compose([step for step in map(_local, steps) if step])


def _steps(dataset: ConfigDict) -> list:
    """The pipeline of a dataset, then those of what is wrapped around it."""
    inside = dataset.get('dataset'), *(dataset.get('datasets') or ())
    inner = next(filter(None, inside), None)
    return [
        *(_steps(inner) if inner else ()),
        *(dataset.get('pipeline') or ()),
    ]


def _local(step: dict | Callable) -> dict | Callable | None:
    """A step for local files without a truth; None if it loads the truth."""
    if not isinstance(step, dict):
        return step
    bases = getattr(_class_of(TRANSFORMS, step['type']), '__mro__', ())
    if any('Annotation' in base.__name__ for base in bases):
        return None
    remote = 'backend_args', 'file_client_args'
    return {key: value for key, value in step.items() if key not in remote}


def find_files(
    inputs: list[str], out: Path | None = None
) -> list[tuple[Path, str]]:
    """The images and videos that inputs stand for, every one once.

    Args:
        inputs (list[str]): Files, folders, which are searched with all below
            them, and patterns, in which ``**`` stands for any folders.
        out (Path, optional): The folder of the results, which are no inputs
            where it is in one of the folders. Defaults to None.

    Returns:
        list[tuple[Path, str]]: A file and a name for its results, without a
        suffix and unlike any other's: its path in the folder or its file name.
        Inputs that do not exist and folders without images are there too.
    """
    roots = {}  # the folders that names are relative to, by file
    for item in inputs:
        path = Path(item)
        files = []
        if path.is_dir():
            files = find(path, IMAGES + VIDEOS, [out] if out else ())
        elif not path.exists():  # a file may be named like a pattern
            files = [Path(name) for name in glob(item, recursive=True)]
        for file in sorted(files) or [path]:
            roots.setdefault(file, path if path.is_dir() else file.parent)
    found = {}  # by name
    for file, root in roots.items():
        stem = os.path.splitext(file.relative_to(root).as_posix())[0]
        name, number = stem, 1
        while name in found:
            number += 1
            name = f'{stem}_{number}'
        found[name] = file
    return [(file, name) for name, file in found.items()]


def left_out(
    folder: Path, endings: tuple[str, ...], apart: Iterable[Path] = ()
) -> str | None:
    """Say how many images in a folder have other endings; None if none has.

    Arguments are those of :func:`mmoverlock.data.files.find`.
    """
    known = *Image.registered_extensions(), '.dng', '.heic', '.heif'
    files = find(folder, tuple({*known}.difference(endings)), apart)
    counts = Counter(file.suffix.lower() for file in files)
    if not counts:
        return None
    found = ', '.join(f'{n} {ending}' for ending, n in sorted(counts.items()))
    return f'{folder}: left out are {found}; read are {" ".join(endings)}'


def load(pipeline: Compose, path: str) -> tuple[dict, np.ndarray]:
    """Load an image file as the test set does.

    Returns:
        tuple[dict, np.ndarray]: What the pipeline makes of it, ``inputs`` and
        ``data_samples``, and the picture in the file, (H, W, 3), uint8, in
        the order BGR, in whose pixels boxes and masks are predicted.

    Raises:
        UnreadableImage: If the pipeline fails or leaves the image out.
    """
    if not os.path.isfile(path):
        raise UnreadableImage('there is no such file')
    data = dict(img_path=path, img_id=0, sample_idx=0, seg_fields=[])
    picture = None
    try:
        for transform in pipeline.transforms:
            data = transform(data)
            if data is None:
                break
            if picture is None and 'img' in data:
                picture = to_picture(data['img'])
    except Exception as error:  # damaged bytes can fail in any way
        what = 'damaged, no image, or none that the test pipeline loads'
        if picture is not None:
            height, width = picture.shape[:2]
            what = f'the test pipeline fails on its {width} x {height} pixels'
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise UnreadableImage(f'{what}: {reason}') from error
    if data is None or picture is None:
        raise UnreadableImage('the test pipeline leaves it out')
    return data, picture


def to_picture(image: np.ndarray) -> np.ndarray:
    """A picture of pixels of any kind.

    Args:
        image (np.ndarray): (H, W) or (H, W, C).

    Returns:
        np.ndarray: (H, W, 3), uint8: the first three channels, or the first
        in gray where there are fewer. What is not whole numbers from 0 to 255
        is stretched to these from the 1st to the 99th percentile.
    """
    image = np.atleast_3d(image)
    few = image.shape[2] < 3
    image = image[..., :1].repeat(3, 2) if few else image[..., :3]
    plain = image.dtype == np.uint8
    if image.dtype.kind == 'f':
        plain = ((image >= 0) & (image <= 255) & (image % 1 == 0)).all()
    if not plain:
        image = np.nan_to_num(image.astype(np.float32))
        low, high = np.percentile(image, (1, 99))
        image = (image - low).clip(0, high - low)
        image *= 255 / max(high - low, 1e-12)
    return np.array(image, np.uint8)


@torch.no_grad()
def predict(model: nn.Module, data: dict) -> BaseDataElement:
    """Predict one image, which :func:`load` or a dataset gives.

    Returns:
        BaseDataElement: A data sample of mmdet, mmseg or mmpretrain, on the
        CPU, with the truth that the data have.
    """
    return model.test_step(pseudo_collate([data]))[0].cpu()


def network_input(model: nn.Module, data: dict) -> tuple[Tensor, np.ndarray]:
    """Make the input of a network of what :func:`load` gives.

    Returns:
        tuple[Tensor, np.ndarray]: The normalized and padded input, (1, C,
        H', W'), and the picture in it, (h, w, 3), uint8, RGB, whose upper
        left corner is that of the input.
    """
    picture = to_picture(data['inputs'].permute(1, 2, 0).numpy())[..., ::-1]
    batch = model.data_preprocessor(pseudo_collate([data]), False)
    return batch['inputs'], picture


# ------------------------------------------------------------------ pictures


def build_visualizer(scope: str, meta: dict) -> Visualizer:
    """Build the visualizer of a package, for the ``dataset_meta`` of a model.

    A palette for fewer or more classes than there are is replaced.
    """
    visualizer = VISUALIZERS.build(
        dict(type=VISUALIZERS_OF[scope], name=scope)
    )
    colors = (len(meta['classes']), 3)
    if np.shape(meta.get('palette')) != colors:
        palette = np.random.default_rng(0).integers(0, 256, colors).tolist()
        meta = meta | {'palette': [*map(tuple, palette)]}
    visualizer.dataset_meta = meta
    # Of labels that reach over the edge, which is no concern of the user.
    warnings.filterwarnings('ignore', '.* out of bounds, the drawn')
    return visualizer


def draw(
    visualizer: Visualizer,
    image: np.ndarray,
    sample: BaseDataElement,
    path: Path,
    score_thr: float,
    truth: bool = False,
) -> None:
    """Write a picture of what is predicted.

    Args:
        visualizer (Visualizer): Of :func:`build_visualizer`.
        image (np.ndarray): (H, W, 3), uint8, BGR.
        sample (BaseDataElement): Of :func:`predict`.
        path (Path): The file; its folder is made.
        score_thr (float): Objects below this score are left out.
        truth (bool): Whether to draw the truth of the sample too: on the
            left or, of a classifier, as text. Defaults to False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.ascontiguousarray(image[..., ::-1])
    options = dict(draw_gt=truth, out_file=str(path))
    if 'pred_score' in sample:
        visualizer.visualize_cls(image, sample, **options)
        return
    if 'pred_instances' in sample:
        options['pred_score_thr'] = score_thr
    visualizer.add_datasample('', image, sample, **options)
