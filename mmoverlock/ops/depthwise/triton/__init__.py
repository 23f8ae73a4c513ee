"""Large depthwise convolutions and their dilated companions, for GPUs."""

from .branches import sum_of_branches
from .conv2d import depthwise_conv2d

__all__ = ['depthwise_conv2d', 'sum_of_branches']
