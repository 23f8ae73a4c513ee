from .backends import check_backend, takes_triton, why_not_triton
from .depthwise import (
    Branch,
    depthwise_conv2d,
    sum_of_branches,
)
from .dynamic_conv import contmix
from .environment import is_compiling
from .feed_forward import feed_forward
from .layer_norm import layer_norm
from .residual_conv import residual_conv
from .response_norm import response_norm, response_scale
from .scaled_residual import scaled_residual
from .squeeze_excite import squeeze_excite
from .update_prior import update_prior

__all__ = [
    'Branch',
    'check_backend',
    'contmix',
    'depthwise_conv2d',
    'feed_forward',
    'is_compiling',
    'layer_norm',
    'residual_conv',
    'response_norm',
    'response_scale',
    'scaled_residual',
    'squeeze_excite',
    'sum_of_branches',
    'takes_triton',
    'update_prior',
    'why_not_triton',
]
