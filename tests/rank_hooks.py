"""A hook for the processes that test_distributed.py starts."""

from collections import Counter

import torch
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm


@HOOKS.register_module()
class SaveRank(Hook):
    """Saves what a process has in the end: work dir/rank_N.pth."""

    def __init__(self):
        self.losses = []
        self.seeds = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(outputs['loss'].item())
        self.seeds.append(torch.initial_seed())

    def after_train(self, runner):
        model = runner.model
        units = Counter(
            type(module.module).__name__
            for module in model.modules()
            if isinstance(module, FullyShardedDataParallel)
        )
        # Of FSDP, only all processes together could say.
        state = {} if units else model.module.state_dict()
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                averaged = hook.ema_model.module.state_dict()
                state |= {f'ema.{k}': v for k, v in averaged.items()}
        norms = (m for m in model.modules() if isinstance(m, _BatchNorm))
        saved = dict(
            wrapper=type(model).__name__,
            find_unused=getattr(model, 'find_unused_parameters', None),
            norms={type(norm).__name__ for norm in norms},
            losses=self.losses,
            numel=sum(p.numel() for p in model.parameters()),
            seeds=self.seeds,
            state=state,
            units=units,
        )
        torch.save(saved, f'{runner.work_dir}/rank_{get_rank()}.pth')
