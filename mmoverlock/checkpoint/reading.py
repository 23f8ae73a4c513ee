"""Checkpoint files are data: nothing in them runs.

Reads what ``torch.save`` (1.6 or later) and safetensors write, without
``torch.load``. Its safe mode differs by version: some cannot read the training
state of mmengine, some run TorchScript archives, all build numpy types from
unchecked bytes where mmengine allows them to, and none looks at checksums.
mmengine itself loads unsafely where the safe mode fails.
"""

import io
import json
import math
import os
import pickle
import pickletools
import re
import sys
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def read(source: str) -> dict:
    """Read a checkpoint from a file or URL, to the CPU.

    Args:
        source (str): A file or an http(s) URL. Downloads are kept where torch
            and mmengine keep theirs, in ``torch.hub.get_dir()``.

    Returns:
        dict: The weights by name under the key ``'state_dict'``, and what
        else the file has beside them.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, if
            it asks for more than data, or has no weights or not finite ones.
        URLError: If the download fails.
    """
    path = _fetch(source)
    hint = f'. Delete {path} to download it again' if '://' in source else ''
    try:
        checkpoint = _normalize(_read_file(path))
    except CheckpointError as error:
        raise CheckpointError(f'{source} {error}{hint}') from error
    except OSError as error:
        raise CheckpointError(f'{source}: {error}') from error
    except Exception as error:  # damaged bytes can fail in any way
        raise CheckpointError(
            f'{source} is truncated or damaged '
            f'({type(error).__name__}: {error}){hint}'
        ) from error
    return checkpoint


def load_safely() -> None:
    """Have mmengine load all checkpoints of this process with :func:`read`.

    Its own loaders run what a pickle asks for. Those of zoos and object
    stores, such as ``torchvision://``, are closed.
    """

    def load_from_file_or_url(filename, map_location=None, logger=None):
        return read(filename)

    for prefix in [*CheckpointLoader._schemes]:
        CheckpointLoader.register_scheme(
            prefix, load_from_file_or_url, force=True
        )


def latest_checkpoint(work_dir: str) -> str | None:
    """Find what to resume from.

    Args:
        work_dir (str): Folder of a run.

    Returns:
        str | None: The newest whole checkpoint; None if there is none at all.

    Raises:
        CheckpointError: If there were checkpoints, but none is left whole.
    """
    folder = Path(work_dir)
    files = {*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')}
    last = folder / 'last_checkpoint'  # may name a file elsewhere
    if last.exists() and last.read_text().strip():
        files.add(Path(last.read_text().strip()))
    problems = [
        f'{file} does not exist' for file in files if not file.exists()
    ]
    files = [file for file in files if file.exists()]
    for file in sorted(files, key=os.path.getmtime, reverse=True):
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


def _fetch(source):
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


def _read_file(path):
    with open(path, 'rb') as file:
        head = file.read(4)
        file.seek(0)
        if head == b'PK\3\4':
            return _read_zip(file)
        if path.endswith('.safetensors'):
            return _read_safetensors(file)
    raise CheckpointError(
        f'is no checkpoint: it starts with {head}, unlike what torch.save '
        'has written since torch 1.6'
        if head
        else 'is empty'
    )


def _normalize(checkpoint):
    """Bring what a file holds into mmengine's form, and check the weights."""
    checkpoint = dict(checkpoint)
    if 'state_dict' not in checkpoint:
        weights = checkpoint.pop('model', checkpoint)
        rest = {} if weights is checkpoint else checkpoint
        checkpoint = {**rest, 'state_dict': weights}
    if 'meta' in checkpoint:
        # Runner.resume runs the config that mmcv put there.
        meta = {k: v for k, v in checkpoint['meta'].items() if k != 'config'}
        checkpoint['meta'] = meta
    state = checkpoint['state_dict']
    weights = OrderedDict(
        (name.removeprefix('module.'), value)
        for name, value in state.items()
        if isinstance(value, Tensor)
    )
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


def _read_safetensors(file):
    length = int.from_bytes(file.read(8), 'little')
    entries = json.loads(file.read(length).decode())
    entries.pop('__metadata__', None)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    weights, end = {}, 0
    for name, entry in sorted(
        entries.items(), key=lambda item: item[1]['data_offsets']
    ):
        start, stop = entry['data_offsets']
        if start != end:
            raise ValueError(f'{name} does not follow the tensor before it')
        # A copy, because views need alignment.
        flat = data[start:stop].clone().view(_DTYPES[entry['dtype']])
        weights[name] = flat.reshape(entry['shape'])
        end = stop
    if end != len(data):
        raise ValueError('the sizes of tensors and file differ')
    return weights


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickles = [name for name in sizes if name.endswith('/data.pkl')]
        if any(name.endswith('/constants.pkl') for name in sizes):
            raise CheckpointError('is a TorchScript program, no checkpoint')
        if len(pickles) != 1:
            raise CheckpointError('is a zip file, but no checkpoint')
        if sum(sizes.values()) > os.fstat(file.fileno()).st_size:
            raise ValueError('what is in it is larger than the file')
        folder = pickles[0].removesuffix('data.pkl')
        order = f'{folder}byteorder'
        if order in sizes and archive.read(order) != b'little':
            raise CheckpointError('is not in little-endian byte order')
        return _Unpickler(archive, folder).load()


class _Unpickler(pickle._Unpickler):
    """Makes plain data, tensors and the objects in mmengine's checkpoints.

    A pickle is a program. What it may call is in ``_ALLOWED``: harmless
    classes, and functions of this module in place of the real ones; what it
    may fill after making it, in :meth:`load_build`.

    Args:
        archive (ZipFile): The checkpoint.
        folder (str): What its names start with.
    """

    # Of protocol 2, torch.save's. The others take more memory, or names that
    # are paths.
    dispatch = {
        ord(opcode.code): pickle._Unpickler.dispatch[ord(opcode.code)]
        for opcode in pickletools.opcodes
        if opcode.proto <= 2
    }

    def __init__(self, archive, folder):
        # Reading all of it checks its checksum.
        super().__init__(io.BytesIO(archive.read(f'{folder}data.pkl')))
        self.archive = archive
        self.folder = folder
        self.storages = {}

    def load_proto(self):
        (protocol,) = self.read(1)
        if protocol != 2:
            raise CheckpointError(
                f'is of pickle protocol {protocol}, not of 2 as torch.save '
                'has it unless told otherwise'
            )

    dispatch[pickle.PROTO[0]] = load_proto

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f'is refused: it asks for {module}.{name}, which is no data '
                'and could run code'
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, size = pid
        if not isinstance(key, str):
            raise TypeError(f'{type(key).__name__} as a name')
        if key not in self.storages:
            data = bytearray(self.archive.read(f'{self.folder}data/{key}'))
            self.storages[key] = (
                torch.frombuffer(data, dtype=torch.uint8)
                if data
                else torch.empty(0, dtype=torch.uint8)
            )
        storage = self.storages[key].view(dtype)
        if len(storage) != size:
            raise ValueError(f'{key} has another size')
        return storage

    def load_build(self):
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, OrderedDict):
            made._metadata = state['_metadata']
        elif isinstance(made, Namespace):
            vars(made).update(state)
        elif isinstance(made, HistoryBuffer):
            made.__init__(
                state['_log_history'],
                state['_count_history'],
                state['max_length'],
            )
        elif isinstance(made, np.ndarray):
            _, shape, dtype, fortran, data = state
            shape = _values(dtype, data).reshape(shape).shape
            made.__setstate__((1, shape, dtype, bool(fortran), data))
        elif not isinstance(made, np.dtype) or state[1] not in ('<', '|'):
            raise ValueError(f'cannot fill a {type(made).__name__}')

    dispatch[pickle.BUILD[0]] = load_build


