"""Options, configs and user mistakes, as all command-line tools treat them."""

import contextlib
import difflib
import errno
import importlib.util
import inspect
import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
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
from .data import DataError, checked
from .engine import AverageStatistics, CurvesHook, LoadingCheck, Reseed
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


def config_of(path: str, filename: str) -> tuple[str, str | None]:
    """Where a base config is, and the scope that its types get.

    mmengine's own function knows no ``mmoverlock::``, and would look for all
    types in a registry of that name.
    """
    package, _, name = path.partition('::')
    if package == 'mmoverlock':
        return config(name), None
    return _get_cfg_path(path, filename)


# Not this module's own, where it is reloaded after a tool was set up
_get_cfg_path = inspect.unwrap(Config._get_cfg_path)
config_of.__wrapped__ = _get_cfg_path

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

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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

    They are `UserError`, `CheckpointError`, `ConfigError` and `DataError`.
    """
    try:
        yield
    except (UserError, CheckpointError, ConfigError, DataError) as error:
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
        for value in values:
            if not re.match('[^=]+=', value):
                raise UserError(
                    f'{option_string} takes KEY=VALUE, not {value!r}'
                )
            # From between words too, mmengine removes all blanks.
            key, text = value.split('=', 1)
            if re.search(r'[^\s,[(]\s+[^\s,\])]', text):
                if ',' in text or text.startswith(('[', '(')):
                    raise UserError(
                        f'{option_string} {value}: blanks in the elements of '
                        'a list would be lost; set it in a config file'
                    )
                options = getattr(namespace, self.dest) or {}
                options = options | {key: text.strip('\'"')}
                setattr(namespace, self.dest, options)
                continue
            try:
                super().__call__(parser, namespace, [value], option_string)
            except AssertionError as error:  # unbalanced brackets
                raise UserError(f'{option_string} {value}: {error}') from error


def add_config_options(parser: ArgumentParser, example: str = '') -> None:
    """Add --cfg-options; its help ends with the example."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help=f'change the config{example}',
    )


