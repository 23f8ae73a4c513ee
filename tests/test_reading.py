"""Reading files: what is in them comes out, and nothing in them runs."""

import io
import json
import os
import pickle
import random
import re
import struct
import sys
import tracemalloc
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from urllib.error import URLError

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmoverlock.checkpoint import CheckpointError, read, reading


def training_state():
    """What mmengine keeps in a checkpoint, in small."""
    history = HistoryBuffer()
    for value in (1.5, 2.5):
        history.update(value)
    layer = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    return {
        'meta': {'epoch': 1, 'iter': 2, 'cfg': 'a = 1', 'time': b'raw'},
        'state_dict': layer.state_dict(),
        'message_hub': {
            'log_scalars': OrderedDict(
                {'train/loss': history, 'empty': HistoryBuffer()}
            ),
            'runtime_info': OrderedDict(eta=np.float64(3), step=np.int32(4)),
            'resumed_keys': OrderedDict(eta=True),
        },
        'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}},
        'param_schedulers': [{'milestones': Counter({8: 1, 11: 1})}],
        'args': Namespace(lr=0.1),
        'ids': deque([1, 2], maxlen=2),
        'names': {'a'},
    }


def saved(path, contents):
    torch.save(contents, path)
    return str(path)


def with_pickle(path, pickled, entries=()):
    """A checkpoint file with any pickle in it."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', pickled)
        for name, data in entries:
            archive.writestr(f'archive/{name}', data)
    return str(path)


# ------------------------------------------------------------ what comes out


def test_training_state(tmp_path):
    written = training_state()
    contents = read(saved(tmp_path / 'a.pth', written))
    assert contents.keys() == written.keys()
    for key in ('meta', 'param_schedulers', 'args', 'ids', 'names'):
        assert contents[key] == written[key]
        assert type(contents[key]) is type(written[key])
    assert contents['ids'].maxlen == 2
    state = contents['state_dict']
    assert list(state) == list(written['state_dict'])
    for name, value in written['state_dict'].items():
        assert torch.equal(state[name], value)
        assert state[name].dtype == value.dtype
    assert state._metadata == written['state_dict']._metadata
    hub, expected = contents['message_hub'], written['message_hub']
    assert hub['runtime_info'] == expected['runtime_info']
    assert isinstance(hub['runtime_info']['eta'], np.float64)
    for name, history in hub['log_scalars'].items():
        for key in ('_log_history', '_count_history'):
            value = getattr(history, key)
            np.testing.assert_array_equal(
                value, getattr(expected['log_scalars'][name], key)
            )
    history = hub['log_scalars']['train/loss']
    history.update(6.5)  # what was read can be gone on with
    assert (history.mean(), history.max_length) == (3.5, 1000000)
    assert history.statistics('max') == 6.5
    moments = contents['optimizer']['state'][0]['exp_avg']
    assert torch.equal(moments, torch.ones(2))


@pytest.mark.parametrize(
    'array',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype='i2').reshape(2, 3)),
        np.zeros((0, 3), bool),
        np.float32([1, 2]),
        np.array(7, 'u8'),
    ],
)
def test_arrays(tmp_path, array):
    path = saved(
        tmp_path / 'a.pth',
        {'model': torch.nn.Linear(1, 1).state_dict(), 'array': array},
    )
    result = read(path)['array']
    np.testing.assert_array_equal(result, array)
    assert result.dtype == array.dtype
    assert result.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize(
    'dtype', [dtype for name, dtype in reading._DTYPES.items()]
)
def test_tensors(tmp_path, dtype):
    base = torch.arange(24).reshape(4, 6).to(dtype)
    state = {
        'plain': base,
        'transposed': base.T,
        'slice': base[1:3, ::2],
        'alias': base,
        'scalar': base[0, 1],
        'empty': base[:0],
        'parameter': nn.Parameter(base, requires_grad=False),
    }
    result = read(saved(tmp_path / 'a.pth', state))['state_dict']
    for name, value in state.items():
        assert torch.equal(result[name], value), name
        assert result[name].dtype == dtype
    assert result['alias'].data_ptr() == result['plain'].data_ptr()


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'state_dict': state, 'meta': {}},
        lambda state: {'model': state, 'epoch': 1},
        lambda state: {f'module.{name}': v for name, v in state.items()},
    ],
)
def test_where_weights_are(tmp_path, wrap):
    state = nn.Linear(2, 2).state_dict()
    contents = read(saved(tmp_path / 'a.pth', wrap(state)))
    assert list(contents['state_dict']) == ['weight', 'bias']
    assert 'model' not in contents


# ------------------------------------------------------------- safetensors


def safetensors(path, tensors, header=None, data=None):
    entries, body = {'__metadata__': {'format': 'pt'}}, b''
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        names = {v: k for k, v in reading._DTYPES.items()}
        entries[name] = {
            'dtype': names[tensor.dtype],
            'shape': list(tensor.shape),
            'data_offsets': [len(body), len(body) + len(raw)],
        }
        body += raw
    entries.update(header or {})
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + (data or body))
    return str(path)


def test_safetensors(tmp_path):
    state = {
        'odd': torch.tensor([1], dtype=torch.int8),  # misaligns the next
        'weight': torch.randn(2, 3),
        'half': torch.randn(5).bfloat16(),
        'empty': torch.zeros(0, 2),
    }
    path = safetensors(tmp_path / 'a.safetensors', state)
    contents = read(path)
    assert contents.keys() == {'state_dict'}
    for name, value in state.items():
        assert torch.equal(contents['state_dict'][name], value), name


@pytest.mark.parametrize(
    'header, data',
    [
        ({'a': {'dtype': 'F32', 'shape': [9], 'data_offsets': [0, 36]}}, None),
        ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [-4, 4]}}, None),
        ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}}, None),
        ({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}, None),
        ({'a': {'dtype': 'X', 'shape': [1], 'data_offsets': [0, 4]}}, None),
        ({'a': {'dtype': 'F32', 'shape': '', 'data_offsets': [0, 4]}}, None),
        (
            {'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}},
            bytes(12),
        ),
        ({'a': 3}, None),
        ({}, b'1'),
        ({}, b'123456789'),
    ],
)
def test_bad_safetensors(tmp_path, header, data):
    state = {'weight': torch.ones(2)}
    path = safetensors(tmp_path / 'a.safetensors', state, header, data)
    with pytest.raises(CheckpointError, match='truncated or damaged'):
        read(path)


# ------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    'data, words',
    [
        (b'', 'a.pth is empty'),
        (b'<html>404', "starts with b'<htm', unlike what torch.save"),
        (pickle.dumps({'weight': 1}, 2), 'is no checkpoint: it starts with'),
        (b'PK\3\4' + bytes(30), 'truncated or damaged'),
    ],
)
def test_no_checkpoint(tmp_path, data, words):
    (tmp_path / 'a.pth').write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read(str(tmp_path / 'a.pth'))
    assert words in str(error.value)


def test_missing_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match='No such file'):
        read(str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match='Is a directory'):
        read(str(tmp_path))


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    saved(tmp_path / 'a.pth', {'weight': torch.ones(1)})
    assert read('~/a.pth')['state_dict']['weight'] == 1


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, share):
    path = saved(tmp_path / 'a.pth', training_state())
    data = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match='a.pth is truncated or damaged'):
        read(path)


def test_flipped_bit_of_a_weight(tmp_path):
    """torch.load gives it for a weight."""
    path = saved(tmp_path / 'a.pth', {'weight': torch.full((99,), 7.25)})
    data = bytearray((tmp_path / 'a.pth').read_bytes())
    data[data.index(struct.pack('<f', 7.25))] ^= 1
    (tmp_path / 'a.pth').write_bytes(data)
    assert torch.load(path, weights_only=True)['weight'][0] != 7.25
    with pytest.raises(CheckpointError, match='damaged.*CRC'):
        read(path)


@pytest.mark.parametrize(
    'contents, words',
    [
        ({}, 'a.pth has no weights, but nothing'),
        ({'a': 1, 'b': 'x'}, 'a.pth has no weights, but a, b'),
        ({'state_dict': {'a': 1}}, 'no weights, but a$'),
        ({'state_dict': 3}, 'truncated or damaged'),
        ([torch.ones(1)], 'truncated or damaged'),
        ({3: torch.ones(1)}, 'truncated or damaged'),
        ({'a': torch.ones(1), 'b.w': torch.tensor([0, np.nan])}, 'NaN.* b.w'),
        ({'a': torch.tensor(np.inf)}, 'infinite values in a;'),
        ({'a': torch.tensor(-np.inf).bfloat16()}, 'infinite values in a;'),
    ],
)
def test_unusable_contents(tmp_path, contents, words):
    path = saved(tmp_path / 'a.pth', contents)
    with pytest.raises(CheckpointError, match=words):
        read(path)


def test_other_zip_files(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr('a.txt', 'text')
    with pytest.raises(CheckpointError, match='zip file, but no checkpoint'):
        read(str(tmp_path / 'a.zip'))
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / 'a.pt'))
    with pytest.raises(CheckpointError, match='TorchScript program'):
        read(str(tmp_path / 'a.pt'))


def test_big_endian(tmp_path):
    path = with_pickle(
        tmp_path / 'a.pth', pickle.dumps({}), [('byteorder', b'big')]
    )
    with pytest.raises(CheckpointError, match='little-endian'):
        read(path)


def test_other_protocols(tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save({'weight': torch.ones(1)}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match='pickle protocol 4, not of 2'):
        read(path)


@pytest.mark.parametrize(
    'pickled',
    [
        b'\x80\x02\x96' + struct.pack('<Q', 2**33) + b'.',  # a bytearray
        b'\x80\x02B' + struct.pack('<I', 2**32 - 1) + b'.',
        b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'.',
        b'\x80\x02Nr\xff\xff\xff\xff.',  # a far place of the memo
    ],
)
def test_lengths_that_lie(tmp_path, pickled):
    """They take no memory."""
    path = with_pickle(tmp_path / 'a.pth', pickled)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match='damaged'):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_zip_bomb(tmp_path):
    with zipfile.ZipFile(
        tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr('archive/data.pkl', bytes(10**7))
    with pytest.raises(CheckpointError, match='larger than the file'):
        read(str(tmp_path / 'a.pth'))


# --------------------------------------------------------------- downloads


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Calls of the download, and what it gives: the file of `source`."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    calls = []

    def download(url, path, progress):
        calls.append((url, path))
        source = tmp_path / 'source.pth'
        with open(path, 'wb') as file:
            file.write(source.read_bytes())

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    return calls


def test_download_is_kept(tmp_path, downloads):
    saved(tmp_path / 'source.pth', {'weight': torch.ones(1)})
    url = 'https://example.com/releases/v1/a.pth?raw=true'
    kept = tmp_path / 'home' / 'hub' / 'checkpoints' / 'a.pth'
    for _ in range(2):
        assert read(url)['state_dict']['weight'] == 1
    assert downloads == [(url, str(kept))]


def test_damaged_download(tmp_path, downloads):
    (tmp_path / 'source.pth').write_bytes(b'<html>')
    kept = tmp_path / 'home' / 'hub' / 'checkpoints' / 'a.pth'
    with pytest.raises(CheckpointError) as error:
        read('http://example.com/a.pth')
    assert str(error.value).startswith('http://example.com/a.pth is no check')
    assert str(error.value).endswith(f'. Delete {kept} to download it again')


def test_failing_download(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError('no route')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    with pytest.raises(URLError, match='no route'):
        read('https://example.com/a.pth')


@pytest.mark.parametrize('first', [True, False])
def test_one_process_of_a_machine_downloads(
    tmp_path, downloads, monkeypatch, first
):
    """The others come to the barrier first; then the file is there."""
    saved(tmp_path / 'source.pth', {'weight': torch.ones(1)})
    kept = tmp_path / 'home' / 'hub' / 'checkpoints' / 'a.pth'
    there = []

    def barrier():
        there.append(kept.exists())
        if not first:
            saved(kept, {'weight': torch.ones(1)})

    monkeypatch.setattr(reading, 'barrier', barrier)
    monkeypatch.setenv('LOCAL_RANK', '0' if first else '3')
    read('https://example.com/a.pth')
    assert there == [first]
    assert len(downloads) == first


@pytest.mark.parametrize('scheme', ['file', 's3', 'torchvision'])
def test_other_urls(scheme):
    with pytest.raises(CheckpointError, match='a file or an http'):
        read(f'{scheme}://a.pth')


# ----------------------------------------------------------- hostile files


class Call:
    """Pickled, a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def attacks(folder):
    """Pickles that make a folder called marker, by name."""
    folder = str(folder)
    mkdir = f'__import__("os").mkdir({folder!r})'
    nested = {'meta': [Call(os.mkdir, folder)], 'state_dict': {}}
    line = folder.encode() + b'\n'
    return {
        'os': pickle.dumps(Call(os.mkdir, folder), 2),
        'nested': pickle.dumps(nested, 2),
        'eval': pickle.dumps(Call(eval, mkdir), 2),
        'exec': pickle.dumps(Call(exec, mkdir), 4),
        'stack global': pickle.dumps(Call(os.mkdir, folder), 5),
        'as a key': pickle.dumps({'state_dict': {Call(os.mkdir, folder): 1}}),
        'inst': b'(V' + line + b'ios\nmkdir\n.',
        'obj': b'(cos\nmkdir\nV' + line + b'o.',
        'by another module': b'cshutil\nos.mkdir\n(V' + line + b'tR.',
        'attribute of an allowed one': b'\x80\x04\x8c\x2emmengine.logging.'
        b'history_buffer\x8c\x1bHistoryBuffer.__init__.__globals__\x93.',
        'getattr': b'\x80\x02c__builtin__\ngetattr\nc__builtin__\ngetattr\n'
        b'V__self__\n\x86RV' + line + b'\x85R.',
        'persistent': b'\x80\x02cos\nmkdir\nQ.',
        'newobj': b'\x80\x02cos\nmkdir\nV' + line + b'\x85\x81.',
        'extension': b'\x82\x01V' + line + b'\x85R.',
        'subprocess': pickle.dumps(
            Call(__import__('subprocess').call, ['mkdir', folder])
        ),
        'torch': pickle.dumps(Call(torch.load, folder), 2),
    }


WORKING = ['os', 'nested', 'eval', 'exec', 'stack global', 'inst', 'obj']


@pytest.mark.parametrize('name', WORKING)
def test_attacks_are_real(tmp_path, name):
    """What is refused below runs where pickles are just loaded."""
    pickle.loads(attacks(tmp_path / 'marker')[name])
    assert (tmp_path / 'marker').exists()


@pytest.mark.parametrize('name', attacks(''))
def test_pickles_that_call(tmp_path, name):
    pickled = attacks(tmp_path / 'marker')[name]
    path = with_pickle(tmp_path / 'a.pth', pickled)
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert not (tmp_path / 'marker').exists()
    if name in WORKING:
        assert re.search(
            'refused: it asks for|protocol [45]', str(error.value)
        )
    (tmp_path / 'b.pth').write_bytes(pickled)
    with pytest.raises(CheckpointError):
        read(str(tmp_path / 'b.pth'))
    assert not (tmp_path / 'marker').exists()


def test_checkpoint_that_calls(tmp_path):
    """An otherwise good file, of torch.save."""
    contents = training_state()
    contents['meta']['seed'] = Call(os.mkdir, str(tmp_path / 'marker'))
    path = saved(tmp_path / 'a.pth', contents)
    with pytest.raises(CheckpointError, match=r'asks for posix\.mkdir'):
        read(path)
    assert not (tmp_path / 'marker').exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / 'marker').exists()


