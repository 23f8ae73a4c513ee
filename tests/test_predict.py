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


@pytest.fixture
def predict(models, tmp_path):
    """Runs the tool on inputs; returns its results and what it prints."""

    def predict(task, *inputs, status=0):
        argv = *models[task], *inputs, '--out', tmp_path, '--device', 'cpu'
        output = tiny.run_tool('predict', *argv, status=status)
        return json.loads((tmp_path / 'predictions.json').read_text()), output

    return predict


def changed_rows(path, image):
    """Which rows of a picture are not those of its image."""
    picture, original = (np.asarray(Image.open(p)) for p in (path, image))
    assert picture.shape == original.shape
    return (picture != original).any((1, 2))


def test_detector(models, photos, predict, tmp_path):
    image, other = photos / 'a.png', photos / 'a.bmp'
    found, _ = predict('det', image, other, '--score-thr=0')
    assert found['images'] == [
        {'id': i, 'file_name': str(file), 'height': 60, 'width': 80}
        for i, file in enumerate((image, other), 1)
    ]
    assert found['categories'][0] == {'id': 1, 'name': 'person'}
    assert len(found['categories']) == 80
    model = mmdet.init_detector(*models['det'], device='cpu')
    expected = mmdet.inference_detector(model, str(image)).pred_instances
    assert [a['id'] for a in found['annotations']] == [*range(1, 11)]
    annotations = found['annotations'][:5]
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
    assert changed_rows(tmp_path / 'pictures' / 'a.png', image).any()

    scores = [annotation['score'] for annotation in annotations]
    assert scores == sorted(scores, reverse=True)
    kept = 1 + np.argmin(np.diff(scores))  # before the largest drop
    threshold = (scores[kept - 1] + scores[kept]) / 2
    found, _ = predict('det', image, f'--score-thr={threshold}')
    assert found['annotations'] == annotations[:kept]


def test_segmentor_and_inputs(models, photos, predict, tmp_path):
    """Folders, patterns, files given twice, and what cannot be read."""
    bad = tmp_path / 'bad.png'
    bad.write_bytes((photos / 'a.png').read_bytes()[:60])
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.avi').write_text('text')
    thin = tmp_path / 'thin.png'
    Image.new('RGB', (2000, 2)).save(thin)
    gray = tmp_path / 'gray.png'
    Image.new('L', (80, 60)).save(gray)
    inputs = (
        thin,
        gray,
        photos,
        bad,
        photos / 's*' / 'b.png',
        tmp_path / 'none.png',
    )
    inputs += tmp_path / 'empty', tmp_path / 'text.avi'
    inputs += (
        '--cfg-options',
        f'{tiny.TEST_SET}.pipeline.0.color_type=unchanged',
    )
    found, message = predict('seg', *inputs, status=1)
    assert '6 inputs could not be read' in message
    assert f'{gray}: it has 1 channels, and the model takes 3' in message
    assert f'{tmp_path / "text.avi"}: not a video' in message
    assert f'{thin}: the test pipeline fails on its 2000 x 2 pix' in message
    assert f'{bad}: damaged, no image, or none that the test' in message
    assert f'{tmp_path / "none.png"}: there is no such file' in message
    assert f'{tmp_path / "empty"}: there are no images' in message
    names = 'a.bmp', 'a.png', 'sub/b.png'
    maps = 'a.png', 'a_2.png', 'sub/b.png'
    for i, image in enumerate(found['images']):
        assert image['id'] == i + 1
        assert image['file_name'] == f'{photos}/{names[i]}'
        assert image['label_map'] == f'label_maps/{maps[i]}'
    assert len(found['images']) == 3
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
    assert changed_rows(tmp_path / 'pictures/sub/b.png', photos / names[2])[0]


def test_classifier_and_video(models, photos, predict, tmp_path, monkeypatch):
    """Frames are told apart; --fuse fuses."""
    fused = []
    monkeypatch.setattr(tool, 'fuse', fused.append)
    image, video = photos / 'a.png', tmp_path / 'clip.avi'
    frame = cv2.imread(str(image))
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(video), codec, 5, (80, 60))
    for picture in (frame, 255 - frame):
        writer.write(picture)
    writer.release()
    found, _ = predict('cls', image, video, '--fuse')
    assert type(fused[0]).__name__ == 'ImageClassifier'
    frames = [(i['file_name'], i.get('frame')) for i in found['images']]
    assert frames == [(str(image), None), (str(video), 0), (str(video), 1)]
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
    pictures = tmp_path / 'pictures'
    rows = changed_rows(pictures / 'a.png', image)
    assert rows.any() and not rows[-9:].any()  # text is above
    names = sorted(path.name for path in (pictures / 'clip').iterdir())
    assert names == ['000000.png', '000001.png']


def test_failures_lose_nothing(photos, predict, tmp_path, monkeypatch):
    """A picture that is not drawn, and then anything at all."""
    effects = ZeroDivisionError('of a font'), None, None
    monkeypatch.setattr(tool, 'draw', mock.Mock(side_effect=effects))
    images = photos / 'a.bmp', photos / 'a.png'
    found, output = predict('cls', *images, status=1)
    assert len(found['images']) == 2
    assert output.splitlines()[-2:] == [
        '1 pictures could not be drawn:',
        f'{tmp_path}/pictures/a.png: ZeroDivisionError: of a font',
    ]
    samples = mock.Mock(wraps=tool.predict)
    samples.side_effect = mock.DEFAULT, RuntimeError('out of memory')
    monkeypatch.setattr(tool, 'predict', samples)
    with pytest.raises(RuntimeError, match='out of memory'):
        predict('cls', *images)
    found = json.loads((tmp_path / 'predictions.json').read_text())
    assert len(found['images']) == 1
