from .dynamic_conv import contmix
from .depthwise import (
    Branch,
    check_depthwise_backend,
    depthwise_conv2d,
    sum_of_branches,
)
from .environment import is_compiling

__all__ = [
    'Branch',
    'check_depthwise_backend',
    'contmix',
    'depthwise_conv2d',
    'is_compiling',
    'sum_of_branches',
]
