"""tools/reproduce.py: what it measures, compares and writes."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from mmengine.runner import Runner

tiny.need_openmmlab()

tool = tiny.load_tool('reproduce')
LAYOUTS = {'det': 'coco', 'seg': 'ade20k', 'cls': 'imagenet'}
DATA = ('coco', 'ade20k', 'imagenet')
FOLDERS = {'det': 'mask_rcnn', 'seg': 'upernet', 'cls': 'imagenet'}
SIZES = [
    dict(type='Resize', scale=(width, 64), keep_ratio=True)
    for width in (64, 96)
]
VIEWS = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            SIZES,
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
URL = 'https://nowhere.invalid/v1'


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A repository of tiny models, their weights, and drawn data."""
    root = tmp_path_factory.mktemp('released')
    (root / 'weights').mkdir()
    (root / 'tools').symlink_to(tiny.ROOT / 'tools')
    metafiles = []
    for task, layout in LAYOUTS.items():
        folder = root / 'configs' / task
        folder.mkdir(parents=True)
        options = dict(num_workers=0, persistent_workers=False)
        options = {f'test_dataloader.{k}': v for k, v in options.items()}
        if task == 'seg':
            options['tta_pipeline'] = VIEWS
        _, checkpoint = tiny.write_model(task, folder, options)
        Path(checkpoint).rename(root / 'weights' / f'{task}_s.pth')
        tiny.load_tool('make_sample_data').main(
            [layout, str(root / layout), '--images=8', '--size=64']
        )
        # What was published of a small one, from the metafile.
        path = tiny.ROOT / 'configs' / FOLDERS[task] / 'metafile.yml'
        models = yaml.safe_load(path.read_text())['Models']
        model = next(m for m in models if '_s_' in m['Name'])
        model['Config'] = f'configs/{task}/{task}.py'
        model['Weights'] = f'{URL}/{task}_s.pth'
        metafiles.append(f'configs/{task}/metafile.yml')
        (root / metafiles[-1]).write_text(yaml.dump({'Models': [model]}))
    index = yaml.dump({'Import': metafiles})
    (root / 'model-index.yml').write_text(index)
    return root


@pytest.fixture
def reproduce(released, tmp_path, monkeypatch):
    """Run the tool; returns the exit status and the results."""
    monkeypatch.setattr(tool, 'ROOT', released)

    def run(*options, data=DATA):
        argv = ['--weights', str(released / 'weights'), *options]
        argv += ['--out', str(tmp_path)]
        for name in data:
            argv += [f'--{name}', str(released / name)]
        status = 0
        try:
            tool.main(argv)
        except SystemExit as stop:
            status = stop.code
        path = tmp_path / 'results.json'
        results = json.loads(path.read_text())['results']
        return status, {(r['name'], r['tta']): r for r in results}

    return run


def logging(values, calls):
    """What stands for a test: it logs values, by the name of its config."""

    def run(command):
        calls.append(command)
        task = Path(command[2]).stem
        folder = Path(command[command.index('--work-dir') + 1]) / '20260101'
        folder.mkdir(parents=True, exist_ok=True)
        logged = values[task]
        (folder / '20260101.json').write_text(json.dumps(logged))
        return 0

    return run


FIGURES = {
    'det': {'coco/bbox_mAP': 0.495, 'coco/segm_mAP': 0.439},
    'seg': {'mIoU': 51.42},
    'cls': {'accuracy/top1': 84.704, 'accuracy/top5': 97.0},
}


def test_figures(reproduce, released, tmp_path, monkeypatch, capsys):
    """Every metric, with the sign, unit and tolerance."""
    calls = []
    det = yaml.safe_load((released / 'configs/det/metafile.yml').read_text())
    [det] = det['Models']
    published = [r['Metrics'] for r in det['Results']]
    assert published == [{'box AP': 49.4}, {'mask AP': 44.0}]
    monkeypatch.setattr(tool, 'run', logging(FIGURES, calls))
    status, results = reproduce()
    assert status == 0
    assert len(calls) == 4
    differences = {key: r['differences'] for key, r in results.items()}
    assert differences == {
        (det['Name'], False): {'box AP': 0.1, 'mask AP': -0.1},
        ('upernet_overlock_s_160k', False): {'mIoU': 0.12},
        ('upernet_overlock_s_160k', True): {},  # nothing was published
        ('overlock_s_300e', False): {'Top 1 Accuracy': -0.1},
    }
    result = results['upernet_overlock_s_160k', True]
    assert result['measured'] == {'mIoU': 51.42}
    weights = (released / 'weights/seg_s.pth').read_bytes()
    assert result['sha256'] == hashlib.sha256(weights).hexdigest()
    assert result['environment']['torch']
    text = (tmp_path / 'results.md').read_text()
    assert text in capsys.readouterr().out
    assert (
        '| upernet_overlock_s_160k | mIoU | 51.3 | 51.42 | +0.12 | 0.15 |'
        in text
    )
    assert (
        '| upernet_overlock_s_160k (TTA) | mIoU | - | 51.42 | - | - |' in text
    )
    assert 'mIoU: 0.15 is allowed: 0.05 by rounding' in text
    for command in calls:
        assert ('--tta' in command) == ('_tta' in ' '.join(command[:6]))


