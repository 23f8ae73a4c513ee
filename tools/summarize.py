"""Draw what a detector has learned: ``python tools/summarize.py WORK_DIR``.

Writes two pictures into the work dir of a ``tools/train.py`` on COCO's
layout: ``curves.png``, losses and average precision over time, and
``predictions.png``, predictions beside the ground truth.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import mmcv
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.device import get_device

from mmoverlock import cli


def latest(folder, pattern, what):
    """The most recent file of a pattern."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise cli.UserError(f'there is no {what} in {folder}')
    return found[-1]


def draw_curves(scalars, path):
    """Plot what a training logged.

    Args:
        scalars (Path): The ``scalars.json`` of the run.
        path (Path): Where the picture goes.

    Returns:
        dict: The metrics of the last evaluation, by name.
    """
    records = [json.loads(line) for line in scalars.open()]
    training = [record for record in records if 'loss' in record]
    evaluations = [record for record in records if 'coco/bbox_mAP' in record]
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    names = dict.fromkeys(key for record in training for key in record)
    for name in (name for name in names if name.startswith('loss')):
        left.plot(
            [record['step'] for record in training],
            [record[name] for record in training],
            label=name,
        )
    left.set(xlabel='iteration', yscale='log', title='Training loss')
    for kind, colour in (('bbox', 'C0'), ('segm', 'C1')):
        for metric, style in (('mAP_50', '-'), ('mAP', '--')):
            right.plot(
                [record['step'] for record in evaluations],
                [record[f'coco/{kind}_{metric}'] for record in evaluations],
                f'{colour}.{style}',
                label=f'{kind} {metric}',
            )
    right.set(xlabel='epoch', ylim=(0, 1), title='Validation')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=120)
    plt.close()
    return evaluations[-1] if evaluations else {}


def draw_instances(axes, instances, classes):
    """Draw boxes, masks, class names and scores, if there are any."""
    boxes, masks = instances.bboxes, instances.masks
    scores = instances.get('scores', [None] * len(instances))
    for label, box, mask, score in zip(
        instances.labels.tolist(),
        getattr(boxes, 'tensor', boxes).tolist(),
        getattr(masks, 'masks', masks),
        scores,
        strict=True,
    ):
        colour = plt.get_cmap('tab10')(label % 10)
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask > 0] = (*colour[:3], 0.45)
        axes.imshow(overlay, interpolation='nearest')
        x, y, right, bottom = box
        axes.add_patch(
            plt.Rectangle((x, y), right - x, bottom - y, fill=False, ec=colour)
        )
        axes.annotate(
            classes[label] + ('' if score is None else f' {score:.2f}'),
            (max(x, 0), max(y, 0)),
            fontsize=7,
            color='white',
            bbox=dict(pad=1, ec='none', fc=colour),
        )


def draw_predictions(cfg, checkpoint, path, count, score_thr):
    """Draw predictions beside the ground truth of validation images.

    Args:
        cfg (Config): The config of the detector.
        checkpoint (Path): Its weights.
        path (Path): Where the picture goes.
        count (int): Number of images.
        score_thr (float): Predictions below this score are left out.
    """
    model = init_detector(cfg, str(checkpoint), device=get_device())
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    classes = dataset.metainfo['classes']
    count = min(count, len(dataset))
    rows = -(-count // 2)
    _, grid = plt.subplots(rows, 4, figsize=(13, 3.2 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for i in range(count):
        left, right = grid.reshape(-1, 2)[i]
        truth = dataset[i]['data_samples']
        predicted = inference_detector(model, truth.img_path)
        predicted = predicted.pred_instances.cpu()
        predicted = predicted[predicted.scores >= score_thr]
        name = Path(truth.img_path).name
        for axes, title, instances in (
            (left, f'{name}: ground truth', truth.gt_instances),
            (right, f'predicted, score >= {score_thr}', predicted),
        ):
            axes.imshow(mmcv.imread(truth.img_path, channel_order='rgb'))
            axes.set_title(title, fontsize=9)
            draw_instances(axes, instances, classes)
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Draw the curves and predictions of a trained detector.'
    )
    parser.add_argument('work_dir', type=Path, help='of tools/train.py')
    parser.add_argument(
        '--images', type=int, default=8, help='how many to draw; default: 8'
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.5, help='default: 0.5'
    )
    args = parser.parse_args(argv)
    with cli.user_errors('summarize.py'):
        folder = args.work_dir
        cfg = Config.fromfile(latest(folder, '*.py', 'config'))
        checkpoint = latest(folder, '*.pth', 'checkpoint')
        scalars = latest(folder, '*/vis_data/scalars.json', 'scalars.json')
        metrics = draw_curves(scalars, folder / 'curves.png')
        draw_predictions(
            cfg,
            checkpoint,
            folder / 'predictions.png',
            args.images,
            args.score_thr,
        )
    for name in ('bbox_mAP_50', 'segm_mAP_50'):
        print(f'{name}: {metrics.get(f"coco/{name}", "not evaluated")}')
    print(f'checkpoint: {checkpoint}')
    print(f'predictions and ground truth: {folder / "predictions.png"}')
    print(f'losses and mAP: {folder / "curves.png"}')


if __name__ == '__main__':
    main()
