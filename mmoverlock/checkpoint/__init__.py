from .reading import CheckpointError, latest_checkpoint, load_safely, read
from .writing import SafeBackend, save_safely

__all__ = [
    'CheckpointError',
    'SafeBackend',
    'latest_checkpoint',
    'load_safely',
    'read',
    'save_safely',
]
