"""tools/summarize.py and the curves at the end of a training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image

from mmoverlock.curves import read_scalars
from mmoverlock.engine import CurvesHook

tiny.need_openmmlab()

tool = tiny.load_tool('summarize')


def write_run(work_dir, name, *records):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    lines = [json.dumps(record) + '\n' for record in records]
    (folder / 'scalars.json').write_text(''.join(lines))


def training(step, **values):
    return dict(lr=0.1 / step, loss=2 / step, time=0.5, step=step) | values


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, as they are."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda *a, **k: saved.append(a[0]) or save(*a, **k)
    )
    return saved


def test_curves(tmp_path, figures):
    """The curves in their places, and a line in the log at the end.

    COCO's detailed metrics are told, not drawn. What a resumed run did again
    replaces what the first had done; one that started anew replaces all.
    """
    logged = []
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        cfg=Config({'train_dataloader': {'batch_size': 4}}),
        logger=SimpleNamespace(info=logged.append),
    )
    CurvesHook().after_train(runner)
    assert not logged and not any(tmp_path.iterdir())
    scores = {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_s': 0.1, 'step': 2}
    first = [training(step, acc=3.0) for step in (10, 20, 25)]
    write_run(tmp_path, '1', *first, scores)
    more = dict(loss=9, loss_x=1, time=0.25)
    again = [training(i, memory=10 * i, **more) for i in (20, 30)]
    write_run(tmp_path, '2', *again)
    CurvesHook().after_train(runner)
    assert logged == [
        f'{tmp_path}/curves.png: coco/bbox_mAP 0.2, coco/bbox_mAP_s 0.1, '
        'images/s 16, memory (MB) 300'
    ]
    drawn = [
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figures[0].axes
    ]
    assert drawn == [
        {'loss': [[10, 0.2], [20, 9], [30, 9]], 'loss_x': [[20, 1], [30, 1]]},
        {'coco/bbox_mAP': [[2, 0.2]]},
        {'lr': [[10, 0.01], [20, 0.005], [30, 0.1 / 30]]},
        {'images/s': [[10, 8], [20, 16], [30, 16]]},
        {'memory': [[20, 200], [30, 300]]},
    ]
    assert Image.open(tmp_path / 'curves.png').size == (1440, 900)
    write_run(tmp_path, '3', *again[1:])
    config = tmp_path / '3' / 'vis_data' / 'config.py'
    for text, left in ('resume=True', 3), ('resume = False', 1):
        config.write_text(f'lr = 1\n{text}\n')
        trained, evaluated = read_scalars(tmp_path)
        assert (len(trained), len(evaluated)) == (left, left // 3)


def test_classifier(tmp_path, figures, monkeypatch):
    """A picture of some images of the validation set, if there is one."""
    folder = tmp_path / 'work'
    argv = 'train', tiny.classifier(tmp_path), '--work-dir', folder
    tiny.run_tool(*argv, curves=True)
    (folder / 'classifier.py').write_text('model = {}')  # a test's
    [config] = folder.glob('*/vis_data/config.py')
    cfg = Config.fromfile(config)
    datasets = [cfg.val_dataloader.dataset]
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)
    cfg.dump(config)
    out = tiny.run_tool('summarize', folder, '--images', 2)
    assert 'accuracy/top1: ' in out and str(folder / 'epoch_2.pth') in out
    titles = [axes.get_title() for axes in figures[-1].axes]
    assert titles == ['0.png', '0.png']  # of either class
    for name in ('curves.png', 'predictions.png'):
        assert np.asarray(Image.open(folder / name)).std() > 10
    (folder / 'predictions.png').unlink()
    monkeypatch.setattr(tool, 'draw_curves', lambda *args: {'a': 1})
    cfg.val_dataloader = cfg.test_dataloader = None
    cfg.dump(config)
    out = tiny.run_tool('summarize', folder)
    assert 'neither a validation nor a test' in out
    assert not (folder / 'predictions.png').exists()
    for path in *folder.glob('*.pth'), folder / 'last_checkpoint':
        path.unlink()
    out = tiny.run_tool('summarize', folder, status=2)
    assert 'a checkpoint or losses' in out


def test_segmentor(tmp_path, figures):
    """Of a test set only: predictions beside the truth."""
    folder = tmp_path / 'work'
    argv = 'train', tiny.segmentor(tmp_path), '--work-dir', folder
    tiny.run_tool(*argv, curves=True)
    [config] = folder.glob('*/vis_data/config.py')
    cfg = Config.fromfile(config)
    cfg.pop('val_dataloader')
    cfg.dump(config)
    tiny.run_tool('summarize', folder, '--images', 1)
    axes = figures[-1].axes[0]
    truth, predicted = np.split(axes.images[0].get_array(), 2, axis=1)
    [image] = tmp_path.rglob(axes.get_title())
    assert truth.shape[:2] == Image.open(image).size[::-1]
    assert (truth != predicted).any()


def test_tensorboard(monkeypatch):
    """One option adds it to what the config has, or says what to install."""
    train = tiny.load_tool('train')
    args = train.build_parser().parse_args(['config', '--tensorboard'])
    kinds = 'LocalVisBackend', 'TensorboardVisBackend'
    local, board = (dict(type=kind) for kind in kinds)
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: name)
    visualizer = dict(type='A', vis_backends=[local])
    for cfg in Config(dict(visualizer=visualizer)), Config():
        train.apply_options(cfg, args)
        assert cfg.visualizer.vis_backends == [local, board]
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(train.cli.UserError, match='pip install tensorboard'):
        train.apply_options(Config(), args)
