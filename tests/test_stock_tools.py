"""The tools of MMDetection, MMSegmentation and MMPretrain on our configs."""

import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

tiny.need_openmmlab()
from matplotlib import pyplot  # noqa: E402

# By task: a config, the package, the last checkpoint and a metric.
TASKS = {
    'det': (tiny.detector, 'mmdet', 'epoch_1.pth', 'coco/segm_mAP'),
    'seg': (tiny.segmentor, 'mmseg', 'iter_2.pth', 'mIoU'),
    'cls': (tiny.imagenet, 'mmpretrain', 'epoch_1.pth', 'accuracy/top5'),
}


def run(package, name, *arguments):
    """Run a package's tool."""
    tools = Path(find_spec(package).origin).parent / '.mim' / 'tools'
    argv = [str(word) for word in (tools / f'{name}.py', *arguments)]
    with (
        mock.patch.object(sys, 'argv', argv),
        mock.patch.dict(os.environ, LOCAL_RANK='0'),
        pyplot.rc_context(),
    ):
        runpy.run_path(argv[0], run_name='__main__')
    pyplot.close('all')
    tiny.forget_instances()


@pytest.mark.parametrize('task', TASKS)
def test_tools(task, tmp_path, monkeypatch):
    """Those to train, to test, and to browse data."""
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend('Agg')
    write, package, checkpoint, metric = TASKS[task]
    config, checkpoint = write(tmp_path), Path('trained', checkpoint)
    run(package, 'train', config, '--work-dir', 'trained')
    saved = torch.load(checkpoint, weights_only=False)
    weights = saved['state_dict'].values()
    assert all(weight.isfinite().all() for weight in weights)
    assert ('ema_state_dict' in saved) == (task == 'cls')
    run(package, 'test', config, checkpoint, '--work-dir', 'tested')
    (log,) = Path('tested').glob('*/*.json')
    assert metric in json.loads(log.read_text())
    if task != 'cls':
        argv = config, '--not-show', '--output-dir', 'browsed'
        run(package, 'analysis_tools/browse_dataset', *argv)
        images = [*tmp_path.rglob('train*/*.jpg')]
        assert len([*Path('browsed').rglob('*.*g')]) == len(images) > 0
