"""Trained models on images of the user: what the tools share."""

import os
from colorsys import hsv_to_rgb
from glob import glob
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import (
    DATASETS,
    MODELS,
    TRANSFORMS,
    init_default_scope,
)
from torch import Tensor, nn

from .checkpoint import read
from .models.weights import fit

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.mkv', '.mov', '.mp4', '.webm')


class UnreadableImage(ValueError):
    """What cannot be read as an image; the message says why."""


def init_model(
    cfg: Config, checkpoint: str | None = None, device: str = 'cpu'
) -> nn.Module:
    """Build the model of a config for inference, branches merged.

    Args:
        cfg (Config): The config of a detector, segmenter or classifier.
        checkpoint (str, optional): A file or URL with all weights of the
            model. Defaults to None: as initialized.
        device (str): Where the model goes. Defaults to 'cpu'.

    Returns:
        nn.Module: The model in eval mode, with ``dataset_meta``: the classes
        that the checkpoint was trained on or, where it does not say, those of
        the test set's type.

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
    """
    init_default_scope(cfg.default_scope)
    settings = dict(cfg.model)
    if cfg.get('data_preprocessor'):
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(settings)
    meta = {}
    if checkpoint:
        contents = read(checkpoint)
        fitting = fit(contents['state_dict'], model, checkpoint, ())
        model.load_state_dict(fitting, strict=False)
        meta = contents.get('meta', {}).get('dataset_meta') or {}
    dataset = _test_set(cfg)
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        kind = registry.get(dataset.get('type', ''))
    known = {
        **getattr(kind, 'METAINFO', {}),
        **dataset.get('metainfo', {}),
        **meta,
    }
    model.dataset_meta = {key.lower(): value for key, value in known.items()}
    for module in model.modules():
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    return model.to(device).eval()


def build_pipeline(cfg: Config) -> Compose:
    """The test pipeline of a config, from images in memory.

    Args:
        cfg (Config): The config.

    Returns:
        Compose: For :func:`prepare`.
    """
    init_default_scope(cfg.default_scope)
    steps = [
        step
        for step in _test_set(cfg).get('pipeline', [])
        if not step['type'].split('.')[-1].startswith('Load')
    ]
    return Compose([TRANSFORMS.build(step) for step in steps])


def find_files(inputs: list[str]) -> list[tuple[Path, str]]:
    """The images and videos that inputs stand for, every one once.

    Args:
        inputs (list[str]): Files, folders, which are searched with all below
            them, and patterns, in which ``**`` stands for any folders.

    Returns:
        list[tuple[Path, str]]: A file and a name for its results, without a
        suffix and unlike any other's: its path in the folder or its file name.
        An input that does not exist is returned too, and so is a folder with
        no images.
    """
    found = {}  # the folders that names are relative to, by file
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            root = path
            files = [
                file
                for file in path.rglob('*')
                if file.suffix.lower() in IMAGES + VIDEOS
            ]
        else:
            root = None
            # A file may be named like a pattern.
            names = [] if path.exists() else glob(item, recursive=True)
            files = [Path(name) for name in names]
        for file in sorted(files) or [path]:
            found.setdefault(file, root or file.parent)
    used, result = set(), []
    for file, root in found.items():
        stem = os.path.splitext(file.relative_to(root).as_posix())[0]
        name, number = stem, 1
        while name in used:
            number += 1
            name = f'{stem}_{number}'
        used.add(name)
        result.append((file, name))
    return result


def read_image(path: str) -> np.ndarray:
    """Read an image file, as the datasets do.

    Args:
        path (str): The file.

    Returns:
        np.ndarray: (H, W, 3), uint8, in the order BGR.

    Raises:
        UnreadableImage: If it cannot be read.
    """
    if not os.path.isfile(path):
        raise UnreadableImage('there is no such file')
    try:
        image = mmcv.imread(path)
    except Exception as error:  # damaged bytes can fail in any way
        raise UnreadableImage(str(error)) from error
    if image is None:
        raise UnreadableImage('not an image, or a damaged one')
    return image


def prepare(pipeline: Compose, image: np.ndarray) -> dict:
    """An image to the batch of one that a model takes.

    Args:
        pipeline (Compose): Of :func:`build_pipeline`.
        image (np.ndarray): (H, W, 3), uint8, in the order BGR.

    Returns:
        dict: ``inputs`` and ``data_samples``.

    Raises:
        UnreadableImage: If the pipeline cannot resize it.
    """
    size = image.shape[:2]
    data = dict(img=image, img_shape=size, ori_shape=size)
    try:
        data = pipeline(data | dict(img_path='', img_id=0))
    except cv2.error as error:  # one side would vanish
        raise UnreadableImage(
            f'{size[1]} x {size[0]} pixels are too narrow for the test '
            'pipeline'
        ) from error
    return pseudo_collate([data])


@torch.no_grad()
def predict(model: nn.Module, pipeline: Compose, image: np.ndarray):
    """Predict one image.

    Args:
        model (nn.Module): Of :func:`init_model`.
        pipeline (Compose): Of :func:`build_pipeline`.
        image (np.ndarray): (H, W, 3), uint8, in the order BGR.

    Returns:
        BaseDataElement: A data sample of mmdet, mmseg or mmpretrain, on the
        CPU.
    """
    return model.test_step(prepare(pipeline, image))[0].cpu()


def network_input(
    model: nn.Module, pipeline: Compose, image: np.ndarray
) -> tuple[Tensor, np.ndarray]:
    """What a network sees of an image.

    Args:
        model (nn.Module): Of :func:`init_model`.
        pipeline (Compose): Of :func:`build_pipeline`.
        image (np.ndarray): (H, W, 3), uint8, in the order BGR.

    Returns:
        tuple[Tensor, np.ndarray]: The normalized and padded input, (1, 3,
        H', W'), and the picture in it, (h, w, 3), uint8, RGB, whose upper
        left corner is that of the input.
    """
    batch = prepare(pipeline, image)
    picture = batch['inputs'][0].permute(1, 2, 0).numpy()[..., ::-1]
    return model.data_preprocessor(batch, False)['inputs'], picture


def colour_of(label: int) -> tuple[float, float, float]:
    """A colour that no other label has, far from those of labels near it.

    Args:
        label (int): Number of a class.

    Returns:
        tuple[float, float, float]: Red, green and blue, from 0 to 1.
    """
    turn = label * 0.618034 % 1  # the golden ratio leaves no two close
    return hsv_to_rgb(turn, 0.95 - label % 3 * 0.2, 0.9 - label % 2 * 0.25)


def _test_set(cfg):
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', Config())
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset
