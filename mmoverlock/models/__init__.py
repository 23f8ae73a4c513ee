from .overlock import OverLoCK
from .variants import OverLoCKVariant

__all__ = ['OverLoCK', 'OverLoCKVariant']
