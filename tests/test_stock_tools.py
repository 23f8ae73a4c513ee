"""The tools of MMDetection, MMSegmentation and MMPretrain on our configs."""

import contextlib
import functools
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
from mmengine.config import Config
from PIL import Image

tiny.need_openmmlab()
from matplotlib import pyplot  # noqa: E402

PACKAGES = {'det': 'mmdet', 'seg': 'mmseg', 'cls': 'mmpretrain'}
LAST = {'det': 'epoch_1', 'seg': 'iter_2', 'cls': 'epoch_1'}
CONFIGS = {'det': tiny.detector, 'seg': tiny.segmentor, 'cls': tiny.imagenet}
# What make_sample_data draws.
CLASSES = 'airplane', 'banana', 'pizza', 'remote', 'sports ball'


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Draws a task's data; its folder, config and checkpoint."""

    @functools.cache
    def draw(task):
        folder = tmp_path_factory.mktemp(task)
        options = {'test_dataloader.dataset.indices': None}
        if task == 'det':
            for split in 'train', 'val', 'test':
                classes = f'{split}_dataloader.dataset.metainfo.classes'
                options[classes] = CLASSES
            for part in 'bbox', 'mask':
                options[f'model.roi_head.{part}_head.num_classes'] = 5
        config = CONFIGS[task](folder, **options)
        checkpoint = folder / 'model.pth'
        tiny.save_model(Config.fromfile(config), checkpoint)
        return folder, config, checkpoint

    return draw


@pytest.fixture
def stock(monkeypatch, tmp_path):
    """Runs a package's tool in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend('Agg')

    def run(task, name, *arguments):
        package = Path(find_spec(PACKAGES[task]).origin).parent
        tool = package / '.mim' / 'tools' / f'{name}.py'
        argv = [str(word) for word in (tool, *arguments)]
        output = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, 'argv', argv))
            stack.enter_context(mock.patch.dict(os.environ, LOCAL_RANK='0'))
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(pyplot.rc_context())
            stack.callback(pyplot.close, 'all')
            runpy.run_path(argv[0], run_name='__main__')
        return output.getvalue()

    return run


def assert_picture(path):
    with Image.open(path) as image:
        assert len(set(image.convert('L').resize((64, 64)).getdata())) > 1


@pytest.mark.parametrize('task', PACKAGES)
def test_train_and_analyze_logs(task, drawn, stock):
    _, config, _ = drawn(task)
    stock(task, 'train', config, '--work-dir', 'work')
    (file,) = Path('work').glob(f'{LAST[task]}.pth')
    trained = torch.load(file, weights_only=False)['state_dict']
    assert all(v.isfinite().all() for v in trained.values())
    (log,) = Path('work').glob('*/vis_data/scalars.json')
    argv = [log, '--keys', 'loss', '--out', 'loss.png']
    if task == 'seg':
        pytest.importorskip('seaborn')
    else:
        argv.insert(0, 'plot_curve')
    if task == 'det':  # else the style is one of seaborn's
        argv += ['--style', 'ggplot']
    stock(task, 'analysis_tools/analyze_logs', *argv)
    assert_picture('loss.png')


@pytest.mark.parametrize(
    ('task', 'metric'),
    [('det', 'coco/segm_mAP'), ('seg', 'mIoU'), ('cls', 'accuracy/top1')],
)
def test_test_and_confusion_matrix(task, metric, drawn, stock):
    folder, config, checkpoint = drawn(task)
    results = 'out' if task == 'seg' else 'out.pkl'
    argv = 'test', config, checkpoint, '--work-dir', 'work', '--out', results
    stock(task, *argv)
    (log,) = Path('work').glob('*/*.json')
    assert metric in json.loads(log.read_text())
    if task == 'seg':  # draws 146 megapixels, too many for some memories
        images = folder.rglob('validation/*.jpg')
        names = sorted(file.stem for file in images)
        assert sorted(file.stem for file in Path('out').iterdir()) == names
        return
    argv = 'analysis_tools/confusion_matrix', config, 'out.pkl'
    if task == 'det':
        stock(task, *argv, 'matrix', '--score-thr', '0')
        assert_picture('matrix/confusion_matrix.png')
    else:
        stock(task, *argv, '--out', 'matrix.pkl')
        matrix = mmengine.load('matrix.pkl')
        images = [*(folder / 'imagenet' / 'val').rglob('*.JPEG')]
        assert matrix.shape == (1000, 1000)
        assert matrix.sum() == len(images) > 0


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_browse_dataset(task, drawn, stock):
    folder, config, _ = drawn(task)
    stock(
        *(task, 'analysis_tools/browse_dataset', config),
        *('--not-show', '--output-dir', 'browsed'),
    )
    images = [*folder.rglob('train*/*.jpg')]
    pictures = [*Path('browsed').rglob('*.*g')]
    assert len(pictures) == len(images) > 0
    for picture in pictures:
        assert_picture(picture)
