"""Options, configs and user mistakes, as all command-line tools treat them."""

import contextlib
import difflib
import errno
import importlib.util
import inspect
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS, registry
from mmengine.runner import Runner
from mmengine.utils import get_object_from_string

from . import config
from .allocator import keep_freed_memory
from .checkpoint import CheckpointError, load_safely, save_safely
from .data import DataError
from .data.config import name_of
from .data.runner import CheckData, checked
from .engine import AverageStatistics, CurvesHook, LoadingCheck, Reseed
from .engine.parallel import exchanging_lists
from .inference import ConfigError, scope_of
from .models import OverLoCK


def object_of(path: str) -> Any:
    """The object of a dotted path, as in the configs that trainings dump.

    mmengine's own function finds ``smooth_l1_loss``, the function, in place
    of the module of that name, and so not the ``L1Loss`` in it.
    """
    module, _, name = path.rpartition('.')
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return get_object_from_string(path)


def config_of(
    path: str, filename: str, other: Callable = Config._get_cfg_path
) -> tuple[str, str | None]:
    """The place of a base config, and the scope that its types get.

    mmengine's own function, the other one, knows no ``mmoverlock::``, and
    would look for all types in a registry of that name.
    """
    package, _, name = path.partition('::')
    if package == 'mmoverlock':
        return config(name), None
    return other(path, filename)


# Runner's arguments, and what else mm* packages read from the top level.
TOP_LEVEL_KEYS = {
    *inspect.signature(Runner).parameters,
    'activation_checkpointing',
    'compile',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
} - {'cfg'}

# Datasets and metrics read these with loaders that run what a file asks for:
# pickles, by names of mmdet too, and YAML.
UNSAFE_FILES = ('.pkl', '.pickle', '.p', '.np', '.yml', '.yaml')
RESULTS = ('out_file_path', 'proposals_file')  # of metrics, which write them

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EROFS)
NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)  # but a file of that name

OTHER_OPTIMIZER = (
    'not resumed: the optimizer of the checkpoint is another one than that of '
    'the config, or has other groups of parameters. Resume with the '
    'optimizer, frozen_stages, paramwise_cfg and layers of before, or start '
    'anew from its weights: load_from=FILE, without --resume'
)

