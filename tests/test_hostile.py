"""No file that a tool is given runs code; configs and options are code."""

import os
import pickle

import forked
import mmengine
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from PIL import Image

pytest.importorskip('mmcv._ext', reason='needs mmcv with its compiled ops')
for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

MASK_RCNN = tiny.ROOT / 'configs/mask_rcnn/overlock_xt_1x.py'
UPERNET = tiny.ROOT / 'configs/upernet/overlock_xt_160k.py'


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


@pytest.fixture
def refuse(capsys, monkeypatch, tmp_path):
    """Run a tool, which must end with a message; return that."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    (tmp_path / 'cwd').mkdir()
    monkeypatch.chdir(tmp_path / 'cwd')

    def run(name, *argv):
        with pytest.raises(SystemExit) as stop:
            tiny.load_tool(name).main([str(arg) for arg in argv])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert f'{name}.py: ' in message and 'Traceback' not in message
        return message

    return run


# ------------------------------------------------------------ checkpoints


def write_attack(path, marker, form):
    contents = {'state_dict': {'weight': torch.ones(1)}, 'a': Attack(marker)}
    if form == 'pickle':
        path.write_bytes(pickle.dumps(contents))
    elif form == 'zip':
        torch.save(contents, path)
    else:  # of before torch 1.6
        torch.save(contents, path, _use_new_zipfile_serialization=False)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A folder with a config, an image, and a config with data to train."""
    folder = tmp_path_factory.mktemp('models')
    tiny.write_model('cls', folder)
    cfg = Config.fromfile(forked.classifier(folder))
    for part in (cfg.model.backbone, cfg.model.head):
        part.init_cfg = dict(type='Pretrained', checkpoint='any.pth')
    cfg.test_dataloader, cfg.test_cfg = cfg.val_dataloader, {}
    cfg.test_evaluator = cfg.val_evaluator
    cfg.dump(folder / 'pretrained.py')
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'image.png')
    return folder


COMMANDS = [
    'train {folder}/classifier.py --work-dir {work} --resume {file}',
    'train {folder}/classifier.py --work-dir {work} --resume',
    'train {folder}/classifier.py --work-dir {work} --cfg-options '
    'load_from={file}',
    *(
        'train {folder}/pretrained.py --work-dir {work} --cfg-options '
        f'model.{part}.init_cfg.checkpoint={{file}} '
        f'model.{other}.init_cfg=None'
        for part, other in (('backbone', 'head'), ('head', 'backbone'))
    ),
    'test {folder}/pretrained.py {file} --work-dir {work}',
    'predict {folder}/cls.py {file} {folder}/image.png --out {work}/out',
    'visualize prior {folder}/cls.py {file} {folder}/image.png --out {work}/o',
    'export {folder}/cls.py {file} --out {work}/model.onnx',
    'convert_checkpoint {file} {work}/converted.pth',
    'summarize {work}',
]


@pytest.mark.parametrize('form', ['zip', 'pickle', 'legacy'])
@pytest.mark.parametrize('command', COMMANDS)
def test_checkpoints(models, refuse, marker, tmp_path, command, form):
    """Wherever a tool takes one."""
    work = tmp_path / 'work'
    work.mkdir()
    file = work / 'epoch_1.pth'
    write_attack(file, marker, form)
    if command.startswith('summarize'):
        Config.fromfile(models / 'classifier.py').dump(work / 'config.py')
        log = work / 'run/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('{"step": 1, "loss": 1.0, "lr": 0.1, "time": 1.0}')
    argv = command.format(folder=models, file=file, work=work).split()
    message = refuse(*argv)
    if command.startswith('export') and torch.__version__ < '2.6':
        assert 'needs torch 2.6' in message
        return
    assert str(file) in message
    assert 'refused' in message or 'is no checkpoint' in message


@pytest.mark.parametrize('form', ['zip', 'pickle', 'legacy'])
def test_checkpoint_attacks_are_real(tmp_path, form):
    file, folder = tmp_path / 'a.pth', tmp_path / 'made'
    write_attack(file, folder, form)
    if form == 'pickle':
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert folder.exists()


# ------------------------------------------------------------------- data

CLASS_WEIGHT = 'model.decode_head.loss_decode.class_weight'
NAMED_FILES = [
    ('train', MASK_RCNN, 'train_dataloader.dataset.ann_file', 'pkl'),
    ('train', MASK_RCNN, 'train_dataloader.dataset.proposal_file', 'pickle'),
    ('train', MASK_RCNN, 'val_dataloader.dataset.split_file', 'p'),
    ('train', MASK_RCNN, 'val_dataloader.dataset.hierarchy_file', 'np'),
    ('test', MASK_RCNN, 'test_evaluator.ann_file', 'yml'),
    (
        'get_flops',
        UPERNET,
        'model.decode_head.loss_decode.class_weight',
        'pkl',
    ),
    ('export', UPERNET, CLASS_WEIGHT, 'yaml'),
]


@pytest.mark.parametrize(('tool', 'config', 'key', 'suffix'), NAMED_FILES)
def test_unsafe_files(refuse, marker, tmp_path, tool, config, key, suffix):
    file = tmp_path / f'file.{suffix}'
    file.write_bytes(pickle.dumps(Attack(marker)))
    rest = {'test': ['a.pth'], 'export': ['--out', 'model.onnx']}
    argv = [config, *rest.get(tool, []), '--cfg-options', f'{key}={file}']
    message = refuse(tool, *argv)
    assert f'{key}={file} is not read, because it could run' in message


def test_unsafe_files_are_real(tmp_path):
    """What mmengine, and what numpy under mmdet, would run."""
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(Attack(tmp_path / 'a')))
    mmengine.load(tmp_path / 'a.pkl')
    code = f'!!python/object/apply:os.mkdir [{tmp_path}/b]'
    (tmp_path / 'b.yml').write_text(code)
    mmengine.load(tmp_path / 'b.yml')
    (tmp_path / 'c.np').write_bytes(pickle.dumps(Attack(tmp_path / 'c')))
    np.load(tmp_path / 'c.np', allow_pickle=True)
    assert all((tmp_path / name).is_dir() for name in 'abc')


def test_unsafe_decoder(refuse):
    key = 'train_dataloader.dataset.pipeline.0.decode_backend'
    message = refuse('train', UPERNET, '--cfg-options', f'{key}=pickle')
    assert f'{key}=pickle is not read' in message


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


def test_summarize_reads_no_unsafe_data(models, refuse, marker, tmp_path):
    """It builds the dataset of a config that another tool wrote."""
    work = tmp_path / 'work'
    work.mkdir()
    file = tmp_path / 'file.pkl'
    file.write_bytes(pickle.dumps(Attack(marker)))
    cfg = Config.fromfile(models / 'classifier.py')
    cfg.val_dataloader.dataset.ann_file = str(file)
    cfg.dump(work / 'config.py')
    assert 'file.pkl is not read' in refuse('summarize', work)
