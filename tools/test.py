"""Test a checkpoint: ``python tools/test.py CONFIG CHECKPOINT``."""

import argparse
import os
from copy import deepcopy

from mmengine.evaluator import DumpResults
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import METRICS

from mmoverlock import cli, data
from mmoverlock.inference import VISUALIZERS_OF
from mmoverlock.models.fuse import fuse


def build_parser():
    parser = argparse.ArgumentParser(description='Test a checkpoint.')
    cli.add_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='pickle the predictions'
    )
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='draw the predictions into this folder (mmseg: into '
        'vis_data/vis_image in it)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='average over scales and flips, as tta_model and tta_pipeline of '
        'the config say (MMDetection has none for masks); the time grows '
        'with the pixels of all views: 17 times for the 12 of UperNet',
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fuse norms, branches and residuals into convolutions first',
    )
    return parser


class Fuse(Hook):
    """Tests a fused copy of the model, of the weights that are tested.

    Those are there after other hooks: `EMAHook` swaps weights of the model
    itself before and after the test.
    """

    priority = 'LOWEST'

    def before_test_epoch(self, runner):
        if is_model_wrapper(runner.model):
            runner.model.module = fuse(deepcopy(runner.model.module))
        else:
            runner.model = fuse(deepcopy(runner.model))


class DumpPredictions(DumpResults):
    """``DumpResults`` less the logits of segmentation.

    For one 512 x 683 image of ADE20K, they would take 210 MB.
    """

    def process(self, data_batch, predictions):
        predictions = [
            {k: v for k, v in prediction.items() if k != 'seg_logits'}
            for prediction in predictions
        ]
        super().process(data_batch, predictions)


def draw_predictions(cfg, folder):
    """Have the visualization hook draw every test image into a folder."""
    folder = os.path.abspath(folder)
    hooks = {
        'mmdet': dict(
            type='DetVisualizationHook', draw=True, test_out_dir=folder
        ),
        'mmseg': dict(type='SegVisualizationHook', draw=True, interval=1),
        'mmpretrain': dict(
            type='VisualizationHook', enable=True, interval=1, out_dir=folder
        ),
    }
    scope = cfg.get('default_scope')
    if scope not in hooks:
        raise cli.UserError(
            f'--show-dir needs a config whose default_scope is one of '
            f'{", ".join(hooks)}, not {scope}'
        )
    cfg.setdefault('default_hooks', {}).setdefault('visualization', {})
    cfg.default_hooks.visualization.update(hooks[scope])
    cfg.setdefault('visualizer', {'type': VISUALIZERS_OF[scope]})
    if scope == 'mmseg':  # its hook has no folder of its own
        cfg.visualizer.save_dir = folder
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]


def augment_test_time(cfg):
    """Wrap the model in ``tta_model`` and read images by ``tta_pipeline``."""
    for key in ('tta_model', 'tta_pipeline'):
        if not cfg.get(key):
            raise cli.UserError(
                '--tta needs tta_model and tta_pipeline in the config, and '
                f'there is no {key}'
            )
    for _, dataset in data.unwrap(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def main(argv=None):
    cli.set_up()
    with cli.user_errors('test.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        cli.check_file(args.checkpoint, 'checkpoint')
        cfg.load_from, cfg.resume = args.checkpoint, False
        if not cfg.get('test_dataloader'):
            raise cli.UserError(
                f'{args.config} has no test set: set test_dataloader, '
                'test_evaluator and test_cfg = dict()'
            )
        scope = cfg.get('default_scope')
        if args.tta and args.show_dir and scope == 'mmpretrain':
            raise cli.UserError(
                "--show-dir does not go with a classifier's --tta: what draws "
                'takes no more than one view of an image'
            )
        data.check_data(cfg, 'test')
        if args.out and not args.out.endswith(('.pkl', '.pickle')):
            raise cli.UserError(f'--out {args.out} does not end in .pkl')
        if args.show_dir:
            draw_predictions(cfg, args.show_dir)
        if args.tta:
            augment_test_time(cfg)
        with cli.explain_failures(cfg, args.cfg_options):
            runner = cli.build_runner(cfg, complete=True)
            if args.fuse:
                runner.register_hook(Fuse())
            if args.out:
                dump = DumpPredictions
                if cfg.default_scope == 'mmdet':
                    dump = METRICS.get('mmdet.DumpDetResults')
                runner.test_evaluator.metrics.append(dump(args.out))
            runner.test()


if __name__ == '__main__':
    main()
