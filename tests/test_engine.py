"""What mmengine can name, and what the tools add to a runner."""

from mmengine.config import Config
from mmengine.registry import (
    FUNCTIONS,
    HOOKS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    STRATEGIES,
)

from mmoverlock import cli, engine

NAMES = {
    'AverageStatistics': HOOKS,
    'CPUAmpOptimWrapper': OPTIM_WRAPPERS,
    'CurvesHook': HOOKS,
    'ForeachDistributedDataParallel': MODEL_WRAPPERS,
    'ForeachExponentialMovingAverage': MODELS,
    'GroupedOptimWrapperConstructor': OPTIM_WRAPPER_CONSTRUCTORS,
    'LayerDecayOptimWrapperConstructor': OPTIM_WRAPPER_CONSTRUCTORS,
    'LoadingCheck': HOOKS,
    'Reseed': HOOKS,
    'ResumableFSDPStrategy': STRATEGIES,
    'overlock_wrap_policy': FUNCTIONS,
}


def test_names():
    """All that the package has is there under its name, and OverLoCK."""
    assert sorted(NAMES) == engine.__all__
    for name, registry in NAMES.items():
        assert registry.module_dict[name] is getattr(engine, name)
    assert MODELS.get('OverLoCK').__module__ == 'mmoverlock.models.overlock'


def test_hooks_of_tools(tmp_path):
    """Each of them once, also those that the config names."""
    cfg = Config(
        dict(
            work_dir=str(tmp_path),
            launcher='none',
            model=dict(type='BaseDataPreprocessor'),
            custom_hooks=[dict(type='Reseed'), dict(type='CurvesHook')],
        )
    )
    runner = cli.build_runner(cfg, complete=True)
    hooks = [type(hook).__name__ for hook in runner.hooks]
    ours = [name for name in hooks if NAMES.get(name) is HOOKS]
    assert sorted(ours) == sorted(n for n in NAMES if NAMES[n] is HOOKS)
    assert ours[0] == 'LoadingCheck'
    assert hooks.index('AverageStatistics') < hooks.index('CheckpointHook')
