from .backends import check_backend, takes_triton, why_not_triton
from .batch_norm import Norm, sync_batch_norm
from .common import cast_as_convolutions, convolution_dtype
from .conv3x3 import residual_conv
from .conv3x3_norm import conv_norm
from .depthwise import (
    Branch,
    depthwise_conv2d,
    sum_of_branches,
)
from .dynamic_conv import contmix, enlarged_size
from .environment import is_compiling, is_proxied, is_traced
from .excitation import squeeze_excite
from .ffn import feed_forward
from .grn import response_norm, response_scale
from .layernorm import layer_norm
from .prior import update_prior
from .residual import scaled_residual

__all__ = [
    'Branch',
    'Norm',
    'cast_as_convolutions',
    'check_backend',
    'contmix',
    'conv_norm',
    'convolution_dtype',
    'depthwise_conv2d',
    'enlarged_size',
    'feed_forward',
    'is_compiling',
    'is_proxied',
    'is_traced',
    'layer_norm',
    'residual_conv',
    'response_norm',
    'response_scale',
    'scaled_residual',
    'squeeze_excite',
    'sum_of_branches',
    'sync_batch_norm',
    'takes_triton',
    'update_prior',
    'why_not_triton',
]
