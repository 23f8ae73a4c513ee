"""Write a checkpoint for others: ``python tools/publish.py CHECKPOINT OUT``.

Of what a training wrote, the weights are kept and what the data are about
(classes and colors); the state of the optimizer, the config and messages are
not. Any model will do: detectors, segmentors, classifiers, backbones. The file
loads with ``torch.load`` as it comes, and its name ends with the start of its
SHA-256, which PyTorch checks when it downloads a file of such a name.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path

import torch

from mmoverlock import cli
from mmoverlock.checkpoint import SafeBackend, dataset_meta, read


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('checkpoint', help='file or URL')
    parser.add_argument(
        'out', help='where to: folder/name.pth becomes folder/name-<hash>.pth'
    )
    return parser


def publish(source, out):
    """Write the file; return its path, which is ``out`` with the hash."""
    checkpoint = read(source)
    # A copy, since a part of a tensor is saved with the whole of it.
    weights = {k: v.clone() for k, v in checkpoint['state_dict'].items()}
    meta = dataset_meta(checkpoint)
    known = {key: meta[key] for key in ('classes', 'palette') if key in meta}
    about = json.loads(json.dumps(known, default=lambda array: array.tolist()))
    file = io.BytesIO()
    torch.save({'meta': {'dataset_meta': about}, 'state_dict': weights}, file)
    digest = hashlib.sha256(file.getbuffer()).hexdigest()[:8]
    path = out.with_name(f'{out.stem}-{digest}.pth')
    SafeBackend().put(file.getvalue(), path)
    return path


def main(argv=None):
    cli.set_up()
    with cli.user_errors('publish.py'):
        args = build_parser().parse_args(argv)
        out = Path(args.out)
        if out.suffix != '.pth':
            raise cli.UserError(
                f'the name of a checkpoint ends in .pth: {out}'
            )
        path = publish(args.checkpoint, out)
        print(f'{path}, {path.stat().st_size / 2**20:.1f} MiB')


if __name__ == '__main__':
    main()
