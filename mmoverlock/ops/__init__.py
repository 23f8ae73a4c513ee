from .contmix import contmix
from .depthwise import Branch, depthwise_conv2d, sum_of_branches

__all__ = ['Branch', 'contmix', 'depthwise_conv2d', 'sum_of_branches']
