"""Reading files: what is in them comes out, and nothing in them runs."""

import pickle
import struct
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
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
        'names': {'a'},
    }


def saved(path, contents):
    torch.save(contents, path)
    return str(path)


# ------------------------------------------------------------ what comes out


def test_training_state(tmp_path):
    written = training_state()
    contents = read(saved(tmp_path / 'a.pth', written))
    assert contents.keys() == written.keys()
    for key in ('meta', 'param_schedulers', 'args', 'names'):
        assert contents[key] == written[key]
        assert type(contents[key]) is type(written[key])
    state = contents['state_dict']
    assert list(state) == list(written['state_dict'])
    for name, value in written['state_dict'].items():
        assert torch.equal(state[name], value)
        assert state[name].dtype == value.dtype
    assert state._metadata == written['state_dict']._metadata
    hub, expected = contents['message_hub'], written['message_hub']
    assert hub['runtime_info'] == expected['runtime_info']
    assert isinstance(hub['runtime_info']['eta'], np.float64)
    assert hub['log_scalars'].keys() == expected['log_scalars'].keys()
    history = hub['log_scalars']['train/loss']
    assert type(history) is HistoryBuffer
    history.update(6.5)  # what was read can be gone on with
    assert history._log_history.tolist() == [1.5, 2.5, 6.5]
    assert (history.mean(), history.max_length) == (3.5, 1000000)
    assert history.statistics('max') == 6.5
    moments = contents['optimizer']['state'][0]['exp_avg']
    assert torch.equal(moments, torch.ones(2))


@pytest.mark.parametrize(
    'array',
    [
        np.asfortranarray(np.arange(6, dtype='i2').reshape(2, 3)),
        np.array([True, False]),
        np.array(7, 'f4'),
    ],
)
def test_arrays(tmp_path, array):
    state = {'weight': torch.ones(1)}
    path = saved(tmp_path / 'a.pth', {'model': state, 'array': array})
    result = read(path)['array']
    np.testing.assert_array_equal(result, array)
    assert result.dtype == array.dtype
    assert result.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.int64])
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


# ------------------------------------------------------------- safetensors


def test_safetensors(tmp_path):
    package = pytest.importorskip('safetensors.torch')
    state = {
        'odd': torch.tensor([1], dtype=torch.int8),  # misaligns the next
        'weight': torch.randn(2, 3),
        'half': torch.randn(5).bfloat16(),
        'empty': torch.zeros(0, 2),
    }
    path = tmp_path / 'a.safetensors'
    package.save_file(state, path)
    contents = read(str(path))
    assert contents.keys() == {'state_dict'}
    for name, value in state.items():
        assert torch.equal(contents['state_dict'][name], value), name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match='truncated or damaged'):
        read(str(path))


# ------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    'data, words',
    [
        (b'', 'a.pth is empty'),
        (pickle.dumps({'weight': 1}, 2), 'is no checkpoint: it starts with'),
        (b'PK\3\4' + bytes(30), 'truncated or damaged'),
    ],
)
def test_no_checkpoint(tmp_path, data, words):
    (tmp_path / 'a.pth').write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read(str(tmp_path / 'a.pth'))
    assert words in str(error.value)


def test_missing_and_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(CheckpointError, match='No such file'):
        read('~/a.pth')
    saved(tmp_path / 'a.pth', {'weight': torch.ones(1)})
    assert read('~/a.pth')['state_dict']['weight'] == 1


def test_truncated(tmp_path):
    path = saved(tmp_path / 'a.pth', training_state())
    data = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match='a.pth is truncated or damaged'):
        read(path)


def test_flipped_bit_of_a_weight(tmp_path):
    """torch.load gives it for a weight."""
    path = saved(tmp_path / 'a.pth', {'weight': torch.full((99,), 7.25)})
    data = bytearray((tmp_path / 'a.pth').read_bytes())
    data[data.index(struct.pack('<f', 7.25))] ^= 1
    (tmp_path / 'a.pth').write_bytes(data)
    assert torch.load(path, weights_only=True)['weight'][0] != 7.25
    with pytest.raises(
        CheckpointError, match='damaged.*wrong checksum of a/data/0'
    ):
        read(path)


@pytest.mark.parametrize(
    'contents, words',
    [
        ({}, 'a.pth has no weights, but nothing'),
        ({'state_dict': {'a': 1}}, 'no weights, but a$'),
        ({'state_dict': 3}, 'truncated or damaged'),
        ({'a': torch.ones(1), 'b.w': torch.tensor([0, np.nan])}, 'NaN.* b.w'),
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


def test_other_urls():
    with pytest.raises(CheckpointError, match='a file or an http'):
        read('s3://a.pth')


# ----------------------------------------------------------- hostile files


class Made:
    """Pickled, a call and what it makes filled: see ``object.__reduce__``."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """Pickles want what they call to be callable."""


def with_value(path, value):
    state = nn.Linear(1, 1).state_dict()
    return saved(path, {'state_dict': state, 'value': value})


GLOBALS = Made(getattr, (HistoryBuffer.mean, '__globals__'))


@pytest.mark.parametrize(
    'value',
    [
        # Attributes of what is allowed.
        Made(Made(getattr, (HistoryBuffer, 'mean')), (1,)),
        Made(*GLOBALS.reduced, None, None, iter([('np', 1)])),
        Made(np.dtype, ('i8,O',)),  # whose items are pointers
    ],
)
def test_abuse_of_what_is_allowed(tmp_path, value):
    before = {**HistoryBuffer.mean.__globals__}
    path = with_value(tmp_path / 'a.pth', value)
    with pytest.raises(CheckpointError, match='damaged'):
        read(path)
    assert before == HistoryBuffer.mean.__globals__


def test_numpy_cannot_be_misled(tmp_path):
    """Arrays have no memory but their own; dtypes stay what they are."""
    value = Made(np.ndarray, ((1,), 'O', b'12345678'))
    array = read(with_value(tmp_path / 'a.pth', value))['value']
    assert not array.size and not array.dtype.hasobject
    fields = {'a': (np.dtype('i8'), 0)}
    state = 3, '<', None, ('a',), fields, 8, 8, 63
    value = Made(np.dtype, ('f8', False, True), state)
    dtype = read(with_value(tmp_path / 'a.pth', value))['value']
    assert dtype == np.float64 and dtype.names is None and not dtype.flags
