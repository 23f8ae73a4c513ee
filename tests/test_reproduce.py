"""tools/reproduce.py: what it measures, compares and writes."""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import tiny
import yaml

tiny.need_openmmlab()
from mmseg.models import EncoderDecoder  # noqa: E402

tool = tiny.load_tool('reproduce')
# By task: folder of the configs, and layout of the data.
TASKS = {
    'det': ('mask_rcnn', 'coco'),
    'seg': ('upernet', 'ade20k'),
    'cls': ('imagenet', 'imagenet'),
}
DATA = [layout for _, layout in TASKS.values()]
MASK_RCNN, UPERNET = 'mask_rcnn_overlock_s_1x', 'upernet_overlock_s_160k'
SIZES = [dict(type='Resize', scale=(width, 64)) for width in (64, 96)]
PACK = dict(type='LoadAnnotations'), dict(type='PackSegInputs')
VIEWS = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[SIZES, *([step] for step in PACK)]),
]
URL = 'https://nowhere.invalid/v1'


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A repository of tiny models, their weights, and drawn data."""
    root = tmp_path_factory.mktemp('released')
    (root / 'weights').mkdir()
    (root / 'tools').symlink_to(tiny.ROOT / 'tools')
    for task, (folder, layout) in TASKS.items():
        options = {
            'test_dataloader.num_workers': 0,
            'test_dataloader.persistent_workers': False,
            'tta_pipeline': VIEWS,
        }
        _, checkpoint = tiny.write_model(task, root, options)
        Path(checkpoint).rename(root / 'weights' / f'{task}_s.pth')
        argv = layout, root / layout, '--images=8', '--size=64'
        tiny.run_tool('make_sample_data', *argv)
        # Published figures of a small one, from the metafile.
        path = tiny.ROOT / 'configs' / folder / 'metafile.yml'
        models = yaml.safe_load(path.read_text())['Models']
        model = next(m for m in models if '_s_' in m['Name'])
        model |= dict(Config=f'{task}.py', Weights=f'{URL}/{task}_s.pth')
        (root / f'{task}.yml').write_text(yaml.dump({'Models': [model]}))
    index = yaml.dump({'Import': [f'{task}.yml' for task in TASKS]})
    (root / 'model-index.yml').write_text(index)
    return root


@pytest.fixture
def reproduce(released, tmp_path, monkeypatch):
    """Run the tool, with a function for the processes that test.

    Returns the results and what the tool printed.
    """
    monkeypatch.setattr(tool, 'ROOT', released)

    def run(test, *options, data=DATA, status=0):
        monkeypatch.setattr(tool.subprocess, 'call', test)
        argv = ['--weights', released / 'weights', '--out', tmp_path, *options]
        for name in data:
            argv += [f'--{name}', released / name]
        output = tiny.run_tool('reproduce', *argv, status=status)
        results = json.loads((tmp_path / 'results.json').read_text())
        return results['results'], output

    return run


FIGURES = {
    'det': {'coco/bbox_mAP': 0.492, 'coco/segm_mAP': 0.439},
    'seg': {'mIoU': 51.42},
    'cls': {'accuracy/top1': 84.704, 'accuracy/top5': 97.0},
}


def test_figures(reproduce, released, tmp_path):
    """Every metric, with the sign, unit and tolerance.

    More than is allowed ends with status 1, and says which it is. After a
    test that fails it goes on, and anew where anything is another.
    """
    tested, failing = [], ['seg']

    def test(command):
        name = command[2].stem
        if name in failing:
            return 3
        tested.append(name)
        folder = command[command.index('--work-dir') + 1] / '20260101'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '20260101.json').write_text(json.dumps(FIGURES[name]))
        return 0

    _, output = reproduce(test, status=2)
    assert f'the test of {UPERNET} ended' in output
    assert tested == ['det']
    failing.clear()
    for _ in range(2):
        results, output = reproduce(test, status=1)
        assert tested == ['det', 'seg', 'cls', 'seg']
    text = (tmp_path / 'results.md').read_text()
    assert text in output
    for line in (
        f'| {MASK_RCNN} | box AP | 49.4 | 49.20 | -0.20 **!** | 0.15 |\n',
        f'| {MASK_RCNN} | mask AP | 44.0 | 43.90 | -0.10 | 0.15 |\n',
        f'| {UPERNET} | mIoU | 51.3 | 51.42 | +0.12 | 0.15 |\n',
        f'| {UPERNET} (TTA) | mIoU | - | 51.42 | - | - |\n',
        '| overlock_s_300e | Top 1 Accuracy | 84.8 | 84.70 | -0.10 | 0.1 |\n',
        'mIoU: 0.15 is allowed: 0.05 by rounding',
    ):
        assert line in text
    assert (
        f'1 of 4 tests differ by more than is allowed: {MASK_RCNN}' in output
    )
    [result] = [result for result in results if result['tta']]
    weights = (released / 'weights/seg_s.pth').read_bytes()
    assert result['sha256'] == hashlib.sha256(weights).hexdigest()
    assert result['environment']['torch']
    # Other data, in a folder of another name.
    (tmp_path / 'imagenet').symlink_to(released / 'imagenet')
    reproduce(test, '--imagenet', tmp_path / 'imagenet', data=[])
    assert tested == ['det', 'seg', 'cls', 'seg', 'cls']


def test_drawn(reproduce):
    """Tests run by tools/test.py, on drawn data with drawn weights."""

    def run(command):
        python, script, *argv = map(str, command)
        assert python == sys.executable
        assert script == str(tool.ROOT / 'tools' / 'test.py')
        tiny.forget_instances()  # named by the second in which they start
        tiny.load_tool('test').main(argv)
        return 0

    predict = EncoderDecoder.predict
    with mock.patch.object(EncoderDecoder, 'predict', autospec=True) as spy:
        spy.side_effect = predict
        results, _ = reproduce(run, status=1)  # drawn weights are no good
    measured = [name for result in results for name in result['measured']]
    expected = ['Top 1 Accuracy', 'box AP', 'mIoU', 'mIoU', 'mask AP']
    assert sorted(measured) == expected
    # One scale, then two views
    images = Counter(call.args[2][0].img_path for call in spy.mock_calls)
    assert {*images.values()} == {3}


def test_mistakes(reproduce, tmp_path, monkeypatch):
    def said(*options, **given):
        return reproduce(None, *options, status=2, **given)[1]  # no test runs

    def download(url, path):
        raise OSError('no route')

    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    (tmp_path / 'results.json').write_text('{"results": []}')
    missing = tmp_path / 'nothing'
    assert 'no weights of arch xt' in said('--arch', 'xt', data=['coco'])
    # Before any test, that of other data included.
    assert f'{missing}/' in said('--coco', missing, data=['imagenet'])
    message = said('--weights', missing, data=['imagenet'])
    assert f'cannot download {URL}/cls_s.pth (no route)' in message


def test_all_published():
    """Every model of the paper's tables, and those alone."""
    jobs = [*tool.released()]
    plain = {job.name: job.published for job in jobs if not job.tta}
    assert len(plain) == 4 + 6 + 3
    views = {job.name for job in jobs if job.tta}
    assert views == {name for name in plain if name.startswith('upernet')}
    for job in jobs:
        assert job.published.keys() <= tool.METRICS.keys()
        assert job.arch in ('xt', 't', 's', 'b')
