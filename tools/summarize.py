"""Draw what a model has learned: ``python tools/summarize.py WORK_DIR``.

Writes two pictures into the work dir of a ``tools/train.py``: ``curves.png``,
losses, metrics, learning rate, throughput and memory over time, and
``predictions.png``, predictions beside the truth for validation images.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS

from mmoverlock import cli
from mmoverlock.curves import draw_curves
from mmoverlock.inference import (
    Pipeline,
    colour_of,
    dataset_of,
    init_model,
    predict,
    unwrap,
)


def latest(folder, pattern, what):
    """The most recent file of a pattern."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise cli.UserError(f'there is no {what} in {folder}')
    return found[-1]


def checkpoints(work_dir, cfg):
    """The folder of checkpoints: another one where ``out_dir`` names it."""
    hooks = cfg.get('default_hooks') or {}
    out_dir = (hooks.get('checkpoint') or {}).get('out_dir')
    name = Path(cfg.get('work_dir') or work_dir).resolve().name
    return Path(out_dir, name) if out_dir else work_dir


def write_on(axes, text, x, y, colour):
    axes.annotate(
        text,
        (max(x, 0), max(y, 0)),
        fontsize=7,
        color='white',
        bbox=dict(pad=1, ec='none', fc=colour),
    )


def draw_instances(axes, instances, classes):
    """Draw boxes, masks, class names and scores, if there are any."""
    boxes = instances.bboxes
    boxes = getattr(boxes, 'tensor', boxes).tolist()
    masks = instances.get('masks', [None] * len(boxes))
    scores = instances.get('scores', [None] * len(boxes))
    for label, box, mask, score in zip(
        instances.labels.tolist(),
        boxes,
        getattr(masks, 'masks', masks),
        scores,
        strict=True,
    ):
        colour = colour_of(label)
        if mask is not None:
            overlay = np.zeros((*mask.shape, 4))
            overlay[np.asarray(mask) > 0] = (*colour, 0.45)
            axes.imshow(overlay, interpolation='nearest')
        x, y, right, bottom = box
        axes.add_patch(
            plt.Rectangle((x, y), right - x, bottom - y, fill=False, ec=colour)
        )
        text = classes[label] + ('' if score is None else f' {score:.2f}')
        write_on(axes, text, x, y, colour)


def draw_labels(axes, labels, classes):
    """Draw a label map (H, W); the names of the five largest parts."""
    overlay = np.zeros((*labels.shape, 4))
    found = np.unique(labels[labels < len(classes)], return_counts=True)
    parts = sorted(zip(*found, strict=True), key=lambda part: -part[1])
    for i, (label, _) in enumerate(parts):
        inside = labels == label
        overlay[inside] = (*colour_of(label), 0.6)
        if i < 5:
            rows, columns = inside.nonzero()
            middle = len(rows) // 2
            place = columns[middle], rows[middle]
            write_on(axes, classes[label], *place, colour_of(label))
    axes.imshow(overlay, interpolation='nearest')


def draw_sample(axes, sample, classes, score_thr, predicted):
    """Draw the truth or prediction of a data sample; returns a title."""
    kind = 'pred' if predicted else 'gt'
    if f'{kind}_instances' in sample:
        instances = sample.get(f'{kind}_instances')
        if predicted:
            instances = instances[instances.scores >= score_thr]
        draw_instances(axes, instances, classes)
        return f'predicted, score >= {score_thr}' if predicted else 'truth'
    if f'{kind}_sem_seg' in sample:
        # Of two classes in one channel, mmseg predicts floats.
        labels = sample.get(f'{kind}_sem_seg').data[0].long().numpy()
        draw_labels(axes, labels, classes)
        return 'predicted' if predicted else 'truth'
    labels = sample.get(f'{kind}_label').tolist()  # may be several, or none
    names = [
        classes[label] + (f' {sample.pred_score[label]:.2f}' * predicted)
        for label in labels
    ]
    text = ', '.join(names) or 'none'
    return f'predicted: {text}' if predicted else f'truth: {text}'


def draw_predictions(cfg, checkpoint, path, count, score_thr):
    """Draw predictions beside the truth of validation images.

    Args:
        cfg (Config): The config of the model, with a set to validate or test.
        checkpoint (Path): Its weights.
        path (Path): Where the picture goes.
        count (int): Number of images, spread over the set.
        score_thr (float): Objects below this score are left out.
    """
    model = init_model(cfg, str(checkpoint), get_device())
    dataset = DATASETS.build(dataset_of(cfg, 'val', 'test'))
    pictures = []
    for leaf in unwrap(dataset):
        leaf.pipeline = Pipeline(leaf.pipeline.transforms, pictures)
    classes = unwrap(dataset)[0].metainfo['classes']
    count = min(count, len(dataset))
    rows = -(-count // 2)
    figure, grid = plt.subplots(
        rows, 4, figsize=(13, 3.2 * rows), squeeze=False, layout='constrained'
    )
    for axes in grid.flat:
        axes.axis('off')
    for i in range(count):
        sample = predict(model, dataset[i * len(dataset) // count])
        name = Path(sample.img_path).name
        for j, axes in enumerate(grid.reshape(-1, 2)[i]):
            axes.imshow(pictures[-1][..., ::-1])
            title = draw_sample(axes, sample, classes, score_thr, j == 1)
            axes.set_title(title if j else f'{name}, {title}', fontsize=9)
        pictures.clear()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    cli.set_up()
    parser = argparse.ArgumentParser(
        description='Draw the curves and predictions of a trained model.'
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
        cli.check_files(cfg)
        checkpoint = latest(checkpoints(folder, cfg), '*.pth', 'checkpoint')
        curves = folder / 'curves.png'
        batch_size = cfg.train_dataloader.batch_size
        last = draw_curves(folder, batch_size)
        if not last:
            raise cli.UserError(f'there is no scalars.json in {folder}')
        predictions = folder / 'predictions.png'
        has_truth = dataset_of(cfg, 'val', 'test') is not None
        if has_truth:
            draw_predictions(
                *(cfg, checkpoint, predictions, args.images, args.score_thr)
            )
    for name, value in last.items():
        print(f'{name}: {value:.4g}')
    print(f'checkpoint: {checkpoint}')
    if has_truth:
        print(f'predictions and truth: {predictions}')
    else:
        print('no predictions: the config has no validation and no test set')
    print(f'losses, metrics, learning rate, speed: {curves}')


if __name__ == '__main__':
    main()