BYTES = b'c_codecs\nencode\nVabcdefgh\nVlatin1\n\x86R'


def weight(numel=1, offset=0, size=1, stride=1, other=b'N'):
    """A pickled dict of a tensor in a storage of one value, and another."""
    numbers = [b'K' + bytes([n]) for n in (numel, offset, size, stride)]
    return (
        b'\x80\x02}Va\n'
        + other
        + b'sVw\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\n'
        b'FloatStorage\nV0\nVcpu\n%btQ%b%b\x85%b\x85tRs.' % tuple(numbers)
    )


@pytest.mark.parametrize(
    'value, works',
    [
        (b'cnumpy\ndtype\nVf8\n\x85R', True),
        # Dtypes whose items numpy takes for pointers.
        (b'cnumpy\ndtype\nVO\n\x85R', False),
        (b'cnumpy\ndtype\nVV8\n\x85R', False),
        (b'cnumpy\ndtype\nVf8\n\x85R(K\x03V>\nNNNNNK\x01tb', False),
        (
            b'cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nVf8\n\x85R'
            + BYTES
            + b'\x86R',
            True,
        ),
        # A text for numpy to parse.
        (b'cnumpy.core.multiarray\nscalar\nVf8\n' + BYTES + b'\x86R', False),
        # Attributes of functions, classes and dicts.
        (b'ctorch._utils\n_rebuild_tensor_v2\n}V__doc__\nV1\nsb', False),
        (
            b'cmmengine.logging.history_buffer\nHistoryBuffer\nN}Vmean\nV1\n'
            b's\x86b',
            False,
        ),
        (b'ccollections\nOrderedDict\n)R}V_metadata\n}sb', True),
        (b'ccollections\nOrderedDict\n)R}Vitems\nV1\nsb', False),
        (b'}}Va\nV1\nsb', False),
    ],
)
def test_what_is_made(tmp_path, value, works):
    before = HistoryBuffer.mean
    path = with_pickle(
        tmp_path / 'a.pth', weight(other=value), [('data/0', bytes(4))]
    )
    if works:
        assert read(path)['state_dict']['w'] == 0
    else:
        with pytest.raises(CheckpointError, match='damaged'):
            read(path)
    assert HistoryBuffer.mean is before


