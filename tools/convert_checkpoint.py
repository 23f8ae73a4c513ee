"""Convert checkpoints: ``python tools/convert_checkpoint.py SRC DST``.

Between the names of the release and those of OpenMMLab's models, either way;
which way, the names in SRC tell. Released detectors and segmentors have
OpenMMLab's names, and ``init_cfg`` takes any of these files as they are.
"""

import argparse
import io
from pathlib import Path

import torch

from mmoverlock import cli
from mmoverlock.checkpoint import SafeBackend, read
from mmoverlock.models import OverLoCK, weights


def build_parser():
    parser = argparse.ArgumentParser(
        description='Convert a classifier or a backbone from the names of the '
        "release to those of OpenMMLab's models, or back.",
    )
    parser.add_argument('src', metavar='SRC', help='checkpoint file or URL')
    parser.add_argument('dst', metavar='DST', help='checkpoint to write, .pth')
    parser.add_argument(
        '--backbone-only',
        action='store_true',
        help='write the backbone of any model, as the release names it',
    )
    parser.add_argument(
        '--reparam',
        action='store_true',
        help='merge the reparameterized branches, for deploy=True',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace DST if it exists'
    )
    return parser


def convert(state, backbone_only):
    """Rename weights.

    Args:
        state (dict): Weights by name.
        backbone_only (bool): Take the backbone alone.

    Returns:
        tuple[dict, bool]: Weights by name, and whether those are the names of
        the release.
    """
    released = weights.is_release(state)
    if backbone_only:
        if not released:
            return weights.take_backbone(state), True
        names = [k for k in state if not k.startswith(weights.HEADS)]
        return {name: state[name] for name in names}, True
    if released:
        return weights.add_prefixes(state), False
    other = [k for k in state if not k.startswith(('backbone.', 'head.'))]
    if other:
        raise cli.UserError(
            f'there is no other form of SRC, which has '
            f'{weights.outline(other)}: released detectors and segmentors '
            "have OpenMMLab's names; --backbone-only writes their backbone"
        )
    return weights.remove_prefixes(state), True


def main(argv=None):
    cli.set_up()
    args = build_parser().parse_args(argv)
    with cli.user_errors('convert_checkpoint.py'):
        dst = Path(args.dst)
        if dst.suffix != '.pth':
            raise cli.UserError(f'DST must end in .pth, not {dst}')
        if dst.exists() and not args.overwrite:
            raise cli.UserError(f'{dst} exists; --overwrite replaces it')
        contents = read(args.src)
        state = contents.pop('state_dict')
        arch = weights.arch_of(state, OverLoCK.arch_zoo)
        if arch is None:
            raise cli.UserError(
                f'{args.src} has no OverLoCK, but {weights.outline([*state])}'
            )
        converted, released = convert(state, args.backbone_only)
        if args.reparam:
            converted = weights.merge(converted)
        file = io.BytesIO()
        torch.save(converted if released else {'state_dict': converted}, file)
        SafeBackend().put(file.getvalue(), dst)
    heads = any(name.startswith(weights.HEADS) for name in converted)
    print(
        f'{dst}: OverLoCK {arch}, {"classifier" if heads else "backbone"}, '
        f'{len(converted)} tensors, with the names of '
        f'{"the release" if released else "OpenMMLab"}'
        + ', branches merged' * args.reparam
        + (f'; left out: {", ".join(contents)}' if contents else '')
    )


if __name__ == '__main__':
    main()
