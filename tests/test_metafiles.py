"""FLOPs and parameters in the metafiles are those of the configs."""

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import ROOT, load_tool, need_openmmlab

need_openmmlab()
METADATA = {
    model['Config']: model.get('Metadata', {})
    for path in sorted(ROOT.glob('configs/*/metafile.yml'))
    if path.parent.name != 'ablation'
    for model in yaml.safe_load(path.read_text())['Models']
}
QUICK = [
    'configs/imagenet/overlock_t_300e.py',
    'configs/mask_rcnn/overlock_xt_1x.py',
    'configs/upernet/overlock_xt_160k.py',
]


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, marks=() if path in QUICK else pytest.mark.slow)
        for path in sorted(METADATA)
    ],
)
def test_parameters(path):
    cfg = Config.fromfile(ROOT / path)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    count = sum(weight.numel() for weight in model.parameters())
    assert METADATA[path]['Parameters'] == count


@pytest.mark.slow
@pytest.mark.parametrize(
    'path', sorted(path for path in METADATA if 'FLOPs' in METADATA[path])
)
def test_flops(path):
    """That of XT as a classifier is in test_get_flops.py."""
    tool = load_tool('get_flops')
    cfg = Config.fromfile(ROOT / path)
    _, total, _ = tool.count(cfg, tool.SHAPES[cfg.default_scope])
    assert METADATA[path]['FLOPs'] == total


def test_what_has_none():
    """FLOPs of the paper's models are there; drop-ins are not counted."""
    for path, metadata in METADATA.items():
        counted = 'mini' not in path and 'drop_in' not in path
        assert ('FLOPs' in metadata) == counted, path
        assert 'Parameters' in metadata, path
