"""Pictures of what happens inside OverLoCK, for papers and for debugging.

``python tools/visualize.py {prior,kernels,erf,features} CONFIG CHECKPOINT
INPUT... --out DIR`` writes PNGs. Inputs are images, folders or patterns; they
go through the config's test pipeline. Maps with many channels are shown as
their three first principal components, as red, green and blue.
"""

import argparse
import contextlib
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from mmengine.device import get_device

from mmoverlock import cli
from mmoverlock.inference import (
    UnreadableImage,
    build_pipeline,
    find_files,
    init_model,
    network_input,
    read_image,
)
from mmoverlock.models import OverLoCK
from mmoverlock.ops import contmix
from mmoverlock.ops.contmix_reference import window_starts

DPI = 200
SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contributions, for area ratios
COLOURS = plt.get_cmap('tab10').colors


# ------------------------------------------------------------------ helpers


@contextlib.contextmanager
def recording(**modules):
    """Give a dict that gets the last output of each module, by name."""
    outputs = {}

    def record(name):
        return lambda module, inputs, output: outputs.update({name: output})

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def principal_colours(maps):
    """(C, H, W) to an RGB picture (H, W, 3) of the main components."""
    size = maps.shape[1:]
    points = maps.flatten(1).T.double().cpu()
    points = points - points.mean(0)
    _, _, axes = torch.linalg.svd(points, full_matrices=False)
    axes = axes[:3]
    # The sign of a component is arbitrary: make its largest entry positive.
    peaks = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    colours = points @ (axes * peaks.sign()).T
    low, high = (colours.quantile(q, dim=0) for q in (0.01, 0.99))
    colours = (colours - low) / (high - low).clamp_min(1e-12)
    colours = F.pad(colours, (0, 3 - colours.shape[1]))
    return colours.clamp(0, 1).reshape(*size, 3).numpy()


def lay_over(axes, maps, picture, padded, **options):
    """Show a map over the picture; both have one upper left corner."""
    height, width = padded
    axes.imshow(
        maps, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **options
    )
    axes.set(
        xlim=(-0.5, picture.shape[1] - 0.5),
        ylim=(picture.shape[0] - 0.5, -0.5),
    )


def show_maps(row, title, maps, picture, padded):
    """Show a (C, H, W) map on two axes: its components and its norm."""
    size = ' x '.join(map(str, maps.shape))
    lay_over(
        row[0],
        principal_colours(maps),
        picture,
        padded,
        interpolation='nearest',
    )
    row[0].set_title(f'{title}, {size}', fontsize=8)
    row[1].imshow(picture)
    norm = maps.norm(dim=0).cpu().numpy()
    lay_over(row[1], norm, picture, padded, cmap='inferno', alpha=0.65)
    row[1].set_title('its norm', fontsize=8)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, bbox_inches='tight')
    plt.close(figure)
    print(path)


def new_figure(picture, rows, columns):
    """Axes without ticks, (rows, columns), in the shape of the picture."""
    width = 2.2
    height = width * picture.shape[0] / picture.shape[1] + 0.25
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout='constrained',
    )
    for axes in grid.flat:
        axes.axis('off')
    return figure, grid


def find_module(backbone, name):
    """A module of the backbone that out_indices may have left out."""
    if not hasattr(backbone, name):
        raise cli.UserError(
            f'the backbone of this config has no {name}: its out_indices are '
            f'{backbone.out_indices}'
        )
    return getattr(backbone, name)


# -------------------------------------------------------------- subcommands


