"""Count FLOPs and parameters: ``python tools/get_flops.py CONFIG...``.

FLOPs are multiply-adds, as papers count them, of inference on one image: of
all convolutions and matrix products, and of ContMix by its definition,
whichever backend runs. For N positions, G groups of c query channels, S^2
regions, C channels and kernels of k^2 and K^2 taps, that is ::

    N G c S^2               affinities
    N G S^2 (k^2 + K^2)     kernels, a linear map of the affinities
    N C / 2 (k^2 + K^2)     gathering two windows, by half the channels each

Norms, activations, pooling and sampling are not counted. Two-stage detectors
have up to 1000 proposals, and masks as MMDetection's ``forward`` makes them:
of 100 proposals, but Cascade R-CNN's of all.

Dilated branches count as the one convolution that inference makes of them.
The paper's table of classifiers at 224 x 224 is 2 to 4 % lower than what is
counted here. To its last digit it is what remains without the residual 3 x 3
depthwise convolutions, affinities and gathering, but with 4 per element of a
norm.
"""

import argparse
import os

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock import cli
from mmoverlock.inference import build_model, input_channels, scope_of
from mmoverlock.models.blocks import FocusBlock

# Height and width that the field compares at, by default_scope.
SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 2048), 'mmpretrain': (224, 224)}


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument(
        '--table',
        action='store_true',
        help='print a table of Markdown without auxiliary heads, for a page '
        'beside the last config',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image in pixels; default: '
        + ', '.join(f'{h} {w} ({scope})' for scope, (h, w) in SHAPES.items()),
    )
    cli.add_config_arguments(parser, ', as in model.backbone.deploy=True')
    return parser


def count(cfg, shape):
    """Count by parts of the model, for an image of a height and width.

    Returns:
        tuple[dict[str, tuple[int, int]], int, int]: Parameters and FLOPs by
        name of the part; the FLOPs of all, which may be more than their sum:
        some are between the parts; and the channels of the image.
    """
    model, scope = build_model(cfg).eval(), scope_of(cfg)
    for module in model.modules():
        if isinstance(module, FocusBlock):
            # It does what is to be counted.
            module.contmix_backend = 'reference'
    # Shapes suffice, and no device has a special path there; but MMDetection's
    # heads look at values.
    image = torch.empty(1, input_channels(model), *shape, device='meta')
    parts = dict(named_parts(model))
    backbone = model.backbone.to('meta')
    with torch.device('meta'), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            maps = backbone(image)
    of_backbone = counter.get_total_flops()
    device = 'cpu' if scope == 'mmdet' else 'meta'
    with torch.device(device):
        maps = tuple(torch.randn(item.shape) for item in maps)
        image = torch.empty(image.shape)
    if device == 'meta':
        model.to(device)
    backbone.forward = lambda image: maps

    counter = FlopCounterMode(display=False)
    costs = {name: costs_of(part, counter) for name, part in parts.items()}
    with torch.device(device), torch.no_grad(), counter:
        infer(model, scope, image)
    costs['backbone'].append(of_backbone)
    total = of_backbone + counter.get_total_flops()
    counted = {
        name: (
            sum(parameter.numel() for parameter in part.parameters()),
            sum(costs[name]) // 2,  # PyTorch counts a multiply-add as two.
        )
        for name, part in parts.items()
    }
    return counted, total // 2, image.shape[1]


def named_parts(model):
    """The children with parameters; those of a head with an auxiliary one."""
    for name, child in model.named_children():
        parts = {name: child}
        if hasattr(child, 'aux_head'):
            parts = {f'{name}.{n}': part for n, part in child.named_children()}
        for name, part in parts.items():
            if any(True for _ in part.parameters()):
                yield name, part


def costs_of(part, counter):
    """A list, which gets what every outermost call in a part costs."""
    costs, starts = [], []

    def begin(*_):
        starts.append(counter.get_total_flops())

    def end(*_):
        start = starts.pop()
        if not starts:
            costs.append(counter.get_total_flops() - start)

    for module in part.modules():
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    return costs


def infer(model, scope, image):
    """Run a model on an image (1, C, H, W), up to its raw predictions."""
    shape = tuple(image.shape[2:])
    meta = {'img_shape': shape, 'ori_shape': shape, 'pad_shape': shape}
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        meta |= {'batch_input_shape': shape, 'scale_factor': (1.0, 1.0)}
        model(image, [DetDataSample(metainfo=meta)])
    elif scope == 'mmseg':
        # On the whole image: test_cfg may ask for windows.
        model.forward = model.encode_decode
        model(image, [meta | {'padding_size': [0] * 4}])
    else:
        model(image)


def is_auxiliary(name):
    """Whether a part is a head for training only."""
    return name.split('.')[-1].startswith('aux')


def show(config, parts, total, channels, shape):
    """Print what `count` has counted."""
    rows = {name: counts for name, counts in parts.items()}
    rows['total'] = sum(counts[0] for counts in parts.values()), total
    if any(map(is_auxiliary, parts)):
        rows['without auxiliary head'] = needed_parameters(parts), total
    width = max(map(len, rows))
    print(f'{config}, {channels} x {shape[0]} x {shape[1]}')
    print(f'{"":{width}}  parameters       FLOPs')
    for name, (parameters, flops) in rows.items():
        print(
            f'{name:{width}}  {parameters / 1e6:8.2f} M  {flops / 1e9:8.2f} G'
        )


def needed_parameters(parts):
    """The parameters of inference."""
    return sum(n for name, (n, _) in parts.items() if not is_auxiliary(name))


def table_row(link, parts, total):
    """A row of Markdown, without auxiliary heads."""
    count = needed_parameters(parts) / 1e6
    name = os.path.basename(link)
    return f'| [{name}]({link}) | {count:.2f} | {total / 1e9:.2f} |'


def main(argv=None):
    cli.set_up()
    with cli.user_errors('get_flops.py'):
        args = build_parser().parse_args(argv)
        rows = ['| Config | Parameters (M) | FLOPs (G) |', '| --- ' * 3 + '|']
        for config in args.configs:
            args.config = config
            cfg = cli.load_config(args)
            shape = args.shape or SHAPES.get(cfg.get('default_scope'))
            if not shape or min(shape) < 1:
                raise cli.UserError(
                    '--shape takes a height and a width in pixels, '
                    f'not {shape}'
                )
            with cli.explain_failures(cfg, args.cfg_options):
                parts, total, channels = count(cfg, tuple(shape))
            if args.table:
                folder = os.path.dirname(args.configs[-1]) or '.'
                link = os.path.relpath(config, folder)
                rows.append(table_row(link, parts, total))
            else:
                show(config, parts, total, channels, shape)
        if args.table:
            print(*rows, sep='\n')


if __name__ == '__main__':
    main()