def _encode(text, encoding):
    """How bytes are pickled."""
    return text.encode('latin1')


def _no_bytes():
    return b''


def _getattr(owner, name):
    """Asked for by HistoryBuffer's methods, which are not restored."""


def _tensor(storage, offset, size, stride, *_):
    if math.prod(size) > len(storage):
        raise ValueError('a tensor is larger than its storage')
    return storage.as_strided(size, stride, offset)


def _parameter(tensor, *_):
    return tensor


def _dtype(code, *_):
    # Others have fields, or objects in place of bytes.
    if not re.fullmatch('b1|[iu][1248]|f[248]', code):
        raise ValueError(f'dtype {code}')
    return np.dtype(code)


def _array(*_):
    return np.empty(0)


def _scalar(dtype, data):
    return _values(dtype, data)[0]


def _values(dtype, data):
    if not isinstance(dtype, np.dtype):  # a text, which numpy would parse
        raise TypeError(f'{type(dtype).__name__} in place of a dtype')
    return np.frombuffer(data, dtype)


_ALLOWED = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('collections', 'Counter'): Counter,
    ('collections', 'deque'): deque,
    ('__builtin__', 'set'): set,
    ('__builtin__', 'bytes'): _no_bytes,
    ('__builtin__', 'getattr'): _getattr,
    ('_codecs', 'encode'): _encode,
    ('argparse', 'Namespace'): Namespace,
    ('mmengine.logging.history_buffer', 'HistoryBuffer'): HistoryBuffer,
    ('numpy', 'dtype'): _dtype,
    ('numpy', 'ndarray'): None,  # only ever an argument of _reconstruct
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _parameter,
}
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    _ALLOWED[_module, '_reconstruct'] = _array
    _ALLOWED[_module, 'scalar'] = _scalar

_DTYPES = {}  # by their names in safetensors
for _name, _storage, _value in (
    ('F64', 'Double', torch.float64),
    ('F32', 'Float', torch.float32),
    ('F16', 'Half', torch.float16),
    ('BF16', 'BFloat16', torch.bfloat16),
    ('I64', 'Long', torch.int64),
    ('I32', 'Int', torch.int32),
    ('I16', 'Short', torch.int16),
    ('I8', 'Char', torch.int8),
    ('U8', 'Byte', torch.uint8),
    ('BOOL', 'Bool', torch.bool),
):
    _DTYPES[_name] = _value
    _ALLOWED['torch', f'{_storage}Storage'] = _value