def draw_prior(backbone, images, args):
    """The context prior: the Overview-Net's, and after the Focus-Net."""
    overview = find_module(backbone, 'high_level_proj')
    focus = find_module(backbone, 'sub_blocks3')[-1]
    for name, inputs, picture in images:
        with recording(overview=overview, focus=focus) as outputs:
            backbone(inputs)
        prior = outputs['overview'][0]
        updated = outputs['focus'].split(focus.splits, dim=1)[1][0]
        figure, grid = new_figure(picture, 1, 5)
        grid[0, 0].imshow(picture)
        grid[0, 0].set_title('image', fontsize=8)
        padded = inputs.shape[2:]
        show_maps(grid[0, 1:3], 'context prior', prior, picture, padded)
        show_maps(grid[0, 3:], 'after stage 3', updated, picture, padded)
        save(figure, args.out / f'{name}_prior.png')


def dynamic_kernels(block, query, key, position):
    """The dynamic kernels of one position.

    ContMix is linear in its values, so that they are its gradient.

    Args:
        block (FocusBlock): The block.
        query (Tensor): What its ``weight_query`` gave, (1, C / 2, H, W).
        key (Tensor): What its ``weight_key`` gave, (1, C / 2, S, S).
        position (tuple[int, int]): Row and column.

    Returns:
        list[tuple[Tensor, int, int]]: For the small and the large kernel:
        (G, k, k), and the row and column where its window starts.
    """
    groups = len(block.rpb1)
    size = query.shape[2:]
    with torch.enable_grad():
        value = query.new_zeros(1, 2 * groups, *size).requires_grad_()
        mixed = contmix(
            query * block.scale,
            key,
            value,
            block.weight_proj.weight.flatten(1),
            block.weight_proj.bias,
            (block.rpb1, block.rpb2),
            block.backend,
        )
        # Channels do not mix, so one backward pass does for all.
        row, column = position
        (grad,) = torch.autograd.grad(mixed[0, :, row, column].sum(), value)
    kernels = []
    for half, table in zip(
        grad[0].chunk(2), (block.rpb1, block.rpb2), strict=True
    ):
        k = (table.shape[-1] + 1) // 2
        top, left = (
            int(window_starts(length, k)[index])
            for length, index in zip(size, position, strict=True)
        )
        kernels.append((half[:, top : top + k, left : left + k], top, left))
    return kernels


def draw_kernels(backbone, images, args):
    """The dynamic kernels that ContMix makes at pixels, by group."""
    blocks = find_module(backbone, f'sub_blocks{args.stage}')
    if not -len(blocks) <= args.block < len(blocks):
        raise cli.UserError(
            f'--block {args.block}: stage {args.stage} has blocks 0 to '
            f'{len(blocks) - 1}; negative numbers count from the last'
        )
    block = blocks[args.block]
    for name, inputs, picture in images:
        with recording(query=block.weight_query, key=block.weight_key) as got:
            backbone(inputs)
        height, width = picture.shape[:2]
        pixels = args.at or [
            (round(width * x), round(height * y))
            for x, y in ((0.25, 0.5), (0.5, 0.5), (0.75, 0.5))
        ]
        groups = len(block.rpb1)
        figure = plt.figure(
            figsize=(1.9 + 0.7 * groups, 1.7 * len(pixels)),
            layout='constrained',
        )
        grid = figure.add_gridspec(2 * len(pixels), groups + 3)
        for i, (x, y) in enumerate(pixels):
            if not (0 <= x < width and 0 <= y < height):
                raise cli.UserError(
                    f'--at {x},{y} is outside of {name}, which is {width} x '
                    f'{height} after the test pipeline'
                )
            steps = [
                side / length
                for side, length in zip(
                    inputs.shape[2:], got['query'].shape[2:], strict=True
                )
            ]
            position = int(y / steps[0]), int(x / steps[1])
            axes = figure.add_subplot(grid[2 * i : 2 * i + 2, :3])
            axes.imshow(picture)
            axes.tick_params(labelsize=5, length=2, pad=1)
            axes.set_title(f'pixel {x}, {y}', fontsize=7)
            axes.plot(x, y, '+', color='white', ms=9, mew=2.5)
            axes.plot(x, y, '+', color='red', ms=8, mew=1)
            for row, (kernels, top, left) in enumerate(
                dynamic_kernels(block, got['query'], got['key'], position)
            ):
                k = kernels.shape[-1]
                colour = COLOURS[row]
                axes.add_patch(
                    plt.Rectangle(
                        (left * steps[1] - 0.5, top * steps[0] - 0.5),
                        *(k * steps[1], k * steps[0]),
                        **dict(fill=False, ec=colour, lw=1.2),
                    )
                )
                for group, kernel in enumerate(kernels.cpu().numpy()):
                    cell = figure.add_subplot(grid[2 * i + row, group + 3])
                    cell.imshow(kernel, cmap='inferno', vmin=0)
                    cell.set(xticks=[], yticks=[])
                    for spine in cell.spines.values():
                        spine.set(color=colour, linewidth=1.2)
                    if group == 0:
                        cell.set_ylabel(f'{k} x {k}', fontsize=6)
                    if i == row == 0:
                        cell.set_title(f'group {group}', fontsize=6)
        save(figure, args.out / f'{name}_kernels.png')


