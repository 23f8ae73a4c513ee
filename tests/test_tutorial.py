"""The tutorial in docs/: what it says to run runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tiny
from tiny import ROOT, load_tool

tiny.need_openmmlab()


@pytest.fixture(scope='module')
def tutorial(tmp_path_factory):
    """Runs the commands, as they stand, in this process; folder and export.

    Options alone are read of those to look inside and to export. The config
    is the project's, but that few objects are found and drawn, in one image.
    """
    folder = tmp_path_factory.mktemp('tutorial')
    config = folder / 'configs' / 'mask_rcnn' / 'overlock_mini_shapes.py'
    config.parent.mkdir(parents=True)
    config.write_text(
        f"_base_ = '{ROOT / config.relative_to(folder)}'\n"
        'model = dict(test_cfg=dict(rcnn=dict(max_per_img=2)))\n'
        'val_dataloader = dict(dataset=dict(indices=1))\n'
    )
    show = 'python() { printf "%s\\0" "$@"; echo; }\n'  # its words
    script = show + tiny.code_of('docs/tutorial.md', 'shell')
    words = subprocess.check_output(['bash', '-e', '-c', script], text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in words.splitlines():
            script, *argv = line.split('\0')[:-1]
            name = Path(script).stem
            if name in ('visualize', 'export'):
                args = load_tool(name).build_parser().parse_args(argv)
                assert all(map(os.path.exists, (args.config, args.checkpoint)))
            else:
                tiny.run_tool(name, *argv, curves=name == 'train')
    return folder, script, argv


def test_tutorial(tutorial):
    folder, script, _ = tutorial
    assert script == 'tools/export.py'
    predicted = 'predicted/predictions.json', 'predicted/pictures'
    for name in 'curves.png', 'predictions.png', *predicted:
        assert (folder / 'work_dirs' / 'tutorial' / name).exists()


@pytest.mark.slow
def test_export_of_the_tutorial(tutorial, monkeypatch):
    for package in ('onnxruntime', 'onnxscript'):
        pytest.importorskip(package)
    folder, _, argv = tutorial
    monkeypatch.chdir(folder)
    output = tiny.run_tool('export', *argv)
    assert re.search('160 x 160: differs by .*e-0[5-9] at most', output)
