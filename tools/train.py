"""Train a model: ``python tools/train.py CONFIG``."""

import argparse

from mmengine.device import get_device
from mmengine.runner import find_latest_checkpoint

from mmoverlock import cli

LATEST = 'latest'


def build_parser():
    parser = argparse.ArgumentParser(description='Train a model.')
    cli.add_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const=LATEST,
        metavar='PATH',
        help='go on from a checkpoint; without PATH, from the latest in the '
        'work dir, if there is one',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision with dynamic loss scaling: float16, or '
        '--cfg-options optim_wrapper.dtype=bfloat16; needs a GPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size / auto_scale_lr.'
        'base_batch_size of the config',
    )
    return parser


def apply_options(cfg, args):
    """Put what the options ask for into the config."""
    if args.resume:
        cfg.resume = True
        cfg.load_from = args.resume
        if args.resume == LATEST:
            cfg.load_from = find_latest_checkpoint(cfg.work_dir)
    if args.amp:
        if get_device() in ('cpu', 'mps'):
            raise cli.UserError(
                "--amp needs a GPU: mmengine's AmpOptimWrapper does not run "
                f'on {get_device()}; train without --amp'
            )
        wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
        if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise cli.UserError(
                f'--amp replaces OptimWrapper, not the {wrapper} of the config'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise cli.UserError(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the '
                'config'
            )
        cfg.auto_scale_lr.enable = True


def main(argv=None):
    with cli.user_errors('train.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        apply_options(cfg, args)
        for key, path in cli.start_checkpoints(cfg).items():
            cli.check_file(path, f'{key}: checkpoint')
        cli.check_data(cfg, 'train', 'val')
        with cli.explain_failures(cfg, args.cfg_options):
            cli.build_runner(cfg, complete=cfg.get('resume', False)).train()


if __name__ == '__main__':
    main()
