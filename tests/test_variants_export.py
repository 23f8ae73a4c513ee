"""Variants export where the full network does; see test_export.py."""

import pytest
import torch
from test_export import load_onnx, run
from tiny import write_model

FEATURES = {
    'model.decode_head.in_channels': [8, 16, 24, 32],
    'model.auxiliary_head.in_channels': 24,
}
KERNELS = ['kernel_guidance', 'prior_update', 'small_kernel', 'lepe']


@pytest.mark.parametrize(
    'variant',
    [
        dict(remove=KERNELS),
        dict(mixer='neighborhood_attention'),
        dict(mixer='window_attention'),
        dict(mixer='involution', remove=['dilated']),
        *(
            pytest.param(FEATURES | variant, marks=pytest.mark.slow)
            for variant in (
                dict(remove=['overview'], mixer='static'),
                dict(remove=['feature_guidance', 'se', 'gate']),
            )
        ),
    ],
)
@torch.no_grad()
def test_onnx(variant, tmp_path, capsys):
    """The file has standard operators only, and agrees with the model."""
    settings = {'model.backbone.type': 'OverLoCKVariant'}
    for key, value in variant.items():
        name = key if '.' in key else f'model.backbone.{key}'
        settings[name] = value
    files = write_model('seg', tmp_path, settings)
    path = tmp_path / 'model.onnx'
    out = run(files, path, capsys, '--backbone-only', '--shape', '64', '96')
    load_onnx(path)
    # If by more than the tolerance, the tool had ended.
    assert out.count('differs by') == 1
