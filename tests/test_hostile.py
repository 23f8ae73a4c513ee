"""No file that a tool is given runs code; configs and options are code."""

import os
import pickle

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image

tiny.need_openmmlab()

MASK_RCNN = tiny.ROOT / 'configs/mask_rcnn/overlock_xt_1x.py'


class Attack:
    """Pickled, a call that makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def marker(tmp_path):
    """What an attack makes."""
    yield tmp_path / 'marker'
    assert not (tmp_path / 'marker').exists()


def refused(tool, *argv):
    """Run a tool, which must end with a message; return that."""
    message = tiny.run_tool(tool, *argv, status=2)
    assert f'{tool}.py: ' in message and 'Traceback' not in message
    return message


# ------------------------------------------------------------ checkpoints


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder with a config, an image, and a config with data to train."""
    folder = tmp_path_factory.mktemp('models')
    tiny.write_model('cls', folder)
    cfg = Config.fromfile(tiny.classifier(folder))
    for part in (cfg.model.backbone, cfg.model.head):
        part.init_cfg = dict(type='Pretrained', checkpoint='any.pth')
    cfg.test_dataloader, cfg.test_cfg = cfg.val_dataloader, {}
    cfg.test_evaluator = cfg.val_evaluator
    cfg.dump(folder / 'pretrained.py')
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'image.png')
    return folder


COMMANDS = [
    'train {folder}/classifier.py --work-dir {work} --resume {file}',
    'train {folder}/pretrained.py --work-dir {work} --cfg-options '
    'model.head.init_cfg.checkpoint={file} model.backbone.init_cfg=None',
    'test {folder}/pretrained.py {file} --work-dir {work}',
    'predict {folder}/cls.py {file} {folder}/image.png --out {work}/out',
    'convert_checkpoint {file} {work}/converted.pth',
    'summarize {work}',
]


@pytest.mark.parametrize('command', COMMANDS)
def test_checkpoints(models, marker, tmp_path, command):
    """Wherever a tool takes one."""
    work = tmp_path / 'work'
    work.mkdir()
    file = work / 'epoch_1.pth'
    weights = {'weight': torch.ones(1)}
    torch.save({'state_dict': weights, 'a': Attack(marker)}, file)
    if command.startswith('summarize'):
        Config.fromfile(models / 'classifier.py').dump(work / 'config.py')
        log = work / 'run/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('{"step": 1, "loss": 1.0, "lr": 0.1, "time": 1.0}')
    argv = command.format(folder=models, file=file, work=work).split()
    message = refused(*argv)
    assert str(file) in message and 'refused: it asks for posix.mk' in message


# ------------------------------------------------------------------- data


def test_unsafe_files(marker, tmp_path):
    file = tmp_path / 'file.np'
    file.write_bytes(pickle.dumps(Attack(marker)))
    key = 'val_dataloader.dataset.hierarchy_file'
    message = refused('train', MASK_RCNN, '--cfg-options', f'{key}={file}')
    assert f'{key}={file} is not read, because it could run' in message
    assert 'save what it holds as .json' in message


def test_files_in_a_list_and_results(tmp_path):
    """Of datasets in datasets; what is written is no matter."""
    cli = tiny.load_tool('train').cli
    cfg = Config(dict(val_evaluator=[dict(out_file_path='results.pkl')]))
    cli.check_files(cfg)
    inner = dict(type='CocoDataset', ann_file='train.pkl')
    datasets = dict(type='ConcatDataset', datasets=[inner])
    cfg = Config(dict(train_dataloader=dict(dataset=datasets)))
    with pytest.raises(cli.UserError, match='datasets.0.ann_file=train.pkl'):
        cli.check_files(cfg)


def test_summarize_reads_no_unsafe_data(models, marker, tmp_path):
    """It builds the dataset of a config that another tool wrote."""
    work = tmp_path / 'work'
    work.mkdir()
    file = tmp_path / 'file.pkl'
    file.write_bytes(pickle.dumps(Attack(marker)))
    cfg = Config.fromfile(models / 'classifier.py')
    cfg.val_dataloader.dataset.ann_file = str(file)
    cfg.dump(work / 'config.py')
    assert 'file.pkl is not read' in refused('summarize', work)
