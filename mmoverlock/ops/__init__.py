from .common import takes_triton
from .depthwise import (
    Branch,
    check_depthwise_backend,
    depthwise_conv2d,
    sum_of_branches,
)
from .dynamic_conv import contmix
from .environment import is_compiling
from .feed_forward import feed_forward
from .layer_norm import layer_norm
from .residual_conv import residual_conv

__all__ = [
    'Branch',
    'check_depthwise_backend',
    'contmix',
    'depthwise_conv2d',
    'feed_forward',
    'is_compiling',
    'layer_norm',
    'residual_conv',
    'sum_of_branches',
    'takes_triton',
]
