"""All that mmengine can name: to import this registers it, and OverLoCK."""

from .hooks import AverageStatistics, CurvesHook, LoadingCheck, Reseed
from .optimizers import CPUAmpOptimWrapper, LayerDecayOptimWrapperConstructor
from .strategy import ResumableFSDPStrategy, overlock_wrap_policy

__all__ = [
    'AverageStatistics',
    'CPUAmpOptimWrapper',
    'CurvesHook',
    'LayerDecayOptimWrapperConstructor',
    'LoadingCheck',
    'Reseed',
    'ResumableFSDPStrategy',
    'overlock_wrap_policy',
]
