from .contmix import contmix
from .depthwise import depthwise_conv2d

__all__ = ['contmix', 'depthwise_conv2d']
