"""Reading files: what is in them comes out, and nothing in them runs."""

import pickle
import struct
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from tiny import Made
from torch import nn

from mmoverlock.checkpoint import CheckpointError, read, reading

ONE = torch.ones(1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'a.pth'


def reread(path, contents):
    torch.save(contents, path)
    return read(str(path))


def test_plain_data(path):
    """Of all types; a training's own are in test_resume.py."""
    plain = {
        'meta': {'epoch': 1, 'iter': 2, 'cfg': 'a = 1', 'time': b'raw'},
        'param_schedulers': [{'milestones': Counter({8: 1, 11: 1})}],
        'args': Namespace(lr=0.1),
        'names': {'a'},
        'runtime_info': OrderedDict(eta=np.float64(3), step=np.int32(4)),
        'arrays': [
            np.asfortranarray(np.arange(6, dtype='i2').reshape(2, 3)),
            np.array([True, False]),
            np.array(7, 'f4'),
        ],
    }
    weights = nn.BatchNorm2d(2).state_dict()
    contents = reread(path, plain | {'state_dict': weights})
    state = contents.pop('state_dict')
    torch.testing.assert_close(state, weights, rtol=0, atol=0)
    assert state._metadata == weights._metadata
    assert repr(contents) == repr(plain)  # types too


def test_safetensors(tmp_path):
    package = pytest.importorskip('safetensors.torch')
    state = {'weight': torch.randn(2, 3), 'half': torch.randn(5).bfloat16()}
    path = tmp_path / 'a.safetensors'
    package.save_file(state, path)
    contents = read(str(path))
    assert contents.keys() == {'state_dict'}
    found = dict(contents['state_dict'])
    torch.testing.assert_close(found, state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('names', 'average'),
    [
        ('state_dict', 'state_dict_ema'),  # of timm
        ('model', 'ema'),
        ('params', 'params_ema'),
        ('model', 'ema_state_dict'),  # not of mmengine
        ('state_dict', 'ema_state_dict'),
    ],
)
def test_averaged_weights(path, names, average, capsys):
    """They are taken, as timm does, and that is said."""
    trained, averaged = ({'weight': torch.full((1,), i)} for i in (1.0, 2.0))
    others = {'other_ema': trained, 'epoch': 3}  # the first average is taken
    contents = reread(path, {names: trained, average: averaged} | others)
    assert contents['state_dict'] == averaged and contents['epoch'] == 3
    # Others have them beside their settings, or in a wrapper.
    wrapped = {'module.weight': averaged['weight'], 'bias': ONE}
    inner = dict(decay=torch.ones(()), module=wrapped)
    contents = reread(path, {names: trained, average: inner})
    assert contents['state_dict'] == averaged | dict(bias=ONE)
    assert capsys.readouterr().out.count(f', {average} is taken') == 2


def test_no_averaged_weights(path, capsys):
    """None at all, or none that have names of the model's: that is said."""
    trained = {'weight': ONE}
    for other, is_said in (
        (None, False),
        ({'decay': 0.9, 'module': {}}, False),
        ({'decay': ONE}, True),
        ({'shadow_params': [ONE]}, True),
    ):
        contents = reread(path, {'model': trained, 'ema': other})
        assert contents['state_dict'] == trained
        assert ('ema is left out' in capsys.readouterr().out) is is_said


def test_wrapped_models(path):
    """Of names, what compiled and parallel models add to them is left out."""
    for name in 'module._orig_mod.a.b', '_orig_mod.module.a._orig_mod.b':
        assert [*reread(path, {name: ONE})['state_dict']] == ['a.b']
    with pytest.raises(CheckpointError, match='has a.b twice'):
        reread(path, {'a.b': ONE, 'module.a.b': ONE})


def test_trained_weights_of_a_hook(path, capsys):
    """mmengine saves averaged ones in their place, and it is said so."""
    saved = {'state_dict': {'a': ONE}, 'ema_state_dict': {'a': ONE * 2}}
    assert reread(path, saved | {'meta': {}})['state_dict'] == {'a': ONE}
    assert 'weights of state_dict are averaged' in capsys.readouterr().out


# ------------------------------------------------------------ broken files


def test_no_checkpoint(path, monkeypatch):
    monkeypatch.setenv('HOME', str(path.parent))
    with pytest.raises(CheckpointError, match='No such file'):
        read('~/a.pth')
    torch.jit.script(nn.Linear(1, 1)).save(str(path))
    script = path.read_bytes()
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'text')
    archive = path.read_bytes()
    torch.save({'weight': torch.full((99,), 7.25)}, path)
    data = path.read_bytes()
    flipped = bytearray(data)  # torch.load gives it for a weight
    flipped[data.index(struct.pack('<f', 7.25))] ^= 1
    for content, words in (
        (b'', 'a.pth is empty'),
        (pickle.dumps({'weight': 1}, 2), 'is no checkpoint: it starts with'),
        (data[:-10], 'a.pth is truncated or damaged'),
        (flipped, 'wrong checksum of a/data/0'),
        (archive, 'zip file, but no checkpoint'),
        (script, 'TorchScript program'),
        ({}, 'a.pth has no weights, but nothing'),
        ({'state_dict': {'a': 1}}, 'no weights, but a$'),
        ({'state_dict': 3}, 'truncated or damaged'),
        ({'a': ONE, 'b': torch.tensor([0, np.nan])}, 'NaN .* in b;'),
        ({'a': torch.tensor(-np.inf).bfloat16()}, 'infinite values in a;'),
    ):
        if isinstance(content, dict):
            torch.save(content, path)
        else:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            read('~/a.pth')


