"""A training that is killed leaves whole checkpoints to go on from.

mmengine writes a checkpoint in place, and removes an old one before it writes
the next: what is killed meanwhile, or finds the disk full, may leave nothing
to go on from.
"""

import os
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend


class SafeBackend(LocalBackend):
    """Local files of which none is ever half written.

    A checkpoint that is to be removed stays until the next file is written.
    """

    _obsolete = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write to a file beside the old one, then take its place.

        Raises:
            OSError: If that fails; the old file, if any, is untouched.
        """
        path = Path(filepath)
        part = path.with_name(f'{path.name}.part')
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        while self._obsolete:
            old = self._obsolete.pop()
            if old != path:
                old.unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        if Path(filepath).suffix == '.pth':
            self._obsolete.append(Path(filepath))
        else:
            super().remove(filepath)


def save_safely() -> None:
    """Have mmengine write all local files of this process that way."""
    register_backend('local', SafeBackend, force=True, prefixes='')


def remove_unfinished(work_dir: str) -> None:
    """Remove what a run that was killed had not written to the end."""
    for part in Path(work_dir).glob('*.pth.part'):
        part.unlink(missing_ok=True)
