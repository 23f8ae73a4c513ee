"""Configs of mmengine's new style, whose types are classes, in the tools."""

import re
from unittest import mock

import pytest
import tiny
from mmengine.config import Config
from mmengine.runner import Runner
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


@pytest.mark.parametrize('name', ['new.py', 'dumped.py'])
def test_tools(tmp_path, monkeypatch, name):
    """They build it, and know its packages, datasets and optimizers.

    As written, and as training dumps it. Of the module that L1Loss is in,
    there is a function of the same name.
    """
    config, checkpoint = tiny.write_model('det', tmp_path)
    cfg = Config.fromfile(config)
    cfg.default_scope = None
    cfg.pop('custom_imports')
    text = cfg.pretty_text
    for kind in re.findall(r'\b[A-Z]\w+(?=[,\n])', IMPORTS):
        assert f"type='{kind}'" in text, kind
        text = text.replace(f"type='{kind}'", f'type={kind}')
    config = tmp_path / 'new.py'
    config.write_text(IMPORTS + text)
    if name == 'dumped.py':
        config = tmp_path / name
        Config.fromfile(tmp_path / 'new.py').dump(config)
        assert 'smooth_l1_loss.L1Loss' in config.read_text()
    tiny.photo(tmp_path / 'a.png', (80, 60))
    argv = config, checkpoint, tmp_path / 'a.png', '--out', tmp_path
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


def test_launch_without_gpus(monkeypatch):
    """Batch norms stand for those of any kind that need some."""
    bases, runner = [], mock.Mock(**{'from_cfg.return_value.hooks': []})
    monkeypatch.setattr(
        cli, 'checked', lambda kind: bases.append(kind.__base__) or runner
    )
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    start = 'torch.distributed.init_process_group'
    monkeypatch.setattr(start, lambda backend: None)
    kinds = 'SyncBN', 'torch.nn.SyncBatchNorm', nn.SyncBatchNorm
    norms = {f'norm{i}': dict(type=kind) for i, kind in enumerate(kinds)}
    wrapper = dict(type='ForeachDistributedDataParallel')  # has no options
    settings = dict(runner_type=Runner, model_wrapper_cfg=wrapper)
    cfg = Config(dict(launcher='pytorch', model=norms, **settings))
    cli.build_runner(cfg, True)
    assert bases == [Runner] and cfg.model_wrapper_cfg == wrapper
    assert {norm['type'] for norm in cfg.model.values()} == {'BN'}
