"""Checkpoint files are data: nothing in them runs.

Reads what ``torch.save`` (1.6 or later) and safetensors write, with
``torch.load(weights_only=True)`` and no fallback; mmengine itself loads
unsafely where that fails. What mmengine's checkpoints have beside weights is
allowed here, and nothing of it can call or import.
"""

import os
import re
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Where timm, DeiT and others keep averaged weights, beside those that are
# trained; timm loads these of such a file.
AVERAGED = re.compile('(.+_)?ema(_.+)?')


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def read(source: str) -> dict:
    """Read a checkpoint from a file or URL, to the CPU.

    Args:
        source (str): A file or an http(s) URL. Downloads are kept where torch
            and mmengine keep theirs, in ``torch.hub.get_dir()``.

    Returns:
        dict: The weights by name under the key ``'state_dict'``, and what
        else the file has beside them. If there are averaged weights, as in
        files of timm, they are these.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, if
            it asks for more than data, or has no weights or not finite ones.
        URLError: If the download fails.
    """
    path = _fetch(source)
    hint = f'. Delete {path} to download it again' if '://' in source else ''
    try:
        return _normalize(_read_file(path))
    except CheckpointError as error:
        raise CheckpointError(f'{source} {error}{hint}') from error
    except OSError as error:
        raise CheckpointError(f'{source}: {error}') from error
    except Exception as error:  # damaged bytes can fail in any way
        reason = shorten(f'{type(error).__name__}: {error}', 200)
        raise CheckpointError(
            f'{source} is truncated or damaged ({reason}){hint}'
        ) from error


def dataset_meta(checkpoint: dict) -> dict:
    """The classes that a checkpoint was trained on, and other metadata."""
    meta = checkpoint.get('meta') or {}
    # Before mmengine, the classes were beside other metadata.
    meta = meta.get('dataset_meta') or {
        key: meta[key] for key in ('CLASSES', 'PALETTE') if key in meta
    }
    return {key.lower(): value for key, value in meta.items()}


def load_safely() -> None:
    """Have mmengine load all checkpoints of this process with :func:`read`.

    Its own loaders run what a pickle asks for. Those of zoos and object
    stores, such as ``torchvision://``, are closed.
    """

    def load_from_file_or_url(
        filename: str, map_location: Any = None, logger: Any = None
    ) -> dict:
        return read(filename)

    for prefix in [*CheckpointLoader._schemes]:
        CheckpointLoader.register_scheme(
            prefix, load_from_file_or_url, force=True
        )


def latest_checkpoint(work_dir: str) -> str | None:
    """Find what to resume from: the newest whole checkpoint of a run.

    Files that were copied may have any age. So only those of later epochs or
    iterations are newer than the one that ``last_checkpoint`` names.

    Returns:
        str | None: Its path; None if there is no checkpoint at all.

    Raises:
        CheckpointError: If there were checkpoints, but none is left whole.
    """
    folder = Path(work_dir)
    files = {*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')}
    last, named = folder / 'last_checkpoint', None
    if last.exists() and last.read_text().strip():
        named = Path(last.read_text().strip())  # may be elsewhere
        if (folder / named.name).exists():  # copied, or moved
            named = folder / named.name
        files.add(named)
    ages = {file: file.exists() and -file.stat().st_mtime for file in files}
    newest = sorted(files, key=ages.get)
    if named and named.exists():
        newer = newest[: newest.index(named)]
        later = [file for file in newer if _count(file) > _count(named)]
        newest = dict.fromkeys([*later, named, *newest])
    problems = []
    for file in newest:
        try:
            read(str(file))
        except CheckpointError as error:
            problems.append(str(error))
            print_log(f'not resumed from: {error}')
        else:
            return str(file)
    if problems:
        raise CheckpointError(
            f'{folder} has no whole checkpoint to resume from: '
            + '; '.join(problems)
        )
    return None


def _count(path: Path) -> int:
    """The epoch or iteration in the name of a checkpoint."""
    number = path.stem.rpartition('_')[2]
    return int(number) if number.isdecimal() else -1


def _fetch(source: str) -> str:
    source = os.path.expanduser(source)
    if '://' not in source:
        return source
    if not source.startswith(('http://', 'https://')):
        raise CheckpointError(
            f'{source} is not loaded: give a file or an http(s) URL'
        )
    name = os.path.basename(urlparse(source).path)
    path = Path(torch.hub.get_dir(), 'checkpoints', name)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = os.environ.get('LOCAL_RANK', '0') == '0'  # of this machine
    if not first:
        barrier()
    if not path.exists():
        progress = sys.stderr.isatty()
        torch.hub.download_url_to_file(source, str(path), progress=progress)
    if first:
        barrier()
    return str(path)


def _read_file(path: str) -> dict:
    with open(path, 'rb') as file:
        head = file.read(4)
    if head == b'PK\3\4':
        return _read_zip(path)
    if path.endswith('.safetensors'):
        from safetensors.torch import load_file

        return load_file(path)
    raise CheckpointError(
        f'is no checkpoint: it starts with {head}, unlike what torch.save '
        'has written since torch 1.6'
        if head
        else 'is empty'
    )


def _read_zip(path: str) -> dict:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith('/constants.pkl') for name in names):
            raise CheckpointError('is a TorchScript program, no checkpoint')
        if not any(name.endswith('/data.pkl') for name in names):
            raise CheckpointError('is a zip file, but no checkpoint')
        damaged = archive.testzip()  # torch.load looks at no checksums
        if damaged:
            raise ValueError(f'wrong checksum of {damaged}')
    with safe_globals(_SAFE_GLOBALS):
        foreign = get_unsafe_globals_in_checkpoint(path)
        if foreign:
            raise CheckpointError(
                f'is refused: it asks for {", ".join(sorted(foreign))}, which '
                'is no data and could run code'
            )
        return torch.load(path, 'cpu', weights_only=True)


