"""What docs/mmdeploy.md says of files."""

import re

import numpy as np
import pytest
import tiny

for package in ('mmcv._ext', 'mmpretrain', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(package)


def test_classifier(tmp_path, monkeypatch):
    """Its snippet, on a file of another size than detectors'."""
    files = tiny.write_model('cls', tmp_path)
    out = tmp_path / 'model.onnx'
    tiny.load_tool('export').main(
        [*files, '--out', str(out), '--shape', '64', '96']
    )
    text = (tiny.ROOT / 'docs' / 'mmdeploy.md').read_text()
    [code] = re.findall('^```python\n(.*?)^```', text, re.DOTALL | re.M)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    [scores] = names['outputs']
    assert scores.shape == (1, 1000)
    assert np.isfinite(scores).all() and scores.std() > 0
