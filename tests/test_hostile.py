"""No file that a tool is given runs code; configs and options are code."""

import os
import pickle

import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image

tiny.need_openmmlab()


class Attack:
    """Pickled, a call that makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A config, an image, and configs with data to train and test on."""
    folder = tmp_path_factory.mktemp('models')
    tiny.write_model('cls', folder)
    cfg = Config.fromfile(tiny.classifier(folder))
    cfg.model.head.init_cfg = dict(type='Pretrained', checkpoint='any.pth')
    cfg.dump(folder / 'pretrained.py')
    Image.new('RGB', (64, 64)).save(folder / 'image.png')
    return folder


def refused(tmp_path, *argv):
    """Run a tool, which must end with a message and run nothing."""
    message = tiny.run_tool(*argv, status=2)
    assert f'{argv[0]}.py: ' in message and 'Traceback' not in message
    assert not (tmp_path / 'marker').exists()
    return message


@pytest.mark.parametrize(
    'command',
    [
        'train {folder}/classifier.py --work-dir {work} --resume {file}',
        'train {folder}/pretrained.py --work-dir {work} --cfg-options '
        'model.head.init_cfg.checkpoint={file}',
        'test {folder}/classifier.py {file} --work-dir {work}',
        'predict {folder}/cls.py {file} {folder}/image.png --out {work}/out',
        'convert_checkpoint {file} {work}/converted.pth',
        'summarize {work}',
    ],
)
def test_checkpoints(folder, tmp_path, command):
    """Wherever a tool takes one."""
    work = tmp_path / 'work'
    log = work / 'run/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "loss": 1.0, "lr": 0.1, "time": 1.0}')
    file = work / 'epoch_1.pth'
    attack = Attack(tmp_path / 'marker')
    torch.save({'state_dict': {'a': torch.ones(1)}, 'b': attack}, file)
    config = log.with_name('config.py')
    Config.fromfile(folder / 'classifier.py').dump(config)
    argv = command.format(folder=folder, file=file, work=work).split()
    message = refused(tmp_path, *argv)
    assert str(file) in message and 'refused: it asks for posix.mk' in message


def test_data(folder, tmp_path):
    """Also of datasets in datasets, and in a work dir."""
    file = tmp_path / 'file.np'
    file.write_bytes(pickle.dumps(Attack(tmp_path / 'marker')))
    cfg = Config.fromfile(folder / 'classifier.py')
    cfg.test_evaluator.out_file_path = 'results.pkl'  # which is written
    dataset = dict(cfg.val_dataloader.dataset, ann_file=str(file))
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset])
    log = tmp_path / 'run/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.touch()
    config = log.with_name('config.py')
    cfg.dump(config)
    key = 'val_dataloader.dataset.datasets.0.ann_file'
    for argv in (['train', config], ['summarize', tmp_path]):
        message = refused(tmp_path, *argv)
        assert f'{key}={file} is not read, because it could run' in message
        assert 'save what it holds as .json' in message
