"""All that mmengine can name: to import this registers it, and OverLoCK."""

from .averaging import ForeachExponentialMovingAverage
from .hooks import AverageStatistics, CurvesHook, LoadingCheck, Reseed
from .optimizers import (
    CPUAmpOptimWrapper,
    GroupedOptimWrapperConstructor,
    LayerDecayOptimWrapperConstructor,
)
from .parallel import ForeachDistributedDataParallel
from .strategy import ResumableFSDPStrategy, overlock_wrap_policy

__all__ = [
    'AverageStatistics',
    'CPUAmpOptimWrapper',
    'CurvesHook',
    'ForeachDistributedDataParallel',
    'ForeachExponentialMovingAverage',
    'GroupedOptimWrapperConstructor',
    'LayerDecayOptimWrapperConstructor',
    'LoadingCheck',
    'Reseed',
    'ResumableFSDPStrategy',
    'overlock_wrap_policy',
]