def add_config_arguments(parser: ArgumentParser, example: str = '') -> None:
    """Add what `load_config` reads in tools that run one process."""
    add_config_options(parser, example)
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that all tools share to an ``ArgumentParser``."""
    parser.add_argument(
        'config', help='config file; it is code, so use what you trust'
    )
    parser.add_argument(
        '--work-dir',
        help='folder of logs and checkpoints; '
        "default: the config's work_dir, or ./work_dirs/<config name>",
    )
    add_config_options(
        parser,
        ', as in model.backbone.init_cfg=None param_scheduler.0.end=100 '
        '"model.neck.in_channels=[1,2]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what starts the processes of distributed runs; default: none',
    )
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help='given by torch.distributed.launch',
    )


def load_config(args: Namespace) -> Config:
    """Load the config and apply the arguments that all tools share.

    Args:
        args (argparse.Namespace): The arguments of `add_arguments`.

    Returns:
        Config: The config, with ``work_dir`` and ``launcher``.

    Raises:
        UserError: If the file, an option or an installed package is bad.
    """
    package, _, name = args.config.partition('::')
    try:
        path = Path(config(name) if package == 'mmoverlock' else args.config)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    if not path.is_file():
        near = {*path.parent.glob('*.py'), *Path('configs').glob('[!_]*/*.py')}
        raise UserError(
            f'config file {path} does not exist'
            + _did_you_mean(str(path), map(str, near))
        )
    if path.suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise UserError(f'{path} is not a config: it is no .py or .yml file')
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:  # of _base_
        raise UserError(f'config file {path}: {error}') from error
    check_options(cfg, args.cfg_options)
    cfg.merge_from_dict(args.cfg_options)
    check_files(cfg)
    complete_scope(cfg)
    cfg.work_dir = args.work_dir or cfg.get('work_dir')
    cfg.work_dir = cfg.work_dir or os.path.join('work_dirs', path.stem)
    cfg.launcher = args.launcher
    if args.launcher == 'mpi':  # mmengine reads both, and sets neither
        os.environ['LOCAL_RANK'] = os.environ['OMPI_COMM_WORLD_LOCAL_RANK']
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def complete_scope(cfg: Config) -> None:
    """Set the default scope where types are classes, and check for the ops.

    Args:
        cfg (Config): Gets a ``default_scope`` if it has none.

    Raises:
        UserError: If mmcv lacks the ops that the config needs.
    """
    scope = scope_of(cfg)
    lacking = scope in ('mmdet', 'mmseg') and not importlib.util.find_spec(
        'mmcv._ext'
    )
    if lacking:
        raise UserError(
            f'mmcv has no compiled ops, which {scope} needs (no module '
            'mmcv._ext). Install it again with --no-cache-dir '
            '--force-reinstall --no-deps --no-build-isolation, so that its '
            'build finds torch'
        )
    if scope:
        cfg.default_scope = scope


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


def check_options(cfg: Config, options: dict) -> None:
    """Check that every key of --cfg-options leads somewhere.

    The last part of a key may be new: an argument that the config leaves at
    its default. What comes before must exist.

    Args:
        cfg (Config): The config before the options are merged.
        options (dict): Values by dotted key.

    Raises:
        UserError: If a key leads nowhere.
    """
    replaced = tuple(
        key.removesuffix('_delete_')
        for key in options
        if key.endswith('._delete_')
    )
    for key in options:
        problem = _key_problem(cfg, key.removesuffix('._delete_'))
        replacing = key.startswith(replaced) and not key.endswith('._delete_')
        if problem and not replacing:
            raise UserError(f'--cfg-options {key}: {problem}')
        for other in options:
            if other.startswith(f'{key}.'):
                raise UserError(
                    f'--cfg-options sets both {key} and {other} below it'
                )


def _key_problem(cfg: Config, key: str) -> str | None:
    top, *parts = key.split('.')
    if top not in TOP_LEVEL_KEYS:
        if top in cfg:
            return (
                f'{top} is a variable of the config file, which is used '
                f'while it is read; set what is made from it{_uses(cfg, top)}'
            )
        return f'there is no {top}{_did_you_mean(top, TOP_LEVEL_KEYS)}'
    if top not in cfg:
        return None
    node, path = cfg[top], top
    for part in parts:
        last = f'{path}.{part}' == key
        if isinstance(node, list):
            if last or not part.isdecimal() or int(part) >= len(node):
                return (
                    f'{path} is a list of {len(node)}; set all of it, or a '
                    f'key of one element, as in {path}.0.KEY'
                )
            node = node[int(part)]
        elif not isinstance(node, dict):
            return (
                f'{path} is {node!r} and holds no keys; to replace it, add '
                f'{path}._delete_=True'
            )
        elif part not in node and not last:
            return f'there is no {part} in {path}{_did_you_mean(part, node)}'
        else:
            node = node.get(part)
        path = f'{path}.{part}'
    return None


def name_of(kind: type | str) -> str:
    """The name of a type, which a config has as a name, path or class."""
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def check_file(path: str, what: str) -> None:
    """Raise `UserError` if a file, not a URL, does not exist."""
    if '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        raise UserError(f'{what} {path} does not exist')


def start_checkpoints(cfg: Config) -> dict[str, str]:
    """Return the checkpoints that training starts from, path by key."""
    found = {
        key: value
        for key, value in _leaves(cfg.model, 'model')
        if key.endswith('.checkpoint') and isinstance(value, str)
    }
    if cfg.get('load_from'):
        found['load_from'] = cfg.load_from
    return found


def build_runner(cfg: Config, complete: bool) -> Runner:
    """Build the runner; a distributed one works without a GPU too.

    It has the hooks of :mod:`mmoverlock.engine`.

    Args:
        cfg (Config): The config.
        complete (bool): Whether the checkpoint that it loads, if any, must
            have all weights of the model.

    Returns:
        Runner: The runner.
    """
    if cfg.launcher != 'none' and get_device() == 'cpu':
        _prepare_cpu_launch(cfg)
    runner_type = cfg.get('runner_type', 'Runner')
    if isinstance(runner_type, str):
        runner_type = RUNNERS.get(runner_type)
    runner = checked(runner_type).from_cfg(cfg)
    hooks = LoadingCheck(complete), AverageStatistics(), CurvesHook(), Reseed()
    for hook in hooks:
        if type(hook) not in map(type, runner.hooks):
            runner.register_hook(hook)
    return runner


def _prepare_cpu_launch(cfg: Config) -> None:
    # mmengine selects a CUDA device when it starts distributed training.
    if cfg.launcher != 'pytorch':
        raise UserError(
            f'--launcher {cfg.launcher} needs GPUs; without, take --launcher '
            'pytorch, in processes that torchrun starts'
        )
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
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

    Args:
        cfg (Config): The config of the run.
        options (dict): The --cfg-options.
    """
    try:
        yield
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        for key in options:
            if match and key.split('.')[-1] == match[1]:
                raise UserError(f'--cfg-options {key}: {error}') from error
        raise
    except ValueError as error:
        built = OverLoCK.__init__.__code__
        frames = traceback.walk_tb(error.__traceback__)
        if all(frame.f_code is not built for frame, _ in frames):
            raise
        raise UserError(f'the OverLoCK of the config: {error}') from error
    except URLError as error:
        urls = {k: v for k, v in start_checkpoints(cfg).items() if '://' in v}
        files = ' '.join(f'{key}=FILE' for key in urls)
        nones = ' '.join(f'{k.removesuffix(".checkpoint")}=None' for k in urls)
        raise UserError(
            f'cannot download {" or ".join(urls.values())} ({error.reason}). '
            f'Name a local file, --cfg-options {files}, or start without it, '
            f'--cfg-options {nones}'
        ) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f'cannot write {error.filename or cfg.work_dir}: '
            f'{error.strerror}. Checkpoints saved before it are intact; when '
            'there is room, tools/train.py --resume goes on from the last'
        ) from error


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of all that is no dict or list in a config."""
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    else:
        yield key, node
        return
    for name, child in children:
        yield from _leaves(child, f'{key}.{name}')


def _uses(cfg: Config, variable: str) -> str:
    """List keys whose strings start with the value of a config variable."""
    value = cfg[variable]
    if not isinstance(value, str) or not value:
        return ''
    keys = [
        key
        for top in TOP_LEVEL_KEYS & {*cfg}
        for key, leaf in _leaves(cfg[top], top)
        if str(leaf).startswith(value)
    ]
    return f': {", ".join(sorted(keys))}' if keys else ''


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, words, cutoff=0.5)
    return f'; did you mean {" or ".join(near)}?' if near else ''
