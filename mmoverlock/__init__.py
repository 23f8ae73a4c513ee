"""The OverLoCK backbones for detection, segmentation and classification.

Importing this loads no other package; the names below load theirs when they
are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import OverLoCK
    from .models.contmix import ContMixBlock
    from .models.plain import (
        OverLoCKClassifier,
        overlock_b,
        overlock_s,
        overlock_t,
        overlock_xt,
    )

__version__ = '0.1.0'
__all__ = [
    'ContMixBlock',
    'OverLoCK',
    'OverLoCKClassifier',
    'overlock_b',
    'overlock_s',
    'overlock_t',
    'overlock_xt',
]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    homes = {'ContMixBlock': 'contmix', 'OverLoCK': 'overlock'}
    home = homes.get(name, 'plain')
    return getattr(import_module(f'{__name__}.models.{home}'), name)


def __dir__():
    return sorted({*globals(), *__all__})
