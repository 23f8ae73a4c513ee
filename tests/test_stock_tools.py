"""The tools of MMDetection, MMSegmentation and MMPretrain on our configs."""

import contextlib
import io
import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import mmengine
import pytest
import tiny
import torch
from PIL import Image

tiny.need_openmmlab()
from matplotlib import pyplot  # noqa: E402

# By task: a config, the package, the last checkpoint and a metric.
TASKS = {
    'det': (tiny.detector, 'mmdet', 'epoch_1.pth', 'coco/segm_mAP'),
    'seg': (tiny.segmentor, 'mmseg', 'iter_2.pth', 'mIoU'),
    'cls': (tiny.imagenet, 'mmpretrain', 'epoch_1.pth', 'accuracy/top1'),
}
# What make_sample_data draws.
CLASSES = 'airplane', 'banana', 'pizza', 'remote', 'sports ball'


def run(package, name, *arguments):
    """Run a package's tool."""
    package = Path(find_spec(package).origin).parent
    tool = package / '.mim' / 'tools' / f'{name}.py'
    argv = [str(word) for word in (tool, *arguments)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, 'argv', argv))
        stack.enter_context(mock.patch.dict(os.environ, LOCAL_RANK='0'))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(pyplot.rc_context())
        stack.callback(pyplot.close, 'all')
        runpy.run_path(argv[0], run_name='__main__')


def assert_picture(path):
    with Image.open(path) as image:
        assert len(set(image.convert('L').resize((64, 64)).getdata())) > 1


@pytest.mark.parametrize('task', TASKS)
def test_tools(task, tmp_path, monkeypatch):
    """Those to train, to test, to browse data, and to show confusion."""
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend('Agg')
    write, package, checkpoint, metric = TASKS[task]
    options = {'test_dataloader.dataset.indices': None}
    if task == 'det':
        for split in 'train', 'val', 'test':
            key = f'{split}_dataloader.dataset.metainfo.classes'
            options[key] = CLASSES
        for part in 'bbox', 'mask':
            options[f'model.roi_head.{part}_head.num_classes'] = 5
    config = write(tmp_path, **options)
    run(package, 'train', config, '--work-dir', 'trained')
    checkpoint = Path('trained') / checkpoint
    weights = torch.load(checkpoint, weights_only=False)['state_dict']
    assert all(weight.isfinite().all() for weight in weights.values())

    tiny.forget_instances()
    results = 'out' if task == 'seg' else 'out.pkl'
    argv = config, checkpoint, '--work-dir', 'tested', '--out', results
    run(package, 'test', *argv)
    (log,) = Path('tested').glob('*/*.json')
    assert metric in json.loads(log.read_text())
    argv = 'analysis_tools/confusion_matrix', config, results
    if task == 'det':
        run(package, *argv, 'matrix', '--score-thr', '0')
        assert_picture('matrix/confusion_matrix.png')
    elif task == 'cls':
        run(package, *argv, '--out', 'matrix.pkl')
        images = [*Path('imagenet/val').rglob('*.JPEG')]
        assert mmengine.load('matrix.pkl').sum() == len(images) > 0
    else:  # draws 146 megapixels, too many for some memories
        names = {file.stem for file in Path('out').iterdir()}
        images = Path('ade20k').rglob('validation/*.jpg')
        assert names == {file.stem for file in images}

    if task != 'cls':
        argv = config, '--not-show', '--output-dir', 'browsed'
        run(package, 'analysis_tools/browse_dataset', *argv)
        images = [*tmp_path.rglob('train*/*.jpg')]
        pictures = [*Path('browsed').rglob('*.*g')]
        assert len(pictures) == len(images) > 0
        for picture in pictures:
            assert_picture(picture)