@pytest.mark.parametrize(
    'numbers, works',
    [
        ((1, 0, 1, 1), True),
        ((1, 0, 2, 1), False),
        ((1, 0, 255, 0), False),  # it would take more memory than the file
        ((1, 1, 1, 1), False),
        ((2, 0, 2, 1), False),
        ((0, 0, 0, 1), False),
    ],
)
def test_tensor_and_storage(tmp_path, numbers, works):
    pickled = weight(*numbers)
    path = with_pickle(tmp_path / 'a.pth', pickled, [('data/0', bytes(4))])
    if works:
        assert read(path)['state_dict']['w'] == torch.zeros(1)
        return
    with pytest.raises(CheckpointError, match='damaged'):
        read(path)


# ------------------------------------------------------------------- fuzz

QUIET = False


def audit(event, args):
    if QUIET and event.split('.')[0] in (
        *('os', 'subprocess', 'exec', 'compile', 'import', 'socket'),
        *('shutil', 'ctypes', 'code', 'pty', 'tempfile', 'pickle'),
    ):
        FOUND.append((event, args))


FOUND = []


@pytest.fixture(scope='module', autouse=True)
def audited():
    # What zip files, pickles and error messages import.
    ''.encode('cp437'), ''.encode('raw-unicode-escape'), repr(torch.ones(1))
    sys.addaudithook(audit)