# By option: the program that starts the processes, and a variable it sets.
LAUNCHERS = {
    'pytorch': ('torchrun', 'RANK'),
    'slurm': ('srun', 'SLURM_PROCID'),
    'mpi': ('mpirun', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


class UserError(Exception):
    """A mistake of the user; its message is all that is shown."""


def set_up() -> None:
    """Set up the process of a tool: its memory, and how it treats files."""
    keep_freed_memory()
    load_safely()
    save_safely()
    registry.get_object_from_string = object_of
    Config._get_cfg_path = staticmethod(config_of)


@contextlib.contextmanager
def user_errors(tool: str) -> Iterator[None]:
    """Report user mistakes on stderr, after the tool's name, with status 2.

    They are `UserError`, `CheckpointError`, `ConfigError`, `DataError`, and
    an `OSError` for want of room, of permission or of a folder.
    """
    try:
        yield
    except Exception as error:
        known = UserError | CheckpointError | ConfigError | DataError
        number = getattr(error, 'errno', None)
        unwritable = number in NO_ROOM + DENIED + NO_FOLDER
        if not unwritable and not isinstance(error, known):
            raise
        if number in NO_FOLDER:
            error = f'there is a file where a folder is needed: {error}'
        print(f'{tool}: {error}', file=sys.stderr)
        sys.exit(2)


class ConfigOptions(DictAction):
    """mmengine's ``DictAction``, with `UserError` for a malformed item."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        for item in values:
            key, equals, text = item.partition('=')
            if not equals:
                raise UserError(
                    f'{option_string} takes KEY=VALUE, not {item!r}'
                )
            try:
                super().__call__(parser, namespace, [item], option_string)
            except AssertionError as error:  # unbalanced brackets
                raise UserError(f'{option_string} {item}: {error}') from error
            options = getattr(namespace, self.dest)
            if isinstance(options[key], str):
                # mmengine has removed all blanks, of paths too.
                options[key] = text.strip('\'"')


def add_config_arguments(parser: ArgumentParser, example: str = '') -> None:
    """Add --cfg-options, whose help ends with the example.

    All else that `load_config` reads, but the config, gets its default.
    """
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help=f'change the config{example}',
    )
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument(
        'config', help='config file; it is code, so use what you trust'
    )
    add_config_arguments(
        parser,
        ', as in model.backbone.init_cfg=None param_scheduler.0.end=100 '
        '"model.neck.in_channels=[1,2]"',
    )
    parser.add_argument(
        '--work-dir',
        help='folder of logs and checkpoints; '
        "default: the config's work_dir, or ./work_dirs/<config name>",
    )
    parser.add_argument(
        '--launcher',
        choices=['none', *LAUNCHERS],
        help='what starts the processes of distributed runs; default: none',
    )
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        help='given by torch.distributed.launch',
    )


def device(name: str) -> str:
    """The type of the option --device, which has to be there."""
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        raise UserError(f'--device {name}: {reason}') from error
    return name


def load_config(args: Namespace) -> Config:
    """Load ``args.config`` and apply the arguments that all tools share.

    Returns:
        Config: The config, with ``work_dir``, ``launcher`` and, also where
        types are classes, ``default_scope``.

    Raises:
        UserError: If the file, an option or an installed package is bad.
    """
    package, _, name = args.config.partition('::')
    try:
        path = Path(config(name) if package == 'mmoverlock' else args.config)
        if path.is_dir():
            raise UserError(f'config {path} is a folder')
        cfg = Config.fromfile(path)
    except OSError as error:  # or of its _base_
        raise UserError(f'config {args.config}: {error}') from error
    merge_options(cfg, args.cfg_options)
    check_files(cfg)
    scope = scope_of(cfg)
    needs_ops = scope in ('mmdet', 'mmseg')
    if needs_ops and not importlib.util.find_spec('mmcv._ext'):
        raise UserError(
            f'mmcv has no compiled ops, which {scope} needs (no module '
            'mmcv._ext). Install it again with --no-cache-dir '
            '--force-reinstall --no-deps --no-build-isolation, so that its '
            'build finds torch'
        )
    if scope:
        cfg.default_scope = scope
    cfg.work_dir = args.work_dir or cfg.get('work_dir')
    cfg.work_dir = cfg.work_dir or os.path.join('work_dirs', path.stem)
    cfg.launcher = args.launcher
    starter, variable = LAUNCHERS.get(args.launcher, (None, None))
    if starter and variable not in os.environ:
        raise UserError(
            f'--launcher {args.launcher} is for processes that {starter} '
            f'starts: there is no {variable} in the environment'
        )
    if args.launcher == 'mpi':  # mmengine reads both, and sets neither
        os.environ['LOCAL_RANK'] = os.environ['OMPI_COMM_WORLD_LOCAL_RANK']
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def check_files(cfg: Config) -> None:
    """Check that no file of the data that the config names could run code.

    Raises:
        UserError: If one could.
    """
    for top in cfg:
        if not top.endswith(('_dataloader', '_evaluator')):
            continue
        for key, leaf in _leaves(cfg[top], top):
            if str(leaf).endswith(UNSAFE_FILES) and not key.endswith(RESULTS):
                raise UserError(
                    f'{key}={leaf} is not read, because it could run code; '
                    'save what it holds as .json'
                )


def merge_options(cfg: Config, options: dict) -> None:
    """Merge --cfg-options, values by dotted key.

    The last part of a key may be new: an argument that the config leaves at
    its default. What comes before must exist.

    Raises:
        UserError: If a key leads nowhere, or a number becomes text.
    """
    for key, value in options.items():
        for above in options:
            if key.startswith(f'{above}.'):
                raise UserError(
                    f'--cfg-options {key}: {above} is set too; set one of them'
                )
        path, *parts = key.split('.')
        if path not in TOP_LEVEL_KEYS:
            deeper = {
                leaf
                for top in sorted(TOP_LEVEL_KEYS & cfg.keys())
                for leaf, _ in _leaves(cfg[top], top)
                if leaf.endswith(f'.{key}')
            }
            problem = f'there is no {path}'
            problem += _did_you_mean(key, deeper, 0) or _did_you_mean(
                path, TOP_LEVEL_KEYS
            )
            if path in cfg:
                problem = (
                    f'{path} is a variable of the config file, which is used '
                    'while it is read; set what is made from it'
                )
            raise UserError(f'--cfg-options {key}: {problem}')
        node = cfg.get(path)
        for part in parts[:-1]:
            if isinstance(node, list):
                node = {str(i): item for i, item in enumerate(node)}
            if not isinstance(node, dict) or f'{path}._delete_' in options:
                break  # which mmengine replaces, or says that it cannot
            if part not in node:
                raise UserError(
                    f'--cfg-options {key}: there is no {part} in {path}'
                    + _did_you_mean(part, node)
                )
            node, path = node[part], f'{path}.{part}'
        if parts and isinstance(node, list):
            raise UserError(
                f'--cfg-options {key}: {path} is a list; set all of it, or a '
                f'key of one element, as in {path}.0.KEY'
            )
        old = node.get(parts[-1]) if parts and isinstance(node, dict) else node
        if isinstance(value, str) and type(old) in (int, float):
            raise UserError(f'--cfg-options {key} is a number, not {value!r}')
    try:
        cfg.merge_from_dict(options)
    except TypeError as error:
        raise UserError(f'--cfg-options: {error}') from error


def _did_you_mean(word: str, words: Iterable[str], cutoff: float = 0.5) -> str:
    near = difflib.get_close_matches(word, words, cutoff=cutoff)
    return f'; did you mean {" or ".join(near)}?' if near else ''


def check_file(path: str, what: str) -> None:
    """Raise `UserError` if a file, not a URL, does not exist."""
    local = os.path.expanduser(path)
    if '://' not in path and not os.path.isfile(local):
        problem = 'is a folder' if os.path.isdir(local) else 'does not exist'
        raise UserError(f'{what} {path} {problem}')


def start_checkpoints(cfg: Config) -> dict[str, str]:
    """Return the checkpoints that training starts from, path by key."""
    start = {'model': cfg.model, 'load_from': cfg.get('load_from')}
    return {
        key: value
        for top, node in start.items()
        for key, value in _leaves(node, top)
        if key.endswith(('.checkpoint', 'load_from')) and value
    }


def build_runner(cfg: Config, complete: bool) -> Runner:
    """Build the runner, with the hooks of :mod:`mmoverlock.engine`.

    A distributed one works without a GPU too.

    Args:
        cfg (Config): The config.
        complete (bool): Whether the checkpoint that it loads, if any, must
            have all weights of the model.
    """
    if cfg.launcher != 'none' and get_device() == 'cpu':
        _prepare_cpu_launch(cfg)
    runner_type = cfg.get('runner_type', 'Runner')
    if isinstance(runner_type, str):
        runner_type = RUNNERS.get(runner_type)
    runner = checked(exchanging_lists(runner_type)).from_cfg(cfg)
    _count_accumulated(runner, cfg)
    hooks = AverageStatistics(), CheckData(), CurvesHook(), Reseed()
    for hook in (LoadingCheck(complete), *hooks):
        if type(hook) not in map(type, runner.hooks):
            runner.register_hook(hook)
    return runner


def _count_accumulated(runner: Runner, cfg: Config) -> None:
    """Have learning rates scaled by the images of a step of the optimizer.

    mmengine scales them by those of an iteration.
    """
    count = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    owner, name = runner, 'auto_scale_lr'
    if hasattr(runner, 'strategy'):  # which scales them, as of FSDP
        owner, name = runner.strategy, '_auto_scale_lr'
    scaling = getattr(owner, name, None) or {}
    if count > 1 and 'base_batch_size' in scaling:
        base = scaling['base_batch_size'] / count
        setattr(owner, name, dict(scaling, base_batch_size=base))


def _prepare_cpu_launch(cfg: Config) -> None:
    # mmengine selects a CUDA device when it starts distributed training.
    if cfg.launcher != 'pytorch':
        raise UserError(
            f'--launcher {cfg.launcher} needs GPUs; without, take --launcher '
            'pytorch, in processes that torchrun starts'
        )
    torch.distributed.init_process_group('gloo')
    find_unused = cfg.get('find_unused_parameters', False)
    wrapper = cfg.get('model_wrapper_cfg') or {}
    kind = name_of(wrapper.get('type'))
    if (find_unused or wrapper) and kind != 'ForeachDistributedDataParallel':
        cfg.model_wrapper_cfg = {
            'type': 'MMDistributedDataParallel',
            'broadcast_buffers': False,
            'find_unused_parameters': find_unused,
            **wrapper,
            'device_ids': None,
        }
    synchronized = [
        key
        for key, value in _leaves(cfg.model, 'model')
        if name_of(value) in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
    ]
    cfg.merge_from_dict(dict.fromkeys(synchronized, 'BN'))
    sync_bn = cfg.pop('sync_bn', None)
    if (sync_bn or synchronized) and is_main_process():
        print('SyncBN is left out: it needs GPUs')


@contextlib.contextmanager
def explain_failures(cfg: Config, options: dict) -> Iterator[None]:
    """Raise `UserError` where building or running fails by user mistake.

    It names the one of the --cfg-options that was.
    """
    try:
        yield
    except KeyError as error:
        module, _ = _origin(error)
        if module.startswith('torch.optim.'):
            raise UserError(OTHER_OPTIMIZER) from error
        if module != 'mmengine.registry.build_functions':
            raise
        fault, *_ = str(error.args[0]).split('. ')
        raise UserError(f'the config: {fault}') from error
    except TypeError as error:
        for key in options:
            if f"'{key.split('.')[-1]}'" in str(error):
                raise UserError(f'--cfg-options {key}: {error}') from error
        raise
    except ValueError as error:
        if _origin(error) == ('torch.optim.optimizer', 'load_state_dict'):
            raise UserError(OTHER_OPTIMIZER) from error
        if _origin(error) == ('mmengine.runner.runner', '__init__'):
            fault, *_ = str(error).split(', but got ')  # what may be long
            raise UserError(f'the config: {fault}') from error
        built = OverLoCK.__init__.__code__
        frames = traceback.walk_tb(error.__traceback__)
        if all(frame.f_code is not built for frame, _ in frames):
            raise
        raise UserError(f'the OverLoCK of the config: {error}') from error
    except URLError as error:
        hints = [
            f'; for {path} name a local file, --cfg-options {key}=FILE, or '
            f'start without it: {key.removesuffix(".checkpoint")}=None'
            for key, path in start_checkpoints(cfg).items()
            if '://' in path
        ]
        raise UserError(
            f'cannot download a checkpoint ({error.reason}){"".join(hints)}'
        ) from error


def _origin(error: Exception) -> tuple[str, str]:
    """The module and the function that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get('__name__', ''), frame.f_code.co_name


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of all that is no dict or list in a config."""
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        yield key, node
        return
    for name, child in node.items():
        yield from _leaves(child, f'{key}.{name}')
