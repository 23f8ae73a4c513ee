"""Configs of mmengine's new style, whose types are classes, in the tools."""

import re
from unittest import mock

import numpy as np
import pytest
import tiny
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from mmoverlock import cli, data

tiny.need_openmmlab()

IMPORTS = """
from mmcv.transforms import LoadImageFromFile
from mmengine.optim.optimizer import OptimWrapper
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.models import MaskRCNN
from mmdet.models.losses.smooth_l1_loss import L1Loss
from mmoverlock.models import OverLoCK
"""
train = tiny.load_tool('train')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A detector as ``new.py``, as training dumps it, its weights, an image.

    Of the module that L1Loss is in, there is a function of the same name.
    """
    folder = tmp_path_factory.mktemp('lazy')
    cfg = Config.fromfile(tiny.write_model('det', folder)[0])
    cfg.default_scope = None
    cfg.pop('custom_imports')
    text = cfg.pretty_text
    for name in re.findall(r'\b[A-Z]\w+(?=[,\n])', IMPORTS):
        assert f"type='{name}'" in text, name
        text = text.replace(f"type='{name}'", f'type={name}')
    (folder / 'new.py').write_text(IMPORTS + text)
    Config.fromfile(folder / 'new.py').dump(folder / 'dumped.py')
    assert 'smooth_l1_loss.L1Loss' in (folder / 'dumped.py').read_text()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    return folder


@pytest.mark.parametrize('name', ['new.py', 'dumped.py'])
def test_tools(folder, tmp_path, monkeypatch, name):
    """They build it, and know its packages, datasets and optimizers."""
    config = folder / name
    argv = config, folder / 'det.pth', folder / 'a.png', '--out', tmp_path
    tiny.run_tool('predict', *argv, '--device', 'cpu')
    assert '"name": "person"' in (tmp_path / 'predictions.json').read_text()
    monkeypatch.setattr(train, 'get_device', lambda: 'cpu')
    args = train.build_parser().parse_args([str(config), '--amp'])
    cfg = train.cli.load_config(args)
    assert cfg.default_scope == 'mmdet'
    train.apply_options(cfg, args)
    assert cfg.optim_wrapper.type == 'CPUAmpOptimWrapper'
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match='Unpack train2017.zip'):
        data.check_data(cfg, 'test')


def test_runner(monkeypatch):
    bases, runner = [], mock.Mock(**{'from_cfg.return_value.hooks': []})
    monkeypatch.setattr(
        cli, 'checked', lambda kind: bases.append(kind.__base__) or runner
    )
    cli.build_runner(Config(dict(launcher='none', runner_type=Runner)), True)
    assert bases == [Runner]


def test_launch_without_gpus(monkeypatch):
    """Batch norms stand for those of any kind that need some."""
    monkeypatch.setattr(
        cli.torch.distributed, 'init_process_group', lambda backend: None
    )
    kinds = 'SyncBN', 'torch.nn.SyncBatchNorm', nn.SyncBatchNorm
    norms = {f'norm{i}': dict(type=kind) for i, kind in enumerate(kinds)}
    cfg = Config(dict(launcher='pytorch', model=norms))
    wrapper = dict(type='ForeachDistributedDataParallel')  # has no options
    cfg.model_wrapper_cfg = wrapper
    cli._prepare_cpu_launch(cfg)
    assert cfg.model_wrapper_cfg == wrapper
    assert {norm['type'] for norm in cfg.model.values()} == {'BN'}
