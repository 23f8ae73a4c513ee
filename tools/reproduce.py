"""Measure the released weights: ``reproduce.py --coco DIR --imagenet DIR``.

Downloads the authors' weights, or takes those in --weights, tests them by the
configs of this project on the data given, and writes what is measured beside
what was published: ``results.md`` and ``results.json`` in --out, anew after
every test. Started again, it goes on where it stopped.

UperNet is tested at one scale, as it was published, and with test-time
augmentation. The exit status is 1 if anything differs from what was published
by more than ``METRICS`` allows, which says why so much.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.fileio import load, put_text

from mmoverlock import cli, data

ROOT = Path(__file__).parents[1]
PACKAGES = ('mm', 'onedl', 'opencv', 'pillow', 'torch')  # as they begin


class Metric(NamedTuple):
    """A metric of metafiles: its name in a log, and what is allowed.

    All published figures are rounded to 0.1, and so up to 0.05 off. The rest
    is what other versions of the libraries that the release runs on do to it:
    image decoders, resizing, operators in single precision.
    """

    key: str
    scale: float
    tolerance: float
    reason: str


METRICS = {
    'Top 1 Accuracy': Metric(
        'accuracy/top1',
        1,
        0.1,
        '0.05 by rounding, and 25 of the 50 000 images, near a draw of two '
        'classes, by decoders and resizing',
    ),
    'box AP': Metric(
        'coco/bbox_mAP',
        100,
        0.15,
        '0.05 by rounding, 0.05 because mmdet rounds to 0.1 too, and 0.05 by '
        'decoders, resizing and operators',
    ),
    'mask AP': Metric('coco/segm_mAP', 100, 0.15, 'as for boxes'),
    'mIoU': Metric(
        'mIoU',
        1,
        0.15,
        '0.05 by rounding, and 0.1 by resizing images and logits, where rare '
        'classes, of few of the 2000 images, weigh as much as others',
    ),
}


# The options that say where they are, by dataset of the metafiles.
DATASETS = {
    'ImageNet-1k': '--imagenet',
    'COCO': '--coco',
    'ADE20K': '--ade20k',
}


class Job(NamedTuple):
    """A test: a released model as a metafile has it, and how it is tested."""

    name: str
    config: str
    url: str
    dataset: str
    published: dict
    tta: bool = False

    @property
    def arch(self):
        return re.search('_(xt|t|s|b)_', self.name)[1]


def released():
    """All tests that there are, as the metafiles list the models."""
    for metafile in load(ROOT / 'model-index.yml')['Import']:
        for model in load(ROOT / metafile)['Models']:
            results = model.get('Results')
            if not results or 'Weights' not in model:
                continue
            published = {
                k: v for r in results for k, v in r['Metrics'].items()
            }
            job = Job(
                name=model['Name'],
                config=model['Config'],
                url=model['Weights'],
                dataset=results[0]['Dataset'],
                published=published,
            )
            yield job
            if 'mIoU' in published:  # of one scale
                yield job._replace(published=dict(mIoU=None), tta=True)


def choose(args):
    """The tests of what is asked for, those of small models first."""
    jobs = [
        job
        for job in released()
        if getattr(args, job.dataset) and job.arch in args.arch
    ]
    if not jobs:
        raise cli.UserError(
            f'there are no weights of arch {", ".join(args.arch)} for the '
            f'data given; name others after {", ".join(DATASETS.values())}'
        )
    return sorted(jobs, key=lambda job: (job.tta, args.arch.index(job.arch)))


def changes(job, args):
    """The options of the config that depend on the place of its data."""
    folder = getattr(args, job.dataset)
    options = {'test_dataloader.dataset.data_root': f'{folder}/'}
    if job.dataset == 'COCO':
        file = folder / 'annotations' / 'instances_val2017.json'
        options['test_evaluator.ann_file'] = str(file)
    return options


def check(jobs, args):
    """Check the data of all tests before the first."""
    for job in jobs:
        cfg = Config.fromfile(ROOT / job.config)
        cfg.merge_from_dict(changes(job, args))
        data.check_data(cfg, 'test')


def weights_of(job, args):
    """The file of the weights, which is downloaded if it is not there.

    Raises:
        UserError: If it cannot be.
    """
    path = args.weights / job.url.rpartition('/')[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f'downloading {job.url}', flush=True)
        try:
            torch.hub.download_url_to_file(job.url, str(path))
        except OSError as error:  # URLError is one
            raise cli.UserError(
                f'cannot download {job.url} ({error}); put it into a folder '
                'yourself, and name that after --weights'
            ) from error
    return path


def measure(job, weights, args):
    """Test a model.

    Returns:
        dict[str, float]: What was measured, by the names of metafiles.

    Raises:
        UserError: If the test fails.
    """
    work_dir = args.out / (job.name + '_tta' * job.tta)
    options = changes(job, args).items()
    command = [
        *(sys.executable, ROOT / 'tools' / 'test.py'),
        *(ROOT / job.config, weights, '--work-dir', work_dir),
        *(['--tta'] * job.tta),
        *('--cfg-options', *(f'{key}={value}' for key, value in options)),
    ]
    status = subprocess.call(command)
    if status:
        raise cli.UserError(
            f'the test of {job.name} ended with status {status}; start '
            'reproduce.py again to go on from there'
        )
    logs = work_dir.glob('*/*.json')  # named by the time
    logged = json.loads(max(logs).read_text())
    return {
        name: round(logged[METRICS[name].key] * METRICS[name].scale, 2)
        for name in job.published
    }


def compare(published, measured):
    """Differences by metric, and those that are more than is allowed."""
    differences = {
        name: round(measured[name] - value, 2)
        for name, value in published.items()
        if value is not None
    }
    excess = [
        name
        for name, value in differences.items()
        if abs(value) > METRICS[name].tolerance + 1e-9
    ]
    return differences, excess


def environment():
    """The device and the packages that the tests ran on."""
    gpu = torch.cuda.is_available()
    return {
        'device': torch.cuda.get_device_name() if gpu else 'cpu',
        **{
            package.name: package.version
            for package in distributions()
            if package.name.lower().startswith(PACKAGES)
        },
    }


def table(results):
    """A table of results in Markdown."""
    rows = [
        '| Model | Metric | Published | Measured | Difference | Allowed |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for result in results:
        name = result['name'] + ' (TTA)' * result['tta']
        for metric, value in result['measured'].items():
            published = difference = allowed = '-'
            if metric in result['differences']:
                published = result['published'][metric]
                difference = f'{result["differences"][metric]:+.2f}'
                difference += ' **!**' * (metric in result['excess'])
                allowed = METRICS[metric].tolerance
            rows.append(
                f'| {name} | {metric} | {published} | {value:.2f} | '
                f'{difference} | {allowed} |'
            )
    reasons = [
        f'- {name}: {metric.tolerance} is allowed: {metric.reason}.'
        for name, metric in METRICS.items()
        if any(name in result['measured'] for result in results)
    ]
    return '\n'.join([*rows, '', *reasons]) + '\n'


def reproduce(args):
    """Run all tests; returns their results."""
    jobs = choose(args)
    check(jobs, args)
    path = args.out / 'results.json'
    results = {}
    if path.exists():
        before = json.loads(path.read_text())['results']
        results = {(old['name'], old['tta']): old for old in before}
    for i, job in enumerate(jobs, 1):
        weights = weights_of(job, args)
        key = {  # another of these has to be measured anew
            'name': job.name,
            'tta': job.tta,
            'config': job.config,
            'sha256': hashlib.sha256(weights.read_bytes()).hexdigest(),
            **changes(job, args),
        }
        result = results.get((job.name, job.tta), {})
        if not key.items() <= result.items():
            what = job.name + ' with test-time augmentation' * job.tta
            print(f'[{i} of {len(jobs)}] {what}', flush=True)
            start = time.monotonic()
            measured = measure(job, weights, args)
            result = key | {
                'measured': measured,
                'seconds': round(time.monotonic() - start),
                'environment': environment(),
            }
        differences, excess = compare(job.published, result['measured'])
        results[job.name, job.tta] = result | {
            'published': job.published,
            'differences': differences,
            'excess': excess,
        }
        found = [*results.values()]
        put_text(json.dumps({'results': found}, indent=1) + '\n', path)
        put_text(table(found), args.out / 'results.md')
    return [results[job.name, job.tta] for job in jobs]


# -------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, option in DATASETS.items():
        parser.add_argument(
            option,
            dest=name,
            type=Path,
            metavar='DIR',
            help=f'where {name} is, as docs/data.md says',
        )
    archs = ['xt', 't', 's', 'b']
    parser.add_argument(
        '--arch', nargs='+', choices=archs, default=archs, help='default: all'
    )
    parser.add_argument(
        '--weights',
        type=Path,
        metavar='DIR',
        default=Path(torch.hub.get_dir(), 'checkpoints'),
        help='where the released files are, or go; default: %(default)s',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        default=Path('work_dirs', 'reproduce'),
        help='results; default: %(default)s',
    )
    return parser


def main(argv=None):
    cli.set_up()
    with cli.user_errors('reproduce.py'):
        args = build_parser().parse_args(argv)
        results = reproduce(args)
    print(table(results), end='')
    excess = [result['name'] for result in results if result['excess']]
    if excess:
        print(
            f'{len(excess)} of {len(results)} tests differ by more than is '
            f'allowed: {", ".join(excess)}',
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == '__main__':
    main()
