"""Hooks of trainings and tests.

All are in mmengine's registry, for any config that imports this package.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce_params, get_rank, master_only
from mmengine.hooks import EMAHook, Hook, LoggerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..checkpoint import CheckpointError
from ..curves import draw_curves
from ..models.weights import fit


@HOOKS.register_module(force=True)
class LoadingCheck(Hook):
    """Has a runner load what fits its model, or else end with an error.

    mmengine logs what does not fit, and goes on.

    Args:
        complete (bool): Whether all weights of the model must be in the
            checkpoint, as for a test; else any will do.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which loads the weights too

    def __init__(self, complete: bool):
        self.complete = complete

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        source = str(runner._load_from or 'the last checkpoint')
        if runner._resume:
            _check_state(checkpoint, source, runner.param_schedulers)
        _forget_foreign_files(checkpoint, runner.work_dir)
        if not isinstance(runner, Runner):  # the model may be sharded
            return
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        checkpoint['state_dict'] = fit(
            checkpoint['state_dict'],
            model,
            source,
            optional=() if self.complete else ('',),
        )


def _check_state(checkpoint: dict, source: str, schedulers: Any) -> None:
    """Check that a training can go on from a checkpoint.

    mmengine begins anew with what is missing: with the warm-up, say.
    """
    if 'state_dict' not in checkpoint:  # of DeepSpeed, which has more files
        return
    wanted = ['optimizer', 'meta', 'message_hub']
    wanted += ['param_schedulers'] * bool(schedulers)
    missing = [key for key in wanted if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f'{source} cannot be resumed from: it has no {", ".join(missing)}'
            '; files named best_ and published ones have none. Take one that '
            'is named by its epoch or iteration, or start from its weights: '
            'name it in load_from, without --resume'
        )


def _forget_foreign_files(checkpoint: dict, work_dir: str) -> None:
    """CheckpointHook deletes the last best one, which a checkpoint names."""
    hub = checkpoint.get('message_hub', {})
    for key, path in list(hub.get('runtime_info', {}).items()):
        if key.startswith('best_ckpt'):
            path = Path(str(path)).resolve()
            here = path.parent == Path(work_dir).resolve()
            if not here or path.suffix != '.pth':
                del hub['runtime_info'][key]
                hub['resumed_keys'].pop(key, None)


@HOOKS.register_module(force=True)
class AverageStatistics(Hook):
    """Averages the running statistics of batch norms over all processes.

    Without SyncBN, every process has those of the images it has seen itself.
    They become equal at the end of epochs, and where training by iterations
    stops for a validation. So do those of the averaged weights of `EMAHook`.
    mmengine's `SyncBuffersHook` is too late for checkpoints of iterations, and
    leaves out the averaged weights.
    """

    priority = 'NORMAL'  # after EMAHook, before CheckpointHook

    def after_train_epoch(self, runner: Runner) -> None:
        models = [runner.model]
        models += [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]
        statistics = [
            buffer
            for model in models
            for name, buffer in model.named_buffers()
            if name.endswith(('running_mean', 'running_var'))
        ]
        all_reduce_params(statistics, op='mean')

    def after_train_iter(
        self, runner: Runner, *args: Any, **kwargs: Any
    ) -> None:
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            if self.every_n_train_iters(runner, loop.val_interval):
                self.after_train_epoch(runner)


@HOOKS.register_module(force=True)
class Reseed(Hook):
    """Makes what is random depend on iteration and process only.

    So a resumed run draws what an undisturbed one would have drawn, and
    processes that train together draw other numbers than each other. Worker
    processes that load data draw on their own: theirs is the same where they
    start anew with every epoch (``persistent_workers=False``).
    """

    priority = 'LOWEST'

    def before_train_epoch(self, runner: Runner) -> None:
        self._seed(runner.seed, runner.iter)

    def before_train_iter(
        self, runner: Runner, *args: Any, **kwargs: Any
    ) -> None:
        # Starting to load data has drawn numbers.
        self._seed(runner.seed, runner.iter)

    def after_train_iter(
        self, runner: Runner, *args: Any, **kwargs: Any
    ) -> None:
        self._seed(runner.seed, runner.iter + 1)

    def after_val_epoch(
        self, runner: Runner, metrics: dict | None = None
    ) -> None:
        self._seed(runner.seed, runner.iter)

    @staticmethod
    def _seed(*numbers: int) -> None:
        sequence = np.random.SeedSequence([*numbers, get_rank()])
        seed = int(sequence.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@HOOKS.register_module(force=True)
class CurvesHook(Hook):
    """Draws the curves when a training is over.

    A training of fewer iterations than are logged is logged more often.
    """

    priority = 'LOWEST'  # when all else is logged

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, LoggerHook):
                half = max(runner.max_iters // 2, 1)
                hook.interval = min(hook.interval, half)

    @master_only
    def after_train(self, runner: Runner) -> None:
        batch_size = runner.cfg.train_dataloader.batch_size
        last = draw_curves(Path(runner.work_dir), batch_size)
        if last:
            runner.logger.info(
                f'{Path(runner.work_dir, "curves.png")}: '
                + ', '.join(f'{name} {last[name]:.4g}' for name in last)
            )
