"""The pages in docs/: what they say to run runs, what they draw is so."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny
from tiny import ROOT

RESULTS = [
    'curves.png',
    'predictions.png',
    'predicted/predictions.json',
    'predicted/pictures/000000500001.png',
    *(
        f'inside/{name}.png'
        for name in (
            '000000500001_prior',
            '000000500001_kernels',
            'erf',
            '000000500001_features',
        )
    ),
    'model.onnx',
]


def test_tutorial(tmp_path, monkeypatch):
    """Its commands, as they stand, but for the processes they start."""
    for package in ('mmcv._ext', 'mmdet', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package)
    text = (ROOT / 'docs' / 'tutorial.md').read_text()
    blocks = re.findall(r'^```shell\n(.*?)^```', text, re.DOTALL | re.M)
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / 'bin' / 'python'  # shows its words
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\nprintf "\\n"\n')
    python.chmod(0o755)
    words = subprocess.check_output(
        ['bash', '-e', '-c', '\n'.join(blocks)],
        env={'PATH': f'{python.parent}:{os.environ["PATH"]}'},
        text=True,
    )
    monkeypatch.chdir(tmp_path)
    output = ''
    for command in words.splitlines():
        script, *argv = command.split('\0')[:-1]
        output += tiny.run_tool(Path(script).stem, *argv)
    missing = [
        name
        for name in RESULTS
        if not (tmp_path / 'work_dirs' / 'tutorial' / name).exists()
    ]
    assert not missing
    assert re.search('160 x 160: differs by .*e-0[5-9] at most', output)

    # And what another page says about the ONNX file.
    text = (ROOT / 'docs' / 'mmdeploy.md').read_text()
    (code,) = re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path / 'work_dirs' / 'tutorial')
    names = {}
    exec(code, names)
    assert [output.shape[2] for output in names['outputs']] == [
        *(40, 20, 10, 5, 3)
    ]


def test_architecture_figure():
    """It shows the numbers of the arch."""
    figure = tiny.load_tool('draw_architecture', 'docs').draw('xt')
    text = '\n'.join(item.get_text() for item in figure.axes[0].texts)
    for words in (
        *('2 x RepConvBlock', 'kernel 17 x 17', '56 channels\nstride 4'),
        *(
            '6 x FocusBlock',
            'dynamic 5 x 5 and 13 x 13',
            '256 + 84 ch',
            'P0,\n84',
        ),
        *('map 2\n340 channels', 'map 3\n420 channels'),
    ):
        assert words in text
    assert (ROOT / 'docs' / 'architecture.png').exists()
