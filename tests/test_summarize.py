"""tools/summarize.py and the curves at the end of a training."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from PIL import Image

from mmoverlock.curves import draw_curves, read_scalars
from mmoverlock.engine import CurvesHook
from mmoverlock.inference import color_of

tiny.need_openmmlab()


tool = tiny.load_tool('summarize')


def write_run(work_dir, name, records):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    lines = [json.dumps(record) + '\n' for record in records]
    (folder / 'scalars.json').write_text(''.join(lines))


def training(step, **values):
    return {'lr': 0.1 / step, 'loss': 2 / step, 'time': 0.5, 'step': step} | (
        values
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    return saved


def lines(axes):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
    }


def test_curves(tmp_path, figures):
    """Of an iteration-based run on a GPU: what is where, and what is said."""
    speeds = (0.5, 0.25, 0.25)
    write_run(
        tmp_path,
        'a',
        [
            training(10 * i, time=time, memory=100 * i, loss_x=1.0, acc=3.0)
            for i, time in enumerate(speeds, 1)
        ]
        + [{'aAcc': 50.0, 'mIoU': 20.0, 'time': 1.0, 'step': 30}],
    )
    assert draw_curves(tmp_path, batch_size=4) == {
        'aAcc': 50.0,
        'mIoU': 20.0,
        'images/s': 16.0,
        'memory (MB)': 300,
    }
    losses, metrics, rates, speed, memory = figures[0].axes
    assert lines(losses) == {
        'loss': ([10, 20, 30], [0.2, 0.1, 2 / 30]),
        'loss_x': ([10, 20, 30], [1.0] * 3),
    }
    assert lines(metrics) == {'aAcc': ([30], [50.0]), 'mIoU': ([30], [20.0])}
    assert metrics.get_xlabel() == 'iteration'
    assert lines(rates)['lr'][1] == [0.01, 0.005, 0.1 / 30]
    assert lines(speed)['images/s'][1] == [8.0, 16.0, 16.0]
    assert lines(memory)['memory'][1] == [100, 200, 300]
    for axes in (losses, metrics):
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 > axes.get_window_extent().x1  # hides no curve
    assert Image.open(tmp_path / 'curves.png').size == (1440, 900)


def test_curves_by_epoch(tmp_path, figures):
    """Without a GPU; COCO's detailed metrics are returned, not drawn."""
    found = {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_s': 0.1, 'step': 2}
    records = [training(step, epoch=step // 5) for step in (5, 10)]
    write_run(tmp_path, 'a', [*records, found])
    last = draw_curves(tmp_path, batch_size=2)
    assert last == {
        'coco/bbox_mAP': 0.2,
        'coco/bbox_mAP_s': 0.1,
        'images/s': 4.0,
    }
    _, metrics, _, _ = figures[0].axes
    assert [*lines(metrics)] == ['coco/bbox_mAP']
    assert metrics.get_xlabel() == 'epoch'


def test_resumed_runs(tmp_path):
    """What the second run did again replaces what the first had done."""
    write_run(
        tmp_path, '1', [training(step) for step in (1, 2, 3)] + [{'step': 3}]
    )
    write_run(tmp_path, '2', [training(step, loss=9) for step in (3, 4)])
    losses, evaluations = read_scalars(tmp_path)
    assert [record['step'] for record in losses] == [1, 2, 3, 4]
    assert [record['loss'] for record in losses] == [2, 1, 9, 9]
    assert evaluations == [{'step': 3}]


def test_hook(tmp_path):
    logged = []
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        cfg=Config({'train_dataloader': {'batch_size': 3}}),
        logger=SimpleNamespace(info=logged.append),
    )
    CurvesHook().after_train(runner)
    assert not logged and not any(tmp_path.iterdir())
    write_run(
        tmp_path, '1', [training(1), training(2), {'mIoU': 5.0, 'step': 2}]
    )
    CurvesHook().after_train(runner)
    path = tmp_path / 'curves.png'
    assert logged == [f'{path}: mIoU 5, images/s 6'] and path.exists()


def test_colors_do_not_collide():
    colors = np.array([color_of(label) for label in range(150)])
    distance = np.abs(colors[:, None] - colors).max(-1)
    assert (distance + 255 * np.eye(150)).min() > 1
    assert np.abs(np.diff(colors, axis=0)).max(1).min() > 50


def write_classes(folder, cfg):
    """An image and its class, and the config's dataset of it."""
    folder.mkdir()
    pixels = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    Image.fromarray(pixels).save(folder / 'x.png')
    (folder / 'list.txt').write_text('x.png 7')
    dataset = dict(
        type='CustomDataset',
        data_root=str(folder),
        ann_file='list.txt',
        metainfo={'classes': [f'class {i}' for i in range(1000)]},
        pipeline=cfg.test_dataloader.dataset.pipeline,
    )
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset])


