from .reading import (
    CheckpointError,
    dataset_meta,
    latest_checkpoint,
    load_safely,
    read,
)
from .writing import SafeBackend, remove_unfinished, save_safely

__all__ = [
    'CheckpointError',
    'SafeBackend',
    'dataset_meta',
    'latest_checkpoint',
    'load_safely',
    'read',
    'remove_unfinished',
    'save_safely',
]
