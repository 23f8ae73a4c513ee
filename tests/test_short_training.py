"""Trainings of few iterations, and what test-time augmentation takes."""

from types import SimpleNamespace

import pytest
import tiny
from mmengine.config import Config
from mmengine.hooks import LoggerHook

from mmoverlock.engine import CurvesHook


@pytest.mark.parametrize(
    'iterations, interval', [(1, 1), (2, 1), (7, 3), (100, 50), (1000, 50)]
)
def test_logged_twice(iterations, interval):
    """Curves have points though the logger's interval is longer."""
    logger = LoggerHook(interval=50)
    runner = SimpleNamespace(max_iters=iterations, hooks=[logger])
    CurvesHook().before_train(runner)
    assert logger.interval == interval


def test_cost_of_views():
    pytest.importorskip('mmcv')
    cost = tiny.load_tool('test').cost_of_views
    cfg = Config.fromfile(tiny.ROOT / 'configs/upernet/overlock_t_160k.py')
    # 2 x (0.5^2 + 0.75^2 + 1 + 1.25^2 + 1.5^2 + 1.75^2)
    found = cost(cfg.tta_pipeline, cfg.test_pipeline)
    assert found == '12 views of each image, with 17.4 times its pixels'
    flips = [[dict(type='RandomFlip', prob=p)] * 2 for p in (0.0, 1.0)]
    steps = [dict(type='TestTimeAug', transforms=flips)]
    assert cost(steps, cfg.test_pipeline) == '4 views of each image'


def test_cost_is_told(tmp_path, capsys):
    pytest.importorskip('mmcv._ext')
    pytest.importorskip('mmseg')
    tiny.load_tool('make_sample_data').main(
        ['ade20k', str(tmp_path / 'data'), '--images=1', '--size=64']
    )
    sizes = [
        dict(type='Resize', scale=(width, 64), keep_ratio=True)
        for width in (96, 192)
    ]
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    rest = [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]
    views = dict(type='TestTimeAug', transforms=[sizes, flips, *rest])
    config, checkpoint = tiny.write_model(
        'seg',
        tmp_path,
        {
            f'{tiny.TEST_SET}.data_root': str(tmp_path / 'data'),
            f'{tiny.TEST_SET}.indices': 1,
            'tta_pipeline': [dict(type='LoadImageFromFile'), views],
        },
    )
    argv = [config, checkpoint, '--work-dir', str(tmp_path / 'work')]
    tiny.load_tool('test').main([*argv, '--tta'])
    # 2 x (1 + 2)
    told = '--tta: 4 views of each image, with 6.0 times its pixels'
    assert told in capsys.readouterr().out


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
def test_preprocessor_of_upernet(arch):
    """At the top level too, where tools of mmseg read it."""
    path = tiny.ROOT / f'configs/upernet/overlock_{arch}_160k.py'
    cfg = Config.fromfile(path)
    assert cfg.data_preprocessor.type == 'SegDataPreProcessor'
    assert cfg.data_preprocessor == cfg.model.data_preprocessor
