"""Check the data of a config: ``python tools/check_data.py CONFIG``.

Builds every dataset of the config, loads every sample and reads every
annotation, and says what would break or mislead a training, with the files
and entries; then, the exit status is 1.
"""

import argparse
import os
import sys
from contextlib import redirect_stdout
from multiprocessing.pool import ThreadPool

from mmengine.registry import EVALUATOR
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track

from mmoverlock import cli
from mmoverlock.data import DataError, Finding, check_data, checked
from mmoverlock.data.checks import CHECKS, THOROUGH
from mmoverlock.data.runner import make_split
from mmoverlock.inference import build_model

SHOWN = 5  # entries of every kind


def build_parser():
    parser = argparse.ArgumentParser(
        description='Check the datasets and annotations of a config.'
    )
    parser.add_argument(
        'config', help='config file; it is code, so use what you trust'
    )
    cli.add_config_arguments(parser)
    return parser


class Report:
    """Counts findings by kind, and keeps the first of each."""

    def __init__(self):
        self.kinds, self.seen = {}, set()

    def add(self, finding):
        """Count a finding, unless another dataset had it too."""
        if hash(finding) in self.seen:
            return
        self.seen.add(hash(finding))
        kind = finding.fault, finding.what, finding.effect
        found = self.kinds.setdefault(kind, [0, []])
        found[0] += 1
        if len(found[1]) < SHOWN and finding.file:
            found[1].append(finding)

    def print(self):
        """Print all kinds, faults last; return the number of faults."""
        faults = 0
        for (fault, what, effect), (count, first) in sorted(
            self.kinds.items(), key=lambda item: item[0][0]
        ):
            faults += fault * count
            kind = f'{what}: {effect}' if effect else what
            print(f'{"FAULT" if fault else "note"}, {count} x {kind}')
            for finding in first:
                print(f'  {finding.file}  {finding.entry}'.rstrip())
            if count > len(first) > 0:
                print(f'  and {count - len(first)} more')
        return faults


def build_split(cfg, name, model):
    """Build the datasets and the evaluator of a split."""
    check_data(cfg, name)
    evaluator = cfg.get(f'{name}_evaluator')
    if evaluator and 'metrics' not in evaluator:
        evaluator = dict(type='Evaluator', metrics=evaluator)
    with redirect_stdout(sys.stderr):  # pycocotools prints what it does
        loader = checked(Runner).build_dataloader(
            cfg[f'{name}_dataloader'], seed=0
        )
        evaluator = evaluator and EVALUATOR.build(evaluator)
    return make_split(cfg, name, loader.dataset, evaluator, model)


def load_all(key, dataset):
    """Load all samples of a dataset; yield a finding of each that fails."""

    def load(i):
        try:
            try:
                dataset.pipeline.load(dataset.get_data_info(i))
            except DataError:
                raise
            except Exception:  # it may need the steps that load leaves out
                dataset.prepare_data(i)
        except DataError as error:
            return error.finding
        except Exception as error:
            path = dataset.get_data_info(i).get('img_path')
            return Finding(
                key,
                'has samples that its pipeline fails on',
                f'{path}: {error}',
            )

    with ThreadPool(os.cpu_count()) as pool:
        yield from filter(
            None,
            track(
                pool.imap(load, range(len(dataset)), chunksize=8),
                description=key,
                total=len(dataset),
                console=Console(stderr=True),
            ),
        )


def find(cfg, name, model, same):
    """Yield all findings of a split.

    Args:
        cfg (Config): The config.
        name (str): ``'train'``, ``'val'`` or ``'test'``.
        model (nn.Module): The model.
        same (bool): Whether its files were checked before.
    """
    try:
        split = build_split(cfg, name, model)
    except DataError as error:
        yield error.finding
        return
    for check in CHECKS if same else CHECKS + THOROUGH:
        yield from check(split)
    for key, dataset in split.datasets.items():
        classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
        print(f'{key}: {len(dataset)} samples, {len(classes)} classes')
        if not same and hasattr(dataset, 'pipeline'):
            yield from load_all(key, dataset)


def main(argv=None):
    cli.set_up()
    with cli.user_errors('check_data.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        report, done = Report(), []
        with cli.explain_failures(cfg, args.cfg_options):
            model = build_model(cfg)
            for name in ('train', 'val', 'test'):
                loader = cfg.get(f'{name}_dataloader')
                if loader:
                    same = loader.dataset in done
                    done.append(loader.dataset)
                    for finding in find(cfg, name, model, same):
                        report.add(finding)
        faults = report.print()
        if faults:
            print(f'{faults} faults would break or mislead a training.')
            sys.exit(1)
        print('Nothing would break or mislead a training.')


if __name__ == '__main__':
    main()