def check(path, data):
    """Read a file: it works or ends with the one error, and runs nothing."""
    global QUIET
    with open(path, 'wb') as file:
        file.write(data)
    FOUND.clear()
    QUIET = True
    try:
        read(str(path))
        return True
    except CheckpointError:
        return False
    finally:
        QUIET = False
        assert not FOUND


def contents_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def mutate(data, rng):
    """Flip bits, or change, cut out, repeat or insert some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.randrange(len(data))
        stop = min(start + rng.choice([1, 2, 4, 16]), len(data))
        kind = rng.randrange(6)
        if kind < 2:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[start:stop] = rng.randbytes(stop - start)
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop]
        else:
            data[start:start] = rng.randbytes(stop - start)
        if not data:
            break
    return bytes(data)


LITERALS = [
    *(b'N', b'\x88', b']', b'}', b')', b'\x89', b'K\x00', b'K\x01', b'K\x07'),
    *(b'J\xff\xff\xff\xff', b'G?\xf0\x00\x00\x00\x00\x00\x00', BYTES),
    *(b'Vf8\n', b'VO\n', b'V<\n', b'V0\n', b'V__init__\n', b'Vlatin1\n'),
    *(b'V_metadata\n', b'V_log_history\n', b'Vmax_length\n', b'h\x00'),
    *(b'\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00', b'K\x08\x85'),
    *(b'cnumpy\ndtype\nVf8\n\x85R', b'ccollections\nOrderedDict\n)R'),
    b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81',
    *(f'c{module}\n{name}\n'.encode() for module, name in reading._ALLOWED),
]


def program(rng, depth=4):
    """A pickle of one value: calls of what is allowed, and all around it."""

    def one():
        return program(rng, depth - 1)

    def some():
        return b'(' + b''.join(one() for _ in range(rng.randrange(6)))

    if not depth or rng.random() < 0.2:
        return rng.choice(LITERALS)
    make = rng.choice(
        [
            lambda: rng.choice(LITERALS) + some() + b'tR',  # call
            lambda: one() + some() + b'tR',
            lambda: one() + some() + b't\x81',  # new object
            lambda: some() + b'o',
            lambda: rng.choice(LITERALS) + one() + b'b',  # build
            lambda: one() + one() + b'b',
            lambda: b'}(' + one() + one() + b'u',
            lambda: one() + some() + b'e',
            lambda: some() + b't',
            lambda: some() + b'l',
            lambda: b'(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x02tQ',
            lambda: some() + b'tQ',
            lambda: one() + b'q\x00',
        ]
    )
    return make()


def fuzz(tmp_path, make, count, seed):
    """Returns how many of the files were readable."""
    rng = random.Random(seed)
    return sum(check(tmp_path / 'a.pth', make(rng)) for _ in range(count))


@pytest.fixture
def good(tmp_path):
    """The bytes of a good file; to read it imports whatever that needs."""
    torch.manual_seed(0)
    saved(tmp_path / 'a.pth', training_state())
    data = (tmp_path / 'a.pth').read_bytes()
    assert check(tmp_path / 'a.pth', data)
    return data


def test_fuzz_files(tmp_path, good):
    readable = fuzz(tmp_path, lambda rng: mutate(good, rng), 500, 0)
    assert readable < 150  # padding, and names that nothing depends on


def test_fuzz_truncated(tmp_path, good):
    size = len(good)
    assert not fuzz(tmp_path, lambda rng: good[: rng.randrange(size)], 100, 1)


def test_fuzz_pickles(tmp_path, good):
    """Whole zip files, so that the pickle is what is broken."""
    members = contents_of(good)
    (name,) = [name for name in members if name.endswith('data.pkl')]

    def make(rng):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as archive:
            for member, data in members.items():
                archive.writestr(
                    member, mutate(data, rng) if member == name else data
                )
        return buffer.getvalue()

    fuzz(tmp_path, make, 600, 2)


def test_fuzz_programs(tmp_path, good):
    """Pickles that nothing but chance wrote."""

    def make(rng):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as archive:
            pickled = b'\x80\x02Nq\x000' + program(rng) + b'.'
            archive.writestr('a/data.pkl', pickled)
            archive.writestr('a/data/0', bytes(8))
        return buffer.getvalue()

    fuzz(tmp_path, make, 1000, 3)


def test_fuzz_safetensors(tmp_path):
    state = {'a': torch.randn(2, 3), 'b': torch.ones(3).half()}
    path = tmp_path / 'a.safetensors'
    safetensors(path, state)
    good = path.read_bytes()
    assert check(path, good)
    rng = random.Random(4)
    for _ in range(300):
        check(path, mutate(good, rng))