# --------------------------------------------------------------- downloads

URL = 'https://example.com/releases/v1/a.pth?raw=true'


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file that is downloaded, and the URLs it was loaded from."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    urls = []

    def download(url, path, progress):
        urls.append(url)
        torch.save({'weight': ONE}, path)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    return tmp_path / 'hub' / 'checkpoints' / 'a.pth', urls


def test_download_is_kept(kept):
    kept, urls = kept
    for _ in range(2):
        assert read(URL)['state_dict']['weight'] == 1
    assert urls == [URL] and kept.exists()
    kept.write_bytes(b'<html>')
    with pytest.raises(CheckpointError) as error:
        read(URL)
    assert str(error.value).startswith(f'{URL} is no checkpoint')
    assert str(error.value).endswith(f'. Delete {kept} to download it again')


@pytest.mark.parametrize(('rank', 'is_first'), [('0', True), ('3', False)])
def test_one_process_of_a_machine_downloads(kept, monkeypatch, rank, is_first):
    """The others come to the barrier first; then the file is there."""
    kept, urls = kept
    there = []

    def barrier():
        there.append(kept.exists())
        torch.save({'weight': ONE}, kept)

    monkeypatch.setattr(reading, 'barrier', barrier)
    monkeypatch.setenv('LOCAL_RANK', rank)
    read(URL)
    assert there == [is_first] and len(urls) == is_first


# ----------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    'value',
    [
        # Attributes of what is allowed.
        Made(Made(getattr, (HistoryBuffer, 'mean')), (1,)),
        Made(
            *(getattr, (HistoryBuffer.mean, '__globals__')),
            *(None, None, iter([('np', 1)])),
        ),
        Made(np.dtype, ('i8,O',)),  # whose items are pointers
    ],
)
def test_abuse_of_what_is_allowed(path, value):
    before = {**HistoryBuffer.mean.__globals__}
    with pytest.raises(CheckpointError, match='damaged'):
        reread(path, {'weight': ONE, 'value': value})
    assert before == HistoryBuffer.mean.__globals__


def test_numpy_cannot_be_misled(path):
    """Arrays have no memory but their own; dtypes stay what they are."""
    value = Made(np.ndarray, ((1,), 'O', b'12345678'))
    array = reread(path, {'model': {'a': ONE}, 'value': value})['value']
    assert not array.size and not array.dtype.hasobject
    fields = {'a': (np.dtype('i8'), 0)}
    filling = 3, '<', None, ('a',), fields, 8, 8, 63
    value = Made(np.dtype, ('f8', False, True), filling)
    dtype = reread(path, {'model': {'a': ONE}, 'value': value})['value']
    assert dtype == np.float64 and dtype.names is None and not dtype.flags
