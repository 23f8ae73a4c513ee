"""Names for mmengine, and hooks that the tools add to a runner."""

import pytest
import torch
from mmengine import registry
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmoverlock import cli, engine

NAMES = {
    'AverageStatistics': registry.HOOKS,
    'CPUAmpOptimWrapper': registry.OPTIM_WRAPPERS,
    'CurvesHook': registry.HOOKS,
    'ForeachDistributedDataParallel': registry.MODEL_WRAPPERS,
    'ForeachExponentialMovingAverage': registry.MODELS,
    'GroupedOptimWrapperConstructor': registry.OPTIM_WRAPPER_CONSTRUCTORS,
    'LayerDecayOptimWrapperConstructor': registry.OPTIM_WRAPPER_CONSTRUCTORS,
    'LoadingCheck': registry.HOOKS,
    'Reseed': registry.HOOKS,
    'ResumableFSDPStrategy': registry.STRATEGIES,
    'overlock_wrap_policy': registry.FUNCTIONS,
}


def test_names():
    """All that the package has is there under its name, and OverLoCK."""
    assert sorted(NAMES) == engine.__all__
    for name, kinds in NAMES.items():
        assert kinds.module_dict[name] is getattr(engine, name)
    assert 'OverLoCK' in registry.MODELS


def test_hooks_of_tools(tmp_path):
    """Each of them once, also those that the config names."""
    cfg = dict(
        work_dir=str(tmp_path),
        launcher='none',
        model=dict(type='BaseDataPreprocessor'),
        custom_hooks=[dict(type='Reseed'), dict(type='CurvesHook')],
    )
    runner = cli.build_runner(Config(cfg), complete=True)
    hooks = [type(hook).__name__ for hook in runner.hooks]
    ours = [name for name in NAMES if NAMES[name] is registry.HOOKS]
    assert [hooks.count(name) for name in ours] == [1] * 4
    loading, averaging, saving = map(
        hooks.index, ('LoadingCheck', 'AverageStatistics', 'CheckpointHook')
    )
    assert loading < averaging < saving


def test_scaled_rates(tmp_path):
    """By the images of a step, for which gradients are accumulated."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = dict(type='SGD', lr=0.1)
    cfg = dict(
        work_dir=str(tmp_path),
        launcher='none',
        model=dict(type='BaseDataPreprocessor'),
        train_dataloader=dict(batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=optimizer, accumulative_counts=4),
        auto_scale_lr=dict(enable=True, base_batch_size=16),
    )
    runner = cli.build_runner(Config(cfg), complete=False)
    wrapper = OptimWrapper(torch.optim.SGD([weight], lr=0.1))
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    assert wrapper.get_lr()['lr'] == [pytest.approx(0.05)]
    assert runner.cfg.auto_scale_lr.base_batch_size == 16