def effective_field(backbone, modules, images, size):
    """Sum the contributions of input pixels to the centres of maps.

    Args:
        backbone (OverLoCK): The backbone.
        modules (dict): Modules that make maps, by name.
        images (iterable): What `load_images` yields.
        size (int): What the central squares of the images are resized to.

    Returns:
        tuple[dict, dict]: By name, the contributions (size, size), and the
        pixel that is the centre of the position, a row or column.
    """
    sums, centres = {}, {}
    backbone.requires_grad_(False)
    for _, inputs, picture in images:
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = inputs[..., top : top + side, left : left + side]
        square = F.interpolate(
            square, (size, size), mode='bilinear', antialias=True
        )
        square.requires_grad_()
        with recording(**modules) as maps, torch.enable_grad():
            backbone(square)
            for name, output in maps.items():
                middle = output.shape[-1] // 2
                centre = output[0, :, middle, middle].sum()
                (grad,) = torch.autograd.grad(
                    centre, square, retain_graph=True
                )
                found = grad[0].clamp_min(0).sum(0).double().cpu()
                sums[name] = sums.get(name, 0) + found
                stride = size / output.shape[-1]
                centres[name] = (middle + 0.5) * stride - 0.5
    return sums, centres


def area_ratios(contributions, centre):
    """Shares of the image that the centred squares of `SHARES` take.

    Args:
        contributions (Tensor): (size, size), not negative.
        centre (float): The row and column of the centre.

    Returns:
        list[float]: For each of `SHARES`, the area in the image of the
        smallest square around the centre that has this share of the
        contributions.
    """
    size = len(contributions)
    distance = (torch.arange(size) - centre).abs()
    ring = torch.maximum(distance[:, None], distance)
    order = ring.flatten().argsort()
    share = contributions.flatten()[order].cumsum(0)
    share = share / share[-1].clamp_min(1e-300)
    ratios = []
    for wanted in SHARES:
        last = min(int((share < wanted).sum()), size**2 - 1)
        inside = ring <= ring.flatten()[order[last]]
        ratios.append(inside.double().mean().item())
    return ratios


def draw_erf(backbone, images, args):
    """The effective receptive field of the Focus-Net's two stages.

    The gradient, with respect to the image, of the central position of the
    last block's output, summed over its channels; where positive, summed over
    colours and images (RepLKNet, CVPR 2022).
    """
    modules = {
        f'stage {stage}': find_module(backbone, f'sub_blocks{stage}')[-1]
        for stage in (3, 4)
    }
    images = list(images)
    sums, centres = effective_field(backbone, modules, images, args.size)
    figure, grid = plt.subplots(
        1, len(sums), figsize=(3 * len(sums) + 0.6, 3.2), layout='constrained'
    )
    print(f'area ratios, {len(images)} images of {args.size} x {args.size}')
    print(' ' * 7, *(f'{share:6.0%}' for share in SHARES))
    for axes, (name, found) in zip(grid, sums.items(), strict=True):
        ratios = area_ratios(found, centres[name])
        print(name, *(f'{ratio:6.1%}' for ratio in ratios))
        shown = axes.imshow(
            found / found.max().clamp_min(1e-300),
            cmap='inferno',
            norm=LogNorm(1e-3, 1, clip=True),
        )
        axes.set(xticks=[], yticks=[])
        text = ', '.join(
            f'{share:.0%}: {ratio:.1%}'
            for share, ratio in zip(SHARES, ratios, strict=True)
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f'share: area\n{text}', fontsize=6)
    figure.colorbar(shown, ax=grid, shrink=0.75, label='contribution')
    save(figure, args.out / 'erf.png')


