from .reading import CheckpointError, latest_checkpoint, load_safely, read
from .writing import SafeBackend, remove_unfinished, save_safely

__all__ = [
    'CheckpointError',
    'SafeBackend',
    'latest_checkpoint',
    'load_safely',
    'read',
    'remove_unfinished',
    'save_safely',
]
