"""Predict: ``python tools/predict.py CONFIG CHECKPOINT INPUT... --out DIR``.

Inputs are images, folders of images, patterns as in ``'photos/*.jpg'``, and
videos, whose frames are predicted one by one. DIR gets

- ``pictures/``, the images with what was predicted drawn in, and
- ``predictions.json``: for detectors in COCO's format, boxes [x, y, w, h] and
  masks with a ``score``, where category_id counts the classes from 1; for
  segmentors which file of ``label_maps/`` belongs to which image, PNGs whose
  pixels are the numbers of classes, from 0; for classifiers the five likeliest
  classes and their scores.

Images are loaded as the test pipeline of the config says. Inputs that cannot
be read, and pictures that cannot be drawn, are listed at the end, and the exit
status is 1.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from mmengine.device import get_device
from PIL import Image
from pycocotools import mask as coco_masks
from rich.console import Console
from rich.progress import Progress
from torch import nn

from mmoverlock import cli
from mmoverlock.data.checks import Split, head_classes
from mmoverlock.data.files import raise_first
from mmoverlock.inference import (
    IMAGES,
    VIDEOS,
    VISUALIZERS_OF,
    UnreadableImage,
    build_pipeline,
    build_visualizer,
    draw,
    find_files,
    init_model,
    input_channels,
    left_out,
    load,
    predict,
)
from mmoverlock.models.fuse import fuse


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('inputs', nargs='+', metavar='INPUT')
    parser.add_argument(
        '--out', required=True, type=Path, metavar='DIR', help='results'
    )
    parser.add_argument(
        '--device',
        type=cli.device,
        help='cpu, cuda, cuda:1 ...; default: a GPU if there is',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='leave out objects below this score; default: %(default)s',
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fuse norms, branches and residuals into convolutions first',
    )
    cli.add_config_arguments(
        parser, ', as in model.test_cfg.rcnn.max_per_img=20'
    )
    return parser


def count_images(path):
    """The number of images in a file, of videos as they say."""
    if path.suffix.lower() not in VIDEOS:
        return 1
    frames = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
    return max(int(frames), 1)


def read_frames(path, name, folder):
    """Yield (image file, name, number of the frame or None) of a file.

    The folder gets the frames of a video, one after the other.
    """
    if path.is_dir():
        raise UnreadableImage('there are no images in this folder')
    if path.suffix.lower() not in VIDEOS:
        yield path, name, None
        return
    video = cv2.VideoCapture(str(path))
    for number in itertools.count():
        there, image = video.read()
        if not there:
            break
        file = folder / 'frame.png'  # for the test pipeline to load
        cv2.imwrite(str(file), image)
        yield file, f'{name}/{number:06d}', number
    if not number:
        raise UnreadableImage('not a video, or one without a codec here')


def detections(sample, image_id, start):
    """Yield what a detector predicts as annotations in COCO's format.

    Their ids start from a number.
    """
    for i, found in enumerate(sample.pred_instances, start):
        x, y, right, bottom = found.bboxes[0].tolist()
        box = [x, y, right - x, bottom - y]
        annotation = {
            'id': i,
            'image_id': image_id,
            'category_id': int(found.labels) + 1,
            'bbox': box,
            'area': box[2] * box[3],
            'iscrowd': 0,
            'score': float(found.scores),
        }
        if 'masks' in found:
            mask = found.masks[0].numpy()
            runs = coco_masks.encode(np.asfortranarray(mask, np.uint8))
            annotation['area'] = float(coco_masks.area(runs))
            runs['counts'] = runs['counts'].decode()
            annotation['segmentation'] = runs
        yield annotation


def save_label_map(sample, path, classes):
    """Write what a segmentor predicts as a PNG of numbers of classes."""
    labels = sample.pred_sem_seg.data[0].numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if len(classes) <= 256 else np.uint16
    Image.fromarray(labels.astype(dtype)).save(path)


def top_classes(sample, classes):
    """The five likeliest classes of an image, with their scores."""
    scores, labels = sample.pred_score.topk(min(5, len(classes)))
    return [
        {'label': label, 'class': classes[label], 'score': score}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


def run(args, cfg):
    """Predict all inputs; what is predicted is written whatever fails.

    Returns:
        dict[str, list[str]]: What failed, by what is to be said of it.
    """
    files = find_files(args.inputs, args.out)
    for folder in filter(os.path.isdir, args.inputs):
        line = left_out(Path(folder), IMAGES + VIDEOS, [args.out])
        if line:
            print(line, file=sys.stderr)
    model = init_model(cfg, args.checkpoint, args.device or get_device())
    if args.fuse:
        fuse(model)
    pipeline, channels = build_pipeline(cfg), input_channels(model)
    classes = model.dataset_meta.get('classes')
    if not classes:
        raise cli.UserError(
            'neither the checkpoint nor the config names the classes: write '
            'test_dataloader = dict(dataset=dict(metainfo=dict(classes=[...])'
            ')) into the config'
        )
    named = SimpleNamespace(metainfo=model.dataset_meta)
    where = 'dataset_meta, of the checkpoint or else of the config,'
    parts = dict(model.named_children())
    parts.pop('data_preprocessor', None)  # whose classes only training needs
    split = Split({where: named}, model=nn.ModuleDict(parts))
    raise_first(head_classes(split))
    visualizer = build_visualizer(cfg.default_scope, model.dataset_meta)
    results = {'images': []}
    if cfg.default_scope == 'mmdet':
        numbered = enumerate(classes, 1)
        categories = [{'id': i, 'name': name} for i, name in numbered]
        results |= {'categories': categories, 'annotations': []}
    else:
        results['classes'] = [*classes]
    unread, undrawn = [], []

    def predict_one(path, file, name, frame):
        data, picture = load(pipeline, str(file))
        if len(data['inputs']) != channels:
            raise UnreadableImage(
                f'it has {len(data["inputs"])} channels, and the model takes '
                f'{channels}'
            )
        sample = predict(model, data)
        height, width = picture.shape[:2]
        record = {
            'id': len(results['images']) + 1,
            'file_name': str(path),
            'height': height,
            'width': width,
        }
        if frame is not None:
            record['frame'] = frame
        if cfg.default_scope == 'mmdet':
            found = sample.pred_instances
            sample.pred_instances = found[found.scores >= args.score_thr]
            start = len(results['annotations']) + 1
            results['annotations'] += detections(sample, record['id'], start)
        elif cfg.default_scope == 'mmseg':
            record['label_map'] = f'label_maps/{name}.png'
            save_label_map(sample, args.out / record['label_map'], classes)
        else:
            record['predictions'] = top_classes(sample, classes)
        results['images'].append(record)
        out = args.out / 'pictures' / f'{name}.png'
        try:
            draw(visualizer, picture, sample, out, args.score_thr)
        except Exception as error:
            undrawn.append(f'{out}: {type(error).__name__}: {error}')

    args.out.mkdir(parents=True, exist_ok=True)
    with (
        Progress(console=Console(stderr=True)) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        total = sum(count_images(path) for path, _ in files)
        task = progress.add_task('predict', total=total)
        try:
            for path, name in files:
                try:
                    for frame in read_frames(path, name, Path(folder)):
                        predict_one(path, *frame)
                        progress.advance(task)
                except UnreadableImage as error:
                    unread.append(f'{path}: {error}')
            progress.update(task, completed=total)
        finally:
            path = args.out / 'predictions.json'
            path.write_text(json.dumps(results, indent=1) + '\n')
    print(f'{path}: {len(results["images"])} images')
    return {
        'inputs could not be read': unread,
        'pictures could not be drawn': undrawn,
    }


def main(argv=None):
    cli.set_up()
    with cli.user_errors('predict.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        cli.check_file(args.checkpoint, 'checkpoint')
        if cfg.get('default_scope') not in VISUALIZERS_OF:
            raise cli.UserError(
                f'{args.config} has the default_scope '
                f'{cfg.get("default_scope")}, not one of '
                + ', '.join(VISUALIZERS_OF)
            )
        with cli.explain_failures(cfg, args.cfg_options):
            failed = run(args, cfg)
    for what, lines in failed.items():
        if lines:
            print(f'{len(lines)} {what}:', *lines, sep='\n', file=sys.stderr)
    if any(failed.values()):
        sys.exit(1)


if __name__ == '__main__':
    main()
