"""Check the data of a config: ``python tools/check_data.py CONFIG``.

Builds every dataset of the config, loads every sample and reads every
annotation, and says what would break or mislead a training, with the files
and entries; then, the exit status is 1.
"""

import argparse
import os
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from functools import partial
from multiprocessing.pool import ThreadPool

from mmengine.registry import EVALUATOR
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track

from mmoverlock import cli
from mmoverlock.data import DataError, check_data, checked
from mmoverlock.data.checks import (
    CHECKS,
    annotation_files,
    names_of,
    sample_faults,
    unseen_classes,
)
from mmoverlock.data.runner import make_split
from mmoverlock.inference import build_model, dataset_of

SHOWN = 5  # entries of every kind


def report(findings):
    """Print all kinds of findings, faults last; return the number of faults.

    One that several datasets have counts once.
    """
    kinds = defaultdict(list)
    for finding in dict.fromkeys(findings):
        kinds[finding.fault, finding.what, finding.effect].append(finding)
    for (fault, what, effect), found in sorted(
        kinds.items(), key=lambda item: item[0][0]
    ):
        kind = f'{what}: {effect}' if effect else what
        print(f'{"FAULT" if fault else "note"}, {len(found)} x {kind}')
        for finding in filter(lambda finding: finding.file, found[:SHOWN]):
            print(f'  {finding.file}  {finding.entry}'.rstrip())
        if len(found) > SHOWN:
            print(f'  and {len(found) - SHOWN} more')
    return sum(len(found) for (fault, *_), found in kinds.items() if fault)


def build_split(cfg, name, model, trained):
    """Build the datasets and the evaluator of train, val or test."""
    check_data(cfg, name)
    evaluator = cfg.get(f'{name}_evaluator')
    if evaluator and 'metrics' not in evaluator:
        evaluator = dict(type='Evaluator', metrics=evaluator)
    with redirect_stdout(sys.stderr):  # pycocotools prints what it does
        loader = checked(Runner).build_dataloader(
            cfg[f'{name}_dataloader'], seed=0
        )
        evaluator = evaluator and EVALUATOR.build(evaluator)
    return make_split(cfg, name, loader.dataset, evaluator, model, trained)


def load_all(key, dataset, seen):
    """Load all samples of a dataset; yield what is wrong with them.

    The set `seen` gets the labels that they have.
    """
    with ThreadPool(os.cpu_count()) as pool:
        load, count = partial(sample_faults, dataset, seen=seen), len(dataset)
        faults = pool.imap(load, range(count), chunksize=8)
        for found in track(faults, key, count, console=Console(stderr=True)):
            yield from found


def find(cfg, name, model, same, trained):
    """Yield all findings of a split; those of the same files only once.

    The list `trained` gets the names of train, which is the first split.
    """
    try:
        split = build_split(cfg, name, model, trained)
    except DataError as error:
        yield error.finding
        return
    for check in CHECKS if same else (*CHECKS, annotation_files):
        yield from check(split)
    seen = set()
    for key, dataset in split.datasets.items():
        classes, _ = names_of(dataset)
        print(f'{key}: {len(dataset)} samples, {len(classes)} classes')
        if not same and hasattr(dataset, 'pipeline'):
            yield from load_all(key, dataset, seen)
    if name == 'train':
        trained += names_of(next(iter(split.datasets.values())))
        yield from unseen_classes(split, seen)


def main(argv=None):
    cli.set_up()
    with cli.user_errors('check_data.py'):
        parser = argparse.ArgumentParser(
            description='Check the datasets and annotations of a config.'
        )
        parser.add_argument('config', help='config file')
        cli.add_config_arguments(parser)
        args = parser.parse_args(argv)
        cfg = cli.load_config(args)
        findings, done, trained = [], [], []
        with cli.explain_failures(cfg, args.cfg_options):
            model = build_model(cfg)
            for name in ('train', 'val', 'test'):
                dataset = dataset_of(cfg, name)
                if dataset:
                    same = dataset in done
                    findings += find(cfg, name, model, same, trained)
                    done.append(dataset)
        faults = report(findings)
        if faults:
            print(f'{faults} faults would break or mislead a training.')
            sys.exit(1)
        print('Nothing would break or mislead a training.')


if __name__ == '__main__':
    main()
