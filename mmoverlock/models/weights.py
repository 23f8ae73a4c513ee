"""Weights into models: what fits, what does not, and the released files.

Names of weights: the release's classifiers have those of the backbone at the
top, beside ``head.`` and ``aux_head.``; models of OpenMMLab, the release's
detectors and segmentors among them, have ``backbone.`` and, in classifiers,
``head.head.`` and ``head.aux_head.``. *Merged* weights, which the release
calls reparam, are those of ``OverLoCK(deploy=True)``.
"""

import logging
from collections import OrderedDict
from typing import NamedTuple

from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import CheckpointError, read
from .reparam import DilatedReparamConv

State = dict[str, Tensor]

# Of dense predictors only. They stay as initialized if a file lacks them, as
# that of a classifier does.
OUTPUT_LAYERS = ('extra_norm.', 'h_proj.')
HEADS = ('head.', 'aux_head.')  # of classifiers
STEM = 'patch_embed1.0.weight'
_UNMERGED = 'origin_bn.weight'


def is_release(state: State) -> bool:
    """Whether a backbone is at the top, as in the release's classifiers."""
    return STEM in state


def add_prefixes(state: State) -> State:
    """The release's names of a classifier or backbone to OpenMMLab's."""
    return OrderedDict(
        (('head.' if k.startswith(HEADS) else 'backbone.') + k, weight)
        for k, weight in state.items()
    )


def remove_prefixes(state: State) -> State:
    """OpenMMLab's names of a classifier or backbone to the release's."""
    return OrderedDict(
        (k.removeprefix('head.').removeprefix('backbone.'), weight)
        for k, weight in state.items()
    )


def take(state: State, prefix: str) -> State:
    """The weights below a prefix, without it."""
    return OrderedDict(
        (name.removeprefix(prefix), weight)
        for name, weight in state.items()
        if name.startswith(prefix)
    )


def take_backbone(state: State, prefix: str = 'backbone.') -> State:
    """The weights of a backbone, without its prefix; says if others are left.

    Trainings with a teacher or averaged weights may keep several.
    """
    stems = [name for name in state if name.endswith(STEM)]
    others = [name for name in stems if not name.startswith(prefix)]
    if len(others) < len(stems) and others:
        rest = ', '.join(f'{name.removesuffix(STEM)}*' for name in others)
        text = f'of several backbones, {prefix}* is taken, and {rest} left out'
        print_log(text, 'current', logging.WARNING)
    return take(state, prefix)


def arch_of(state: State, zoo: dict) -> str | None:
    """The arch that names and shapes tell.

    Args:
        state (dict): Weights of a backbone or of a model with one.
        zoo (dict): Settings by names, ``OverLoCK.arch_zoo``.

    Returns:
        str | None: A name of the zoo, or depths and channels; None if there is
        no OverLoCK.
    """
    state = state if is_release(state) else take(state, 'backbone.')
    if not is_release(state):
        return None
    groups = ['blocks1', 'blocks2', 'blocks3', 'blocks4']
    depths = [
        len({name.split('.')[0] for name in take(state, f'{group}.')})
        for group in [*groups, 'sub_blocks3', 'sub_blocks4']
    ]
    channels = [
        len(state.get(f'{group}.0.dwconv.weight', ())) for group in groups
    ]
    for names, arch in zoo.items():
        wanted = *arch['depths'], *arch['focus_depths'], *arch['channels']
        # A backbone may end before the last stage.
        pairs = zip([*depths, *channels], wanted, strict=True)
        if all(found in (0, number) for found, number in pairs):
            return names[0]
    return f'of depths {depths} and channels {channels}'


def merge(state: State, eps: float = 1e-5) -> State:
    """Merge the branches of every dilated reparameterized convolution.

    Args:
        state (dict): Weights by name, below any prefix.
        eps (float): That of the batch norms. Defaults to 1e-5.

    Raises:
        CheckpointError: If a branch is missing or of another shape.
    """
    merged = OrderedDict(state)
    for mark in [name for name in state if name.endswith(_UNMERGED)]:
        prefix = mark.removesuffix(_UNMERGED)
        branches = take(state, prefix)
        try:
            large = branches['lk_origin.weight']
            conv = DilatedReparamConv(
                len(large), large.shape[-1], dict(type='BN', eps=eps)
            ).to(large.dtype)
            if not any(name.startswith('dil_') for name in branches):
                conv.drop_dilated()  # of a variant without
            conv.load_state_dict(branches)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f'the branches at {prefix} cannot be merged: '
                + ' '.join(str(error).split())
            ) from error
        conv.switch_to_deploy()
        for name in branches:
            del merged[prefix + name]
        for name, weight in conv.state_dict().items():
            merged[prefix + name] = weight
    return merged


def _adapt(state: State, model: nn.Module, source: str) -> State:
    """Bring weights to the names of a model, and merge them if it is."""
    if is_release(state) and not is_release(model.state_dict()):
        state = add_prefixes(state)
    for name, conv in model.named_modules():
        if not isinstance(conv, DilatedReparamConv):
            continue
        if conv.branches and f'{name}.lk_origin.bias' in state:
            raise CheckpointError(
                f'{source} has merged (reparam) weights, which are for '
                'inference only: set deploy=True in the backbone, or take the '
                'file that is not merged'
            )
        if not conv.branches and f'{name}.{_UNMERGED}' in state:
            block = model.get_submodule(name.rpartition('.')[0])
            norms = (m for m in block.modules() if isinstance(m, _BatchNorm))
            return merge(state, next(norms).eps)
    return state


