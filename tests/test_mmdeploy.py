"""What docs/mmdeploy.md says of files."""

import re

import numpy as np
import pytest
import tiny

for package in ('mmcv._ext', 'mmseg', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(package)


def test_snippet(tmp_path, monkeypatch):
    """Of a file with the first map only, of no square images."""
    files = tiny.write_model(
        'seg', tmp_path, {'model.backbone.out_indices': [0]}
    )
    out = '--out', tmp_path / 'model.onnx', '--shape', '64', '96'
    tiny.run_tool('export', *files, *out, '--backbone-only')
    text = (tiny.ROOT / 'docs' / 'mmdeploy.md').read_text()
    [code] = re.findall('^```python\n(.*?)^```', text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    [maps] = names['outputs']
    assert maps.shape == (1, 8, 16, 24)
    assert np.isfinite(maps).all() and maps.std() > 0
