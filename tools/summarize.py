"""Draw what a model has learned: ``python tools/summarize.py WORK_DIR``.

Writes two pictures into the work dir of a ``tools/train.py``: ``curves.png``,
losses, metrics, learning rate, throughput and memory over time, and
``predictions.png``, the truth and, on its right, predictions for validation
images; of a classifier, both as text.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DATASETS

from mmoverlock import cli
from mmoverlock.checkpoint import latest_checkpoint
from mmoverlock.curves import draw_curves
from mmoverlock.inference import (
    build_pipeline,
    build_visualizer,
    dataset_of,
    draw,
    init_model,
    load,
    predict,
    scope_of,
)


def draw_predictions(cfg, checkpoint, path, count, score_thr):
    """Draw predictions beside the truth, for images spread over a set.

    It is the set to validate or, where there is none, to test. Objects below
    the score are left out.
    """
    model = init_model(cfg, checkpoint, get_device())
    dataset = DATASETS.build(dataset_of(cfg, 'val', 'test'))
    pipeline = build_pipeline(cfg)
    meta = model.dataset_meta | {'classes': dataset.metainfo['classes']}
    visualizer = build_visualizer(scope_of(cfg), meta)
    count = min(count, len(dataset))
    rows = -(-count // 2)
    figure, grid = plt.subplots(
        rows, 2, figsize=(13, 3.2 * rows), squeeze=False, layout='constrained'
    )
    for axes in grid.flat:
        axes.axis('off')
    with TemporaryDirectory() as folder:
        drawn = Path(folder, 'drawn.png')
        for i, axes in zip(range(count), grid.flat, strict=False):
            sample = predict(model, dataset[i * len(dataset) // count])
            _, picture = load(pipeline, sample.img_path)
            draw(visualizer, picture, sample, drawn, score_thr, truth=True)
            axes.imshow(plt.imread(drawn))
            axes.set_title(Path(sample.img_path).name, fontsize=9)
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
    folder = args.work_dir
    with cli.user_errors('summarize.py'):
        # The config beside them, because a test replaces the folder's own.
        runs = sorted(folder.glob('*/vis_data/scalars.json'))
        if not runs:
            raise cli.UserError(f'there are no scalars.json in {folder}')
        cfg = Config.fromfile(runs[-1].with_name('config.py'))
        cli.check_files(cfg)
        checkpoint = latest_checkpoint(folder)
        last = draw_curves(folder, cfg.train_dataloader.batch_size)
        if not checkpoint or not last:
            raise cli.UserError(f'{folder} lacks a checkpoint or losses')
        for name, value in last.items():
            print(f'{name}: {value:.4g}')
        print(f'checkpoint: {checkpoint}')
        predictions = folder / 'predictions.png'
        if dataset_of(cfg, 'val', 'test'):
            options = args.images, args.score_thr
            draw_predictions(cfg, checkpoint, predictions, *options)
            print(f'predictions and truth: {predictions}')
        else:
            print(
                'no predictions: the config has neither a validation nor a '
                'test set'
            )
        print(f'losses, metrics, learning rate, speed: {folder}/curves.png')


if __name__ == '__main__':
    main()
