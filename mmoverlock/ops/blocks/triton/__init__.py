"""Blocks as one node: the launches of their parts, and their gradients."""

from .focus import focus_block
from .repconv import repconv_block

__all__ = ['focus_block', 'repconv_block']
