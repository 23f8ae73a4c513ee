"""The tutorial in docs/: what it says to run runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny
from tiny import ROOT

tiny.need_openmmlab()


@pytest.mark.parametrize(
    'export', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_tutorial(tmp_path, monkeypatch, export):
    """The commands, as they stand, in this process.

    Options alone are read of those to look inside and, in the quick case, to
    export. The config is the project's, but that few objects are found and
    drawn, in one image.
    """
    for package in ('onnxruntime', 'onnxscript') if export else ():
        pytest.importorskip(package)
    config = tmp_path / 'configs' / 'mask_rcnn' / 'overlock_mini_shapes.py'
    config.parent.mkdir(parents=True)
    config.write_text(
        f"_base_ = '{ROOT / config.relative_to(tmp_path)}'\n"
        'model = dict(test_cfg=dict(rcnn=dict(max_per_img=2)))\n'
        'val_dataloader = dict(dataset=dict(indices=1))\n'
    )
    monkeypatch.chdir(tmp_path)
    show = 'python() { printf "%s\\0" "$@"; echo; }\n'  # its words
    script = show + tiny.code_of('docs/tutorial.md', 'shell')
    words = subprocess.check_output(['bash', '-e', '-c', script], text=True)
    for line in words.splitlines():
        script, *argv = line.split('\0')[:-1]
        name = Path(script).stem
        if name == 'visualize' or (name == 'export' and not export):
            args = tiny.load_tool(name).build_parser().parse_args(argv)
            assert all(map(os.path.exists, (args.config, args.checkpoint)))
        else:
            output = tiny.run_tool(name, *argv, curves=name == 'train')
    assert script == 'tools/export.py'
    predicted = 'predicted/predictions.json', 'predicted/pictures'
    for name in 'curves.png', 'predictions.png', *predicted:
        assert Path('work_dirs', 'tutorial', name).exists()
    if not export:
        return
    assert re.search('160 x 160: differs by .*e-0[5-9] at most', output)
    monkeypatch.chdir(tmp_path / 'work_dirs' / 'tutorial')
    names = {}  # of another page, on the ONNX file
    exec(tiny.code_of('docs/mmdeploy.md', 'python'), names)
    sizes = [output.shape[2] for output in names['outputs']]
    assert sizes == [40, 20, 10, 5, 3]
