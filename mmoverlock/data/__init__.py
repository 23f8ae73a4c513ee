"""Data that cannot be used ends a run with an error that names the file.

mmdet leaves some annotations out in silence, OpenCV before 4.12 fills images
that are cut off with gray, and many errors of data pipelines name no file.
"""

from .config import check_data, unwrap
from .files import DataError, Finding
from .runner import checked

__all__ = ['DataError', 'Finding', 'check_data', 'checked', 'unwrap']
