"""Train a model: ``python tools/train.py CONFIG``."""

import argparse
import importlib.util
import os

import torch
from mmengine.device import get_device

from mmoverlock import cli, data
from mmoverlock.checkpoint import latest_checkpoint, remove_unfinished
from mmoverlock.engine import CPUAmpOptimWrapper

LATEST = 'latest'


def build_parser():
    parser = argparse.ArgumentParser(description='Train a model.')
    cli.add_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const=LATEST,
        metavar='PATH',
        help='go on from a checkpoint; without PATH, from the latest whole '
        'one in the work dir, if there is any',
    )
    parser.add_argument(
        '--seed', type=int, help='of all random numbers; default: random'
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='take only operators that give equal results every time, where '
        'there are such, and warn where not (GPUs only); use with --seed',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: on GPUs float16 with dynamic loss scaling, or '
        '--cfg-options optim_wrapper.dtype=bfloat16; on CPUs bfloat16',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the images of a step / '
        'auto_scale_lr.base_batch_size of the config',
    )
    parser.add_argument(
        '--tensorboard',
        action='store_true',
        help='write logs for TensorBoard too, which work dir/*/vis_data gets',
    )
    return parser


def apply_options(cfg, args):
    """Put what the options ask for into the config."""
    if args.resume:
        cfg.resume = True
        cfg.load_from = args.resume
        if args.resume == LATEST:
            cfg.load_from = latest_checkpoint(cfg.work_dir)
    if args.seed is not None:
        if not 0 <= args.seed < 2**32:
            raise cli.UserError(f'--seed {args.seed} is not in [0, 2^32)')
        cfg.merge_from_dict({'randomness.seed': args.seed})
    if args.deterministic:
        cfg.merge_from_dict({'randomness.deterministic': True})
        # cuBLAS needs it, before it is loaded.
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if args.amp:
        mix_precision(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise cli.UserError(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the '
                'config'
            )
        cfg.auto_scale_lr.enable = True
    if args.tensorboard:
        if not importlib.util.find_spec('tensorboard'):
            raise cli.UserError(
                '--tensorboard needs its package: pip install tensorboard'
            )
        cfg.setdefault('visualizer', dict(type='Visualizer'))
        backends = cfg.visualizer.get('vis_backends')
        backends = backends or [dict(type='LocalVisBackend')]
        tensorboard = dict(type='TensorboardVisBackend')
        cfg.visualizer.vis_backends = [*backends, tensorboard]


def mix_precision(cfg):
    """Replace the optimizer wrapper by one for mixed precision."""
    device = get_device()
    wrapper = cli.name_of(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise cli.UserError(
            f'--amp replaces OptimWrapper, not the {wrapper} of the config'
        )
    if device == 'mps':
        raise cli.UserError('--amp does not run on mps; train without --amp')
    if device != 'cpu':
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
        return
    cfg.optim_wrapper.type = CPUAmpOptimWrapper.__name__
    cfg.optim_wrapper.pop('loss_scale', None)
    dtype = cfg.optim_wrapper.pop('dtype', 'bfloat16')
    if dtype != 'bfloat16':
        raise cli.UserError(
            f'--amp is bfloat16 on a CPU, not optim_wrapper.dtype {dtype}'
        )


def main(argv=None):
    cli.set_up()
    with cli.user_errors('train.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        apply_options(cfg, args)
        for key, path in cli.start_checkpoints(cfg).items():
            cli.check_file(path, f'{key}: checkpoint')
        data.check_data(cfg, 'train', 'val')
        remove_unfinished(cfg.work_dir)
        with cli.explain_failures(cfg, args.cfg_options):
            runner = cli.build_runner(cfg, cfg.get('resume', False))
            if args.deterministic:
                # mmengine stops at operators that cannot be.
                torch.use_deterministic_algorithms(True, warn_only=True)
            runner.train()


if __name__ == '__main__':
    main()
