"""tools/predict.py: what it writes is what OpenMMLab's own functions say."""

import json
from unittest import mock

import cv2
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

tiny.need_openmmlab()
from mmdet import apis as mmdet  # noqa: E402
from mmpretrain import apis as mmpretrain  # noqa: E402
from mmseg import apis as mmseg  # noqa: E402

tool = tiny.load_tool('predict')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    return {task: tiny.write_model(task, folder) for task in tiny.CONFIGS}


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A folder with two images of the same stem, and one below."""
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'sub').mkdir()
    rng = np.random.default_rng(0)
    for name in ('a.png', 'a.bmp', 'sub/b.png'):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80, 60)).save(folder / name)
    return folder


def run(models, task, out, *inputs, options=()):
    config, checkpoint = models[task]
    argv = [config, checkpoint, *map(str, inputs), '--out', str(out)]
    tool.main([*argv, '--device', 'cpu', *options])
    return json.loads((out / 'predictions.json').read_text())


def drawn(path, image):
    """Whether a picture exists and is not the image itself."""
    picture = np.asarray(Image.open(path))
    original = np.asarray(Image.open(image))
    assert picture.shape == original.shape
    return (picture != original).any()


def test_detector(models, photos, tmp_path):
    image = photos / 'a.png'
    options = ['--score-thr', '0']
    found = run(models, 'det', tmp_path, image, options=options)
    assert found['images'] == [
        {'id': 1, 'file_name': str(image), 'height': 60, 'width': 80}
    ]
    assert found['categories'][0] == {'id': 1, 'name': 'person'}
    assert len(found['categories']) == 80
    model = mmdet.init_detector(*models['det'], device='cpu')
    expected = mmdet.inference_detector(model, str(image))
    expected = expected.pred_instances
    annotations = found['annotations']
    assert len(annotations) == 5
    for annotation, instance in zip(annotations, expected, strict=True):
        x, y, width, height = annotation['bbox']
        (box,) = instance.bboxes.numpy()
        corners = x, y, x + width, y + height
        np.testing.assert_allclose(corners, box, atol=1e-2)
        assert annotation['category_id'] == instance.labels.item() + 1
        score = pytest.approx(instance.scores.item(), abs=1e-4)
        assert annotation['score'] == score
        assert annotation['image_id'] == 1
        mask = coco_masks.decode(annotation['segmentation'])
        assert (mask == instance.masks[0].numpy()).mean() > 0.99
        assert annotation['area'] == mask.sum()
    assert [a['id'] for a in annotations] == [1, 2, 3, 4, 5]
    assert drawn(tmp_path / 'pictures' / 'a.png', image)
    coco = COCO(str(tmp_path / 'predictions.json'))
    assert coco.getImgIds() == [1] and len(coco.getCatIds()) == 80
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[1])):
        assert coco.annToMask(annotation).sum() == annotation['area']

    scores = [annotation['score'] for annotation in annotations]
    assert scores == sorted(scores, reverse=True)
    kept = 1 + np.argmin(np.diff(scores))  # before the largest drop
    threshold = (scores[kept - 1] + scores[kept]) / 2
    assert scores[kept] < threshold < scores[kept - 1]
    options = ['--score-thr', str(threshold)]
    found = run(models, 'det', tmp_path, image, options=options)
    assert found['annotations'] == annotations[:kept]


def test_segmentor_and_inputs(models, photos, tmp_path, capsys):
    """Folders, patterns, files given twice, and what cannot be read."""
    bad = tmp_path / 'bad.png'
    bad.write_bytes((photos / 'a.png').read_bytes()[:60])
    (tmp_path / 'empty').mkdir()
    thin = tmp_path / 'thin.png'
    Image.new('RGB', (2000, 2)).save(thin)
    inputs = thin, photos, bad, photos / 's*' / 'b.png', tmp_path / 'none.png'
    with pytest.raises(SystemExit) as stop:
        run(models, 'seg', tmp_path, *inputs, tmp_path / 'empty')
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert '4 inputs could not be read' in message
    assert f'{thin}: the test pipeline fails on its 2000 x 2 pix' in message
    assert f'{bad}: damaged, no image, or none that the test' in message
    assert f'{tmp_path / "none.png"}: there is no such file' in message
    assert f'{tmp_path / "empty"}: there are no images' in message
    found = json.loads((tmp_path / 'predictions.json').read_text())
    rows = ('a.bmp', 'a.png'), ('a.png', 'a_2.png'), ('sub/b.png',) * 2
    for i, (image, row) in enumerate(zip(found['images'], rows, strict=True)):
        name, label_map = row
        assert (
            image['id'] == i + 1 and image['file_name'] == f'{photos}/{name}'
        )
        assert image['label_map'] == f'label_maps/{label_map}'
    assert len(found['classes']) == 150 and found['classes'][2] == 'sky'
    config, checkpoint = models['seg']
    model = mmseg.init_model(config, device='cpu')
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    for image in found['images']:
        expected = mmseg.inference_model(model, image['file_name'])
        labels = np.asarray(Image.open(tmp_path / image['label_map']))
        assert labels.dtype == np.uint8
        same = labels == expected.pred_sem_seg.data[0].numpy()
        assert same.mean() > 0.99
    picture = tmp_path / 'pictures' / 'sub' / 'b.png'
    assert drawn(picture, photos / 'sub' / 'b.png')


def test_classifier_and_video(models, photos, tmp_path, monkeypatch):
    """Frames are counted, as many as videos say they have; --fuse fuses."""
    bars, fused = [], []

    class Progress(tool.Progress):
        def advance(self, task, *args):
            super().advance(task, *args)
            bars.append((self.tasks[0].completed, self.tasks[0].total))

    monkeypatch.setattr(tool, 'Progress', Progress)
    monkeypatch.setattr(tool, 'fuse', fused.append)
    video = tmp_path / 'clip.avi'
    frame = cv2.imread(str(photos / 'a.png'))
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(video), codec, 5, (80, 60))
    for picture in (frame, 255 - frame):
        writer.write(picture)
    writer.release()
    image = photos / 'a.png'
    found = run(models, 'cls', tmp_path / 'out', image, video)
    assert bars == [(1, 3), (2, 3), (3, 3)] and not fused
    frames = [(i['file_name'], i.get('frame')) for i in found['images']]
    movie = [(str(video), frame) for frame in (0, 1)]
    assert frames == [(str(image), None), *movie]
    first, second, third = (i['predictions'] for i in found['images'])
    model = mmpretrain.get_model(*models['cls'], device='cpu')
    inferencer = mmpretrain.ImageClassificationInferencer(model)
    expected = inferencer(str(image))[0]
    assert first[0]['label'] == expected['pred_label']
    assert first[0]['class'] == found['classes'][expected['pred_label']]
    top = np.sort(expected['pred_scores'])[::-1][:5]
    scores = [prediction['score'] for prediction in first]
    np.testing.assert_allclose(scores, top, atol=1e-5)
    assert second != third
    pictures = tmp_path / 'out' / 'pictures'
    assert drawn(pictures / 'a.png', image)
    both = np.stack([Image.open(p) for p in (pictures / 'a.png', image)])
    assert (both[0, -9:] == both[1, -9:]).all()  # text is above
    names = sorted(path.name for path in (pictures / 'clip').iterdir())
    assert names == ['000000.png', '000001.png']
    run(models, 'cls', tmp_path / 'out', image, options=['--fuse'])
    assert type(fused[0]).__name__ == 'ImageClassifier'


def test_failures_lose_nothing(models, photos, tmp_path, monkeypatch, capsys):
    """A picture that is not drawn, and then anything at all."""
    effects = ZeroDivisionError('of a font'), None, None
    monkeypatch.setattr(tool, 'draw', mock.Mock(side_effect=effects))
    with pytest.raises(SystemExit) as stop:
        run(models, 'cls', tmp_path, photos / 'a.bmp', photos / 'a.png')
    assert stop.value.code == 1
    file = tmp_path / 'predictions.json'
    assert len(json.loads(file.read_text())['images']) == 2
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines == [
        '1 pictures could not be drawn:',
        f'{tmp_path}/pictures/a.png: ZeroDivisionError: of a font',
    ]

    def predict(model, data):
        monkeypatch.setattr(tool, 'predict', fail)
        return first(model, data)

    first = tool.predict
    fail = mock.Mock(side_effect=RuntimeError('out of memory'))
    monkeypatch.setattr(tool, 'predict', predict)
    with pytest.raises(RuntimeError, match='out of memory'):
        run(models, 'cls', tmp_path, photos / 'a.bmp', photos / 'a.png')
    assert len(json.loads(file.read_text())['images']) == 1


def test_inputs_among_results(models, photos, tmp_path):
    """A second run does not replace its inputs, nor predict its results."""
    (tmp_path / 'pictures').mkdir()
    image = tmp_path / 'pictures' / 'a.png'
    image.write_bytes((photos / 'a.png').read_bytes())
    for given in (image, tmp_path):
        argv = [*models['cls'], str(given), '--out', str(tmp_path)]
        assert 'where results go' in fail(argv)
    assert image.read_bytes() == (photos / 'a.png').read_bytes()


def test_colors(models, photos, tmp_path, monkeypatch):
    """The dataset's, or distinct ones for other classes."""
    palettes = []

    def draw(visualizer, *args):
        palettes.append(visualizer.dataset_meta['palette'])

    monkeypatch.setattr(tool, 'draw', draw)
    config, checkpoint = models['det']
    own = tmp_path / 'own.py'
    own.write_text(
        f'_base_ = {config!r}\n'
        'metainfo = dict(classes=[str(i) for i in range(79)])\n'
        'test_dataloader = dict(dataset=dict(metainfo=metainfo))\n'
    )
    for file in (config, str(own)):
        run({'det': (file, checkpoint)}, 'det', tmp_path, photos / 'a.png')
    assert len(palettes[0]) == 80 and tuple(palettes[0][0]) == (220, 20, 60)
    assert len({*palettes[1]}) == 79


def fail(argv):
    message = tiny.run_tool('predict', *argv, status=2).splitlines()[-1]
    assert message.startswith('predict.py: ')
    return message


def test_mistakes(models, tmp_path):
    config, checkpoint = models['cls']
    for weights, option, words in (
        ('no.pth', 'load_from=', 'checkpoint no.pth does not exist'),
        (models['seg'][1], 'load_from=', 'does not fit the model'),
        (checkpoint, f'{tiny.TEST_SET}.type=CustomDataset', 'the classes'),
        (checkpoint, 'default_scope=mmpose', 'default_scope mmpose'),
    ):
        argv = config, weights, 'x.png', '--out', tmp_path / 'out'
        assert words in fail([*argv, '--cfg-options', option])
    assert not (tmp_path / 'out').exists()
