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
    """A folder with two images of the same stem, and one in a linked one."""
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'sub').symlink_to(tmp_path_factory.mktemp('elsewhere'))
    for seed, name in enumerate(('a.png', 'a.bmp', 'sub/b.png')):
        tiny.photo(folder / name, (80, 60), seed)
    (folder / 'c.GIF').touch()  # it is not read
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
    """The rows of a picture that are not those of its image."""
    picture, original = (np.asarray(Image.open(p)) for p in (path, image))
    assert picture.shape == original.shape
    return (picture != original).any((1, 2))


def test_detector(models, photos, predict, tmp_path):
    """Objects of the first image, above a threshold, and those of another."""
    image, other = photos / 'a.bmp', photos / 'a.png'
    model = mmdet.init_detector(*models['det'], device='cpu')
    expected = mmdet.inference_detector(model, str(image)).pred_instances
    assert len(expected) == 5
    threshold = expected.scores[-2:].mean().item()  # leaves out the last
    found, _ = predict('det', image, other, f'--score-thr={threshold}')
    assert found['images'] == [
        {'id': i, 'file_name': str(file), 'height': 60, 'width': 80}
        for i, file in enumerate((image, other), 1)
    ]
    assert found['categories'][0] == {'id': 1, 'name': 'person'}
    assert len(found['categories']) == 80
    ids = [annotation['id'] for annotation in found['annotations']]
    assert ids == [*range(1, len(ids) + 1)]
    annotations = [a for a in found['annotations'] if a['image_id'] == 1]
    assert len(annotations) < len(ids)
    for annotation, instance in zip(annotations, expected[:4], strict=True):
        assert annotation['category_id'] == instance.labels.item() + 1
        score = pytest.approx(instance.scores.item(), abs=1e-4)
        assert annotation['score'] == score
        x, y, width, height = annotation['bbox']
        corners = x, y, x + width, y + height
        np.testing.assert_allclose([corners], instance.bboxes, atol=1e-2)
        mask = coco_masks.decode(annotation['segmentation'])
        assert (mask == instance.masks[0].numpy()).mean() > 0.99
        assert annotation['area'] == mask.sum()
    assert changed_rows(tmp_path / 'pictures' / 'a.png', image).any()


def test_segmentor_and_inputs(models, photos, predict, tmp_path):
    """Folders, patterns, files given twice, and what cannot be read."""
    damaged = (photos / 'a.png').read_bytes()[:60]
    (tmp_path / 'damaged.png').write_bytes(damaged)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.avi').write_text('text')
    Image.new('RGB', (2000, 2)).save(tmp_path / 'thin.png')
    Image.new('L', (80, 60)).save(tmp_path / 'gray.png')
    bad = {
        'damaged.png': 'damaged, no image, or none that the test',
        'empty': 'there are no images',
        'gray.png': 'it has 1 channels, and the model takes 3',
        'none.png': 'there is no such file',
        'text.avi': 'not a video',
        'thin.png': 'the test pipeline fails on its 2000 x 2 pix',
    }
    inputs = [photos, photos / 's*/b.png', *map(tmp_path.joinpath, bad)]
    unchanged = f'{tiny.TEST_SET}.pipeline.0.color_type=unchanged'
    inputs += '--cfg-options', unchanged
    found, message = predict('seg', *inputs, status=1)
    assert '6 inputs could not be read' in message
    assert f'{photos}: left out are 1 .gif; read are .bmp .jpeg' in message
    for name, words in bad.items():
        assert f'{tmp_path / name}: {words}' in message
    assert len(found['classes']) == 150 and found['classes'][2] == 'sky'
    assert [
        (image['id'], image['file_name'], image['label_map'])
        for image in found['images']
    ] == [
        (1, f'{photos}/a.bmp', 'label_maps/a.png'),
        (2, f'{photos}/a.png', 'label_maps/a_2.png'),
        (3, f'{photos}/sub/b.png', 'label_maps/sub/b.png'),
    ]
    model = mmseg.init_model(models['seg'][0], device='cpu')
    model.load_state_dict(torch.load(models['seg'][1])['state_dict'])
    expected = mmseg.inference_model(model, f'{photos}/sub/b.png')
    labels = np.asarray(Image.open(tmp_path / 'label_maps/sub/b.png'))
    assert labels.dtype == np.uint8
    same = labels == expected.pred_sem_seg.data[0].numpy()
    assert same.mean() > 0.99
    picture = tmp_path / 'pictures/sub/b.png'
    assert changed_rows(picture, photos / 'sub/b.png').any()


def test_classifier_and_video(models, photos, predict, tmp_path, monkeypatch):
    """Frames are told apart; --fuse fuses."""
    fused = mock.Mock(wraps=tool.fuse)
    monkeypatch.setattr(tool, 'fuse', fused)
    image, video = photos / 'a.png', tmp_path / 'clip.avi'
    frame = cv2.imread(str(image))
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(video), codec, 5, (80, 60))
    for picture in (frame, 255 - frame):
        writer.write(picture)
    writer.release()
    found, _ = predict('cls', image, video, '--fuse')
    fused.assert_called_once()
    frames = [(i['file_name'], i.get('frame')) for i in found['images']]
    assert frames == [(str(image), None), (str(video), 0), (str(video), 1)]
    first, second, third = (i['predictions'] for i in found['images'])
    model = mmpretrain.get_model(*models['cls'], device='cpu')
    inferencer = mmpretrain.ImageClassificationInferencer(model)
    [expected] = inferencer(str(image))
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
    images = photos / 'a.bmp', photos / 'a.png'
    effects = ZeroDivisionError('of a font'), None, None
    monkeypatch.setattr(tool, 'draw', mock.Mock(side_effect=effects))
    found, output = predict('cls', *images, status=1)
    assert len(found['images']) == 2
    assert output.endswith(
        '1 pictures could not be drawn:\n'
        f'{tmp_path}/pictures/a.png: ZeroDivisionError: of a font\n'
    )
    samples = mock.Mock(wraps=tool.predict)
    samples.side_effect = mock.DEFAULT, RuntimeError('out of memory')
    monkeypatch.setattr(tool, 'predict', samples)
    with pytest.raises(RuntimeError, match='out of memory'):
        predict('cls', *images)
    found = json.loads((tmp_path / 'predictions.json').read_text())
    assert len(found['images']) == 1