class Comparison(NamedTuple):
    """The names of weights in a checkpoint and in a model."""

    loaded: list[str]
    missing: list[str]  # in the checkpoint
    unexpected: list[str]
    reshaped: dict[str, str]  # with what is wrong

    @classmethod
    def of(cls, state: State, model: nn.Module) -> 'Comparison':
        wanted = model.state_dict()
        shapes = {name: tuple(weight.shape) for name, weight in state.items()}
        result = cls(
            [], [], [name for name in state if name not in wanted], {}
        )
        for name, weight in wanted.items():
            if name not in state:
                if not name.endswith('num_batches_tracked'):
                    result.missing.append(name)
            elif shapes[name] != weight.shape:
                result.reshaped[name] = (
                    f'{name} {shapes[name]} instead of {tuple(weight.shape)}'
                )
            else:
                result.loaded.append(name)
        return result

    def __str__(self) -> str:
        fit = len(self.loaded)
        total = fit + len(self.missing) + len(self.reshaped)
        parts = [f'{fit} of {total} tensors fit']
        if self.missing:
            parts.append(f'missing: {outline(self.missing)}')
        if self.unexpected:
            parts.append(f'left out: {outline(self.unexpected)}')
        if self.reshaped:
            texts = _first([*self.reshaped.values()], 3)
            parts.append(f'of another shape: {texts}')
        return '; '.join(parts)


def outline(names: list[str]) -> str:
    """The parts of a model that names are of, and how many of each."""
    parts = {}
    for name in names:
        # Of a backbone, the part below it says more.
        depth = 2 if name.startswith('backbone.') else 1
        parts.setdefault('.'.join(name.split('.')[:depth]), []).append(name)
    texts = [
        f'{part}.* ({len(group)})' if len(group) > 1 else group[0]
        for part, group in parts.items()
    ]
    return _first(texts, 12)


def _first(texts: list[str], count: int) -> str:
    rest = len(texts) - count
    return ', '.join(texts[:count]) + (f' and {rest} more' * (rest > 0))


def fit(
    state: State, model: nn.Module, source: str, optional: tuple[str, ...]
) -> State:
    """Find what of a checkpoint a model can load, and log it.

    Args:
        state (dict): Weights by name, released or of OpenMMLab.
        model (nn.Module): A backbone, or a model with one.
        source (str): Where the weights are from, for messages.
        optional (tuple[str]): Starts of the names that may be missing, or be
            of another shape.

    Returns:
        dict: What to load.

    Raises:
        CheckpointError: If anything else is missing, nothing fits, or the
            weights are merged and the model is not.
    """
    adapted = _adapt(state, model, source)
    result = Comparison.of(adapted, model)
    names = [*result.missing, *result.reshaped]
    if not result.loaded or not all(n.startswith(optional) for n in names):
        zoos = [m.arch_zoo for m in model.modules() if hasattr(m, 'arch_zoo')]
        zoo = zoos[0] if zoos else {}
        found, arch = arch_of(state, zoo), arch_of(model.state_dict(), zoo)
        if arch is None or found == arch:
            reason = str(result)
        elif found is None:
            reason = f'it has no OverLoCK, but {outline([*state])}'
        else:
            reason = (
                f'it looks like OverLoCK {found}, and the model is OverLoCK '
                f'{arch}: change the arch or take another file'
            )
        raise CheckpointError(f'{source} does not fit the model: {reason}')
    usual = all(n.startswith(OUTPUT_LAYERS) for n in names) and all(
        n.startswith(HEADS) for n in result.unexpected
    )
    level = logging.INFO if usual else logging.WARNING
    print_log(f'loaded {source}: {result}', 'current', level)
    fitting = OrderedDict((name, adapted[name]) for name in result.loaded)
    fitting._metadata = getattr(state, '_metadata', {})
    return fitting


def load_pretrained(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None
) -> None:
    """Load what ``init_cfg`` names into an OverLoCK, and log it.

    Released files fit as they are, and so do those of models of OpenMMLab with
    an OverLoCK. The layers that make the outputs of dense predictors stay as
    initialized where the file has none, and so does the first convolution
    where it is for other channels.

    Args:
        backbone (OverLoCK): What to load into.
        checkpoint (str): See :func:`read`.
        prefix (str, optional): What the names of the backbone start with in
            the file. Defaults to None: nothing or ``'backbone.'``.

    Raises:
        CheckpointError: See :func:`read` and :func:`fit`.
    """
    state = read(checkpoint)['state_dict']
    if prefix or not is_release(state):
        prefix = (prefix or 'backbone').removesuffix('.') + '.'
        state = take_backbone(state, prefix) or state
    stem = {STEM} & state.keys()
    optional = *OUTPUT_LAYERS, *stem, *backbone.optional_weights
    fitting = fit(state, backbone, checkpoint, optional)
    backbone.load_state_dict(fitting, strict=False)
