"""The OverLoCK backbones for detection, segmentation and classification."""

__version__ = '0.1.0'