def _normalize(checkpoint: dict) -> dict:
    """Bring what a file holds into mmengine's form, and check the weights."""
    checkpoint = dict(checkpoint)
    _take_averaged(checkpoint)
    if 'model' in checkpoint:
        checkpoint.setdefault('state_dict', checkpoint.pop('model'))
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint}
    if 'meta' in checkpoint:
        # Runner.resume runs the config that mmcv put there.
        meta = {k: v for k, v in checkpoint['meta'].items() if k != 'config'}
        checkpoint['meta'] = meta
    state = checkpoint['state_dict']
    weights = OrderedDict()
    for name, value in state.items():
        if isinstance(value, Tensor):
            name = _plain_name(name)
            if name in weights:
                raise CheckpointError(f'has {name} twice, of two models')
            weights[name] = value
    if not weights:
        keys = ', '.join([*state][:5]) or 'nothing'
        raise CheckpointError(f'has no weights, but {keys}')
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise CheckpointError(
                f'has NaN or infinite values in {name}; an earlier checkpoint '
                'of the training may not'
            )
    weights._metadata = getattr(state, '_metadata', OrderedDict())
    checkpoint['state_dict'] = weights
    return checkpoint


def _plain_name(name: str) -> str:
    """Without what DistributedDataParallel and torch.compile put before it."""
    return name.replace('_orig_mod.', '').removeprefix('module.')


def _take_averaged(checkpoint: dict) -> None:
    """Put averaged weights in place of trained ones, and say what is taken."""
    found = [key for key in checkpoint if AVERAGED.fullmatch(str(key))]
    hook = 'ema_state_dict'  # of EMAHook, which swaps them
    if hook in found and {'meta', 'state_dict'} <= checkpoint.keys():
        text = 'in the checkpoint, the weights of state_dict are averaged ones'
        print_log(text, 'current')
        found.remove(hook)
    trained = checkpoint.get('state_dict', checkpoint.get('model'))
    names = {*map(_plain_name, _weights_in(trained))}
    for key in found:
        averaged = _weights_in(checkpoint[key])
        own = {*map(_plain_name, averaged)}
        if averaged and (names & own or not names):
            print_log(f'of the checkpoint, {key} is taken', 'current')
            checkpoint['state_dict'] = averaged
            del checkpoint[key]
            names = {None}  # of which no other has any
        elif averaged or _lists_weights(checkpoint[key]):
            print_log(f'of the checkpoint, {key} is left out', 'current')


def _weights_in(value: Any) -> dict:
    """The weights that a value holds, itself or beside what counts them."""
    if not isinstance(value, dict):
        return {}
    inner = [item for item in value.values() if isinstance(item, dict)]

    def count(state: dict) -> int:
        return sum(isinstance(item, Tensor) for item in state.values())

    found = max([value, *inner], key=count)
    return found if count(found) else {}


def _lists_weights(value: Any) -> bool:
    """Whether there are weights without names, which nothing can load."""
    lists = value.values() if isinstance(value, dict) else [value]
    items = (item for part in lists if isinstance(part, list) for item in part)
    return any(isinstance(item, Tensor) for item in items)


# --------------------------------------------- what checkpoints may ask for


class _History(HistoryBuffer):
    """Made with its own methods, not with those that a pickle asks for."""

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        self.__init__(
            state['_log_history'], state['_count_history'], state['max_length']
        )


def _getattr(owner: object, name: str) -> None:
    """Asked for by the methods of a HistoryBuffer."""


def _dtype(code: str, *_: object) -> np.dtype:
    # Others have fields, or objects in place of bytes. A copy could be given
    # such.
    if code not in _DTYPES:
        raise ValueError(f'dtype {code}')
    return np.dtype(code)


def _array(*_: object) -> np.ndarray:
    return np.empty(0)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype)[0]


# With the names that pickles have for them. Without a dot, a name is out of
# reach: instances may be filled, but not made by calling the type.
_SAFE_GLOBALS = [
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_getattr, 'builtins.getattr'),
    (_dtype, 'numpy.dtype'),
    (_array, 'numpy.ndarray'),
    (np.ndarray, 'ndarray'),
    Namespace,
    bytes,
]
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    _SAFE_GLOBALS += [
        (_array, f'{_module}._reconstruct'),
        (_scalar, f'{_module}.scalar'),
    ]
_DTYPES = 'b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8'.split()
_SAFE_GLOBALS += [(type(np.dtype(code)), code) for code in _DTYPES]
