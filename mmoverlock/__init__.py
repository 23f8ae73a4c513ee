"""The OverLoCK backbones for detection, segmentation and classification.

Importing this loads no other package; the names below load theirs when they
are first asked for.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
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
    'config',
    'overlock_b',
    'overlock_s',
    'overlock_t',
    'overlock_xt',
]


def config(name: str) -> str:
    """The file of a config that comes with this package.

    Args:
        name (str): Folder and file, such as 'mask_rcnn/overlock_t_1x.py'.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(__file__).parent / '.mim' / 'configs'
    path = folder / name
    if not path.is_file():
        known = sorted(
            item.relative_to(folder).as_posix()
            for item in folder.glob('[!_]*/*.py')
        )
        raise FileNotFoundError(
            f'mmoverlock has no config {name!r}, but {", ".join(known)}'
        )
    return str(path)


def __getattr__(name: str) -> type | Callable:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    homes = {'ContMixBlock': 'contmix', 'OverLoCK': 'overlock'}
    home = homes.get(name, 'plain')
    return getattr(import_module(f'{__name__}.models.{home}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
