from .backends import check_backend, takes_triton, why_not_triton
from .common import cast_as_convolutions
from .conv_norm import conv_norm
from .depthwise import (
    Branch,
    depthwise_conv2d,
    sum_of_branches,
)
from .dynamic_conv import contmix
from .environment import is_compiling
from .feed_forward import feed_forward
from .layer_norm import layer_norm
from .pointwise import pointwise_conv, round_parameters
from .residual_conv import residual_conv
from .response_norm import response_norm, response_scale
from .scaled_residual import scaled_residual
from .squeeze_excite import squeeze_excite
from .update_prior import update_prior

__all__ = [
    'Branch',
    'cast_as_convolutions',
    'check_backend',
    'contmix',
    'conv_norm',
    'depthwise_conv2d',
    'feed_forward',
    'is_compiling',
    'layer_norm',
    'pointwise_conv',
    'residual_conv',
    'response_norm',
    'response_scale',
    'round_parameters',
    'scaled_residual',
    'squeeze_excite',
    'sum_of_branches',
    'takes_triton',
    'update_prior',
    'why_not_triton',
]
