"""Hooks for the processes that test_distributed.py starts."""

import torch
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm


def save(runner, **values):
    torch.save(values, f'{runner.work_dir}/rank_{get_rank()}.pth')


@HOOKS.register_module()
class SaveRank(Hook):
    """Saves what a process under DDP has in the end: work dir/rank_N.pth."""

    def __init__(self):
        self.losses = []
        self.seeds = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(outputs['loss'].item())
        self.seeds.append(torch.initial_seed())

    def after_train(self, runner):
        model = runner.model.module
        state = model.state_dict()
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                averaged = hook.ema_model.module.state_dict()
                state |= {f'ema.{k}': v for k, v in averaged.items()}
        norms = (m for m in model.modules() if isinstance(m, _BatchNorm))
        save(
            runner,
            wrapper=type(runner.model).__name__,
            find_unused=runner.model.find_unused_parameters,
            norms={type(norm).__name__ for norm in norms},
            losses=self.losses,
            numel=sum(p.numel() for p in model.parameters()),
            seeds=self.seeds,
            state=state,
        )


@HOOKS.register_module()
class SaveUnits(Hook):
    """Saves what FSDP has made of the model: work dir/rank_N.pth."""

    def after_train(self, runner):
        units = [
            type(m.module).__name__
            for m in runner.model.modules()
            if isinstance(m, FullyShardedDataParallel)
        ]
        numel = sum(p.numel() for p in runner.model.parameters())
        save(runner, units=units, numel=numel)