def write_label_maps(folder, cfg):
    """An image and its map of two classes; they are a test set only.

    The network has one channel for both.
    """
    for name in ('images', 'annotations'):
        (folder / name / 'validation').mkdir(parents=True)
    labels = np.zeros((48, 64), np.uint8)
    labels[20:, 30:] = 1
    rgb = np.stack([labels * 200] * 3, axis=-1)
    Image.fromarray(rgb).save(folder / 'images' / 'validation' / 'x.jpg')
    Image.fromarray(labels).save(
        folder / 'annotations' / 'validation' / 'x.png'
    )
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.update(num_classes=2, out_channels=1)
        head.loss_decode.use_sigmoid = True
    dataset = cfg.pop('val_dataloader').dataset
    dataset.update(type='BaseSegDataset', reduce_zero_label=False)
    dataset.pipeline[3].reduce_zero_label = False
    dataset.metainfo = dict(classes=['ground', 'thing'])
    dataset.data_root = str(folder)
    cfg.test_dataloader.dataset = dataset


@pytest.mark.parametrize(
    ('task', 'write_data', 'name'),
    [
        ('cls', write_classes, 'x.png'),
        ('seg', write_label_maps, 'x.jpg'),
    ],
)
def test_work_dirs(tmp_path, capsys, figures, task, write_data, name):
    """Pictures of other tasks than detection, which test_tools has."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config, checkpoint = tiny.write_model(task, work_dir)
    cfg = Config.fromfile(config)
    if task == 'seg':
        weights = torch.load(checkpoint)['state_dict']
        for head in ('decode_head', 'auxiliary_head'):
            for part in ('weight', 'bias'):
                key = f'{head}.conv_seg.{part}'
                weights[key] = weights[key][:1]
        torch.save({'state_dict': weights}, checkpoint)
    write_data(tmp_path / 'data', cfg)
    cfg.dump(config)
    write_run(
        work_dir, '1', [training(1), training(2), {'score': 5.0, 'step': 2}]
    )
    tool.main([str(work_dir), '--images', '1'])
    out = capsys.readouterr().out
    assert 'score: 5' in out and checkpoint in out
    assert (work_dir / 'curves.png').exists()
    axes, *_ = figures[1].axes
    assert axes.get_title() == name
    height, width = axes.images[0].get_array().shape[:2]
    if task == 'seg':  # the truth, and beside it the prediction
        assert (height, width) == (48, 128)
        truth, predicted = np.split(axes.images[0].get_array(), 2, axis=1)
        assert (truth != predicted).any()
    picture = np.asarray(Image.open(work_dir / 'predictions.png'))
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 50


def test_checkpoints_elsewhere(tmp_path):
    """In the folder that mmengine makes of ``out_dir``."""
    work_dir = tmp_path / 'runs' / 'a'
    cfg = Config(dict(work_dir=str(work_dir), default_hooks=dict()))
    assert tool.checkpoints(work_dir, cfg) == work_dir
    cfg.default_hooks.checkpoint = dict(out_dir=str(tmp_path / 'b'))
    hook = CheckpointHook(out_dir=str(tmp_path / 'b'))
    hook.before_train(mock.Mock(work_dir=str(work_dir)))
    assert tool.checkpoints(work_dir, cfg) == Path(hook.out_dir)


def test_training_set_only(tmp_path, capsys):
    """There is nothing to predict, which is no error."""
    config, checkpoint = tiny.write_model('cls', tmp_path)
    cfg = Config.fromfile(config)
    cfg.val_dataloader = cfg.test_dataloader = None
    cfg.dump(config)
    write_run(tmp_path, '1', [training(1)])
    tool.main([str(tmp_path)])
    assert 'has no validation and no test set' in capsys.readouterr().out
    assert (tmp_path / 'curves.png').exists()
    assert not (tmp_path / 'predictions.png').exists()


def test_tensorboard(monkeypatch):
    """One option adds it to what the config has, or says what to install."""
    train = tiny.load_tool('train')
    args = train.build_parser().parse_args(['config', '--tensorboard'])
    local, board = (
        {'type': f'{name}VisBackend'} for name in ('Local', 'Tensorboard')
    )
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: name)
    for settings in (
        {'visualizer': {'type': 'A', 'vis_backends': [local]}},
        {'visualizer': {'type': 'A'}},
        {},
    ):
        cfg = Config(settings)
        train.apply_options(cfg, args)
        assert cfg.visualizer.vis_backends == [local, board]
    monkeypatch.setattr(train.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(train.cli.UserError, match='pip install tensorboard'):
        train.apply_options(Config(), args)


def test_nothing_logged(tmp_path):
    tiny.write_model('cls', tmp_path)
    assert 'no scalars.json in' in tiny.run_tool(
        'summarize', tmp_path, status=2
    )