def draw_features(backbone, images, args):
    """The outputs of the backbone."""
    for name, inputs, picture in images:
        outputs = backbone(inputs)
        figure, grid = new_figure(picture, 2, len(outputs) + 1)
        grid[0, 0].imshow(picture)
        grid[0, 0].set_title('image', fontsize=8)
        for i, (maps, stride) in enumerate(
            zip(outputs, backbone.out_strides, strict=True), 1
        ):
            show_maps(
                grid[:, i],
                f'stride {stride}',
                maps[0],
                picture,
                inputs.shape[2:],
            )
        save(figure, args.out / f'{name}_features.png')


DRAW = {
    'prior': draw_prior,
    'kernels': draw_kernels,
    'erf': draw_erf,
    'features': draw_features,
}


# ------------------------------------------------------------- command line


def pixel(text):
    try:
        x, y = map(int, text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not X,Y in pixels, as in 120,80'
        ) from None
    return x, y


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, draw in DRAW.items():
        text = ' '.join(draw.__doc__.split())
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument('config', help='config file')
        command.add_argument('checkpoint', help='checkpoint file or URL')
        command.add_argument('inputs', nargs='+', metavar='INPUT')
        command.add_argument('--out', required=True, type=Path, metavar='DIR')
        command.add_argument('--device', help='default: a GPU if there is')
        command.add_argument(
            '--cfg-options',
            nargs='+',
            action=cli.ConfigOptions,
            default={},
            metavar='KEY=VALUE',
            help='change the config',
        )
        command.set_defaults(work_dir=None, launcher='none', local_rank=0)
    kernels = commands.choices['kernels']
    kernels.add_argument(
        '--at',
        type=pixel,
        nargs='+',
        metavar='X,Y',
        help='pixels of the image as it is after the test pipeline, which the '
        'axes show; default: three on the middle line',
    )
    kernels.add_argument('--stage', type=int, choices=(3, 4), default=3)
    kernels.add_argument(
        '--block',
        type=int,
        default=-1,
        help='which block of the stage, from 0; default: the last',
    )
    commands.choices['erf'].add_argument(
        '--size',
        type=int,
        default=224,
        help='what the central squares of the images are resized to; '
        'default: %(default)s',
    )
    return parser


def load_images(model, cfg, args):
    """Yield the name, network input and picture of each image."""
    pipeline = build_pipeline(cfg)
    for path, name in find_files(args.inputs):
        try:
            image = read_image(str(path))
        except UnreadableImage as error:
            raise cli.UserError(f'{path}: {error}') from error
        yield name, *network_input(model, pipeline, image)


def main(argv=None):
    with cli.user_errors('visualize.py'):
        args = build_parser().parse_args(argv)
        cfg = cli.load_config(args)
        cli.check_file(args.checkpoint, 'checkpoint')
        with cli.explain_failures(cfg, args.cfg_options):
            device = args.device or get_device()
            model = init_model(cfg, args.checkpoint, device)
            found = [m for m in model.modules() if isinstance(m, OverLoCK)]
            if not found:
                raise cli.UserError(f'{args.config} has no OverLoCK')
            images = load_images(model, cfg, args)
            with torch.no_grad():
                DRAW[args.command](found[0], images, args)


if __name__ == '__main__':
    main()
