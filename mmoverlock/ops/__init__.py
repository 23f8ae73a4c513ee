from .contmix import contmix
from .depthwise import Branch, depthwise_conv2d, sum_of_branches
from .tracing import is_compiling

__all__ = [
    'Branch',
    'contmix',
    'depthwise_conv2d',
    'is_compiling',
    'sum_of_branches',
]