@pytest.mark.parametrize(
    'task, logged, name',
    [
        ('det', {'coco/bbox_mAP': 0.492, 'coco/segm_mAP': 0.44}, 'box AP'),
        ('cls', {'accuracy/top1': 84.69}, 'Top 1 Accuracy'),
    ],
)
def test_excess(reproduce, monkeypatch, capsys, task, logged, name):
    """More than is allowed ends with status 1, and says which it is."""
    monkeypatch.setattr(tool, 'run', logging({task: logged}, []))
    status, results = reproduce(data=[LAYOUTS[task]])
    assert status == 1
    [model] = {key[0] for key in results}
    assert results[model, False]['excess'] == [name]
    printed = capsys.readouterr()
    assert f'differ by more than is allowed: {model}\n' in printed.err
    assert '**!**' in printed.out


def test_resume(reproduce, released, tmp_path, monkeypatch, capsys):
    """It goes on after the last test, and anew where anything is another."""
    calls, run = [], logging(FIGURES, [])

    def stop_at_upernet(command):
        calls.append(Path(command[2]).stem)
        return 3 if 'seg' in command[2] else run(command)

    monkeypatch.setattr(tool, 'run', stop_at_upernet)
    status, results = reproduce()
    assert status == 2
    assert (
        'the test of upernet_overlock_s_160k ended' in capsys.readouterr().err
    )
    first = [*calls]
    assert first[-1] == 'seg' and len(results) == len(first) - 1
    monkeypatch.setattr(
        tool, 'run', lambda c: calls.append(Path(c[2]).stem) or run(c)
    )
    reproduce()
    assert sorted(calls[len(first) :]) == sorted(
        ['seg', 'seg', *({'cls', 'det'} - {*first})]
    )
    del calls[:]
    reproduce()
    assert not calls
    # Other data, in a folder of another name.
    (tmp_path / 'imagenet').symlink_to(released / 'imagenet')
    reproduce('--imagenet', str(tmp_path / 'imagenet'), data=())
    assert calls == ['cls']


def test_drawn(reproduce, monkeypatch):
    """Tests run by tools/test.py, on drawn data with drawn weights."""
    metrics = []
    test = Runner.test

    def spy(runner):
        metrics.append(test(runner))
        return metrics[-1]

    monkeypatch.setattr(Runner, 'test', spy)

    def run(command):
        assert command[0] == sys.executable
        assert command[1].endswith('tools/test.py')
        tiny.load_tool('test').main(command[2:])
        return 0

    monkeypatch.setattr(tool, 'run', run)
    status, results = reproduce()
    assert status == 1  # drawn weights are no good
    measured = [
        value for r in results.values() for value in r['measured'].values()
    ]
    expected = [
        round(found[metric.key] * metric.scale, 2)
        for found in metrics
        for metric in tool.METRICS.values()
        if metric.key in found
    ]
    assert measured == expected
    assert len(expected) == 5


def test_process():
    """Tests run in processes of their own."""
    assert tool.run([sys.executable, '-c', 'raise SystemExit(3)']) == 3


def test_mistakes(reproduce, released, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'run', None)  # nothing is started
    (tmp_path / 'results.json').write_text('{"results": []}')

    def said(*options, **given):
        status, _ = reproduce(*options, **given)
        assert status == 2
        return capsys.readouterr().err

    assert 'name the data' in said(data=[])
    assert 'no weights of arch xt' in said('--arch', 'xt', data=['coco'])
    # Before any test, that of other data included.
    missing = str(tmp_path / 'nothing')
    assert f'{missing}/' in said('--coco', missing, data=['imagenet'])

    def download(url, path):
        raise OSError('no route')

    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    message = said('--weights', missing, data=['imagenet'])
    assert f'cannot download {URL}/cls_s.pth (no route)' in message


def test_all_published():
    """Every model of the paper's tables, and those alone."""
    jobs = [*tool.released()]
    plain = {job.name: job.published for job in jobs if not job.tta}
    assert len(plain) == 4 + 6 + 3
    assert {job.name for job in jobs if job.tta} == {
        name for name in plain if name.startswith('upernet')
    }
    assert plain['mask_rcnn_overlock_s_3x'] == {
        'box AP': 51.0,
        'mask AP': 45.0,
    }
    for job in jobs:
        assert (tool.ROOT / job.config).is_file()
        assert {*job.published} <= {*tool.METRICS}
        assert re.fullmatch('xt|[tsb]', job.arch)
