"""Modules can be reloaded, as notebooks do with edited ones."""

import importlib
import pkgutil
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

import mmoverlock

for package in ('mmdet', 'mmpretrain'):
    pytest.importorskip(package)


def reload_all():
    from mmengine.registry import MODELS

    sys.path.append(str(Path(sys.prefix, 'timm')))  # where `make env` has it
    modules = {
        name: importlib.import_module(name)
        for _, name, _ in pkgutil.walk_packages(
            mmoverlock.__path__, 'mmoverlock.'
        )
    }
    before = MODELS.get('OverLoCK')
    for module in modules.values():
        importlib.reload(module)
    after = modules['mmoverlock.models.overlock'].OverLoCK
    assert MODELS.get('OverLoCK') is after is not before


def test_reload():
    """In a process of its own: others hold the classes of before."""
    process = get_context('fork').Process(target=reload_all)
    process.start()
    process.join()
    assert process.exitcode == 0
