"""The classifiers of this package by name, for MMPretrain's own functions."""

from pathlib import Path
from typing import Any

from mmengine.runner import CheckpointLoader
from mmpretrain.apis.model import ModelHub

from .checkpoint import read
from .models.weights import add_prefixes, is_release

SCHEME = 'mmoverlock://'


def register() -> None:
    """Have MMPretrain find them: ``get_model('overlock_t_300e')``.

    With ``pretrained=True``, that loads the released weights, whose names
    MMPretrain alone would not know. A second call changes nothing.
    """
    CheckpointLoader.register_scheme(SCHEME, _load, force=True)
    if ModelHub.has('overlock_t_300e'):
        return
    mim = Path(__file__).parent / '.mim'
    before = {*ModelHub._models_dict}
    ModelHub.register_model_index(
        mim / 'configs' / 'imagenet' / 'metafile.yml', config_prefix=mim
    )
    for name in {*ModelHub._models_dict} - before:
        model = ModelHub._models_dict[name]
        model.weights = SCHEME + model.weights


def _load(filename: str, map_location: Any = None, logger: Any = None) -> dict:
    checkpoint = read(filename.removeprefix(SCHEME))
    state = checkpoint['state_dict']
    if is_release(state):
        checkpoint['state_dict'] = add_prefixes(state)
    return checkpoint
