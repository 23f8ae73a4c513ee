"""Pictures of what happens inside OverLoCK, for papers and for debugging.

``python tools/visualize.py {prior,kernels,erf,features} CONFIG CHECKPOINT
INPUT... --out DIR`` writes PNGs as wide as a page of text. Inputs are images,
folders or patterns; they go through the config's test pipeline. Maps with many
channels are shown as their three first principal components, as red, green and
blue.
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
    load,
    network_input,
)
from mmoverlock.models import OverLoCK
from mmoverlock.ops.dynamic_conv.reference import window_starts

WIDTH = 7.0  # of figures in inches, at most: a page's text, in papers
STYLE = {
    'font.size': 7,
    'axes.titlesize': 7,
    'axes.linewidth': 0.6,
    'xtick.labelsize': 6,
    'ytick.labelsize': 6,
    'xtick.major.size': 2,
    'ytick.major.size': 2,
    'savefig.dpi': 300,
}
SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contributions, for area ratios
COLORS = plt.get_cmap('tab10').colors
QUARTERS = (0.25, 0.5, 0.75)  # of the width, where kernels are shown


# ------------------------------------------------------------------ helpers


@contextlib.contextmanager
def recording(**modules):
    """Give a dict that gets the last output of each module, by name."""
    outputs = {}

    def record(name):
        return lambda module, inputs, output: outputs.update({name: output})

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(record(name))
            hooks.enter_context(hook)
        yield outputs


def principal_components(maps):
    """The main components of a map.

    Args:
        maps (Tensor): (C, H, W).

    Returns:
        tuple[Tensor, Tensor]: The three first, (H, W, 3), the largest first,
        and the share (3, ) of the variance that each has.
    """
    points = maps.flatten(1).double().cpu()
    points = points - points.mean(1, keepdim=True)
    variances, axes = torch.linalg.eigh(points @ points.T)
    shares = variances.flip(0)[:3] / variances.sum().clamp_min(1e-300)
    axes = axes.flip(1)[:, :3]
    # The sign of a component is arbitrary: make its largest entry positive.
    peaks = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    components = points.T @ (axes * peaks.sign())
    return components.reshape(*maps.shape[1:], 3), shares


def as_colors(components):
    """(H, W, 3) to an RGB picture, from the 1st to the 99th percentile."""
    flat = components.flatten(0, 1)
    low, high = (flat.quantile(q, dim=0) for q in (0.01, 0.99))
    return ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def lay_over(axes, maps, picture, padded, **options):
    """Show a map over the picture; both have one upper left corner."""
    height, width = padded
    shown = axes.imshow(
        maps,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation='nearest',
        **options,
    )
    height, width = picture.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return shown


def show_maps(maps, picture, padded, path):
    """Write a figure of maps beside the picture.

    Args:
        maps (dict): (C, H, W) maps of the padded input, by title.
        picture (np.ndarray): The picture (h, w, 3) in the input.
        padded (tuple[int, int]): Height and width of the input.
        path (Path): The file.
    """
    columns = len(maps) + 1
    width = min(WIDTH / columns, 1.75)
    height = 2 * width * picture.shape[0] / picture.shape[1] + 0.7
    size = width * columns, height
    figure, grid = plt.subplots(2, columns, figsize=size, layout='compressed')
    for axes in grid.flat:
        axes.axis('off')
    grid[0, 0].imshow(picture)
    grid[0, 0].set_title('image\n')
    explanation = (
        'above: three principal\ncomponents, as RGB\n\n'
        'below: the first one,\non the image, and its\nshare of the variance'
    )
    grid[1, 0].text(0, 0.5, explanation, size=6, va='center')
    gray = picture.mean(2) / 2 + 127  # light, for colors to show
    for (title, map_), (above, below) in zip(
        maps.items(), grid.T[1:], strict=True
    ):
        components, shares = principal_components(map_)
        lay_over(above, as_colors(components), picture, padded)
        channels, height, width = map_.shape
        above.set_title(f'{title}\n{channels} channels, {height} x {width}')
        below.imshow(gray, cmap='gray', vmin=0, vmax=255)
        first, style = components[..., 0], dict(cmap='inferno', alpha=0.7)
        shown = lay_over(below, first, picture, padded, **style)
        below.set_title(f'{shares[0]:.0%}')
        bar = figure.colorbar(shown, ax=below, location='bottom', aspect=25)
        bar.ax.locator_params(nbins=4)
    save(figure, path)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches='tight', pad_inches=0.02)
    plt.close(figure)
    print(path)


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
        updated = outputs['focus'][:, backbone.channels[2] :]
        maps = {'context prior P0': outputs['overview'][0]}
        if updated.shape[1]:  # which a variant may not have
            maps['P after stage 3'] = updated[0]
        path = args.out / f'{name}_prior.png'
        show_maps(maps, picture, inputs.shape[2:], path)


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
        mixed = block.mix(query, key, value)
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
    """The dynamic kernels that ContMix makes at pixels, by group.

    Colors are ratios to the weights of a plain average; a ring is where the
    pixel is in its window.
    """
    blocks = find_module(backbone, f'sub_blocks{args.stage}')
    if not -len(blocks) <= args.block < len(blocks):
        raise cli.UserError(
            f'--block {args.block}: stage {args.stage} has blocks 0 to '
            f'{len(blocks) - 1}; negative numbers count from the last'
        )
    block = blocks[args.block]
    if not hasattr(block, 'weight_query') or not hasattr(block, 'rpb1'):
        raise cli.UserError(
            'the blocks of this variant do not make kernels of two sizes'
        )
    for name, inputs, picture in images:
        with recording(query=block.weight_query, key=block.weight_key) as got:
            backbone(inputs)
        height, width = picture.shape[:2]
        middle = [(round(width * x), round(height / 2)) for x in QUARTERS]
        rows, columns = got['query'].shape[2:]
        steps = inputs.shape[2] / rows, inputs.shape[3] / columns
        found = []
        for x, y in args.at or middle:
            if not (0 <= x < width and 0 <= y < height):
                raise cli.UserError(
                    f'--at {x},{y} is outside of {name}, which is {width} x '
                    f'{height} after the test pipeline'
                )
            position = int(y / steps[0]), int(x / steps[1])
            kernels = dynamic_kernels(block, **got, position=position)
            found.append(((x, y), position, kernels))
        figure = show_kernels(found, picture, steps)
        save(figure, args.out / f'{name}_kernels.png')


def show_kernels(found, picture, steps):
    """A figure of kernels beside their windows in the picture.

    Args:
        found (list): For each pixel: its x and y, the row and column of its
            position, and what `dynamic_kernels` gave.
        picture (np.ndarray): (h, w, 3).
        steps (list[float]): Rows and columns of the picture in a position.

    Returns:
        Figure: The figure.
    """
    largest = max(
        kernel.max().item() * kernel[0].numel()
        for *_, kernels in found
        for kernel, *_ in kernels
    )
    largest = max(largest, 2)
    shades = dict(cmap='RdBu_r', norm=LogNorm(1 / largest, largest))
    groups = len(found[0][2][0][0])
    cell = min((WIDTH - 2) / groups, 0.75)
    row = max(2 * cell + 0.3, 1.6 * picture.shape[0] / picture.shape[1] + 0.6)
    size = 2 + cell * groups, row * len(found) + 0.5
    figure = plt.figure(figsize=size, layout='constrained')
    widths = [1.9, *[cell] * groups]
    grid = figure.add_gridspec(2 * len(found), 1 + groups, width_ratios=widths)
    cells = []
    for i, ((x, y), (row, column), kernels) in enumerate(found):
        image = figure.add_subplot(grid[2 * i : 2 * i + 2, 0])
        image.imshow(picture)
        image.set_title(f'x = {x}, y = {y}')
        image.plot(x, y, '+', color='white', ms=9, mew=2.5)
        image.plot(x, y, '+', color='red', ms=8, mew=1)
        for j, (kernel, top, left) in enumerate(kernels):
            k = kernel.shape[-1]
            corner = left * steps[1] - 0.5, top * steps[0] - 0.5
            style = dict(fill=False, ec=COLORS[j], lw=1.2, clip_on=False)
            window = plt.Rectangle(
                corner, k * steps[1], k * steps[0], zorder=3, **style
            )
            image.add_patch(window)
            for group, weights in enumerate(kernel.cpu().numpy()):
                axes = figure.add_subplot(grid[2 * i + j, group + 1])
                axes.imshow(weights * k**2, **shades)
                ring = dict(mfc='none', mec='black', ms=3, mew=0.6)
                axes.plot(column - left, row - top, 'o', **ring)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color=COLORS[j], linewidth=1)
                if group == 0:
                    axes.set_ylabel(f'{k} x {k}')
                if i == j == 0:
                    axes.set_title(f'group {group}' if cell > 0.5 else group)
                cells.append(axes)
    figure.colorbar(
        plt.cm.ScalarMappable(**shades),
        ax=cells,
        location='bottom',
        aspect=40,
        extend='min',
        label='weight / weight of a plain average',
    )
    return figure


def effective_field(backbone, modules, images, size):
    """Sum the contributions of input pixels to the centers of maps.

    Args:
        backbone (OverLoCK): The backbone.
        modules (dict): Modules that make maps, by name.
        images (iterable): What `load_images` yields.
        size (int): What the central squares of the images are resized to.

    Returns:
        tuple[dict, dict]: By name, the contributions (size, size), and the
        pixel that is the center of the position, a row or column.
    """
    sums, centers = {}, {}
    backbone.requires_grad_(False)
    for _, inputs, picture in images:
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = F.interpolate(
            inputs[..., top : top + side, left : left + side],
            (size, size),
            mode='bilinear',
            antialias=True,
        )
        square.requires_grad_()
        with recording(**modules) as maps, torch.enable_grad():
            backbone(square)
            for name, output in maps.items():
                middle = output.shape[-1] // 2
                center = output[0, :, middle, middle].sum()
                (grad,) = torch.autograd.grad(
                    center, square, retain_graph=True
                )
                found = grad[0].clamp_min(0).sum(0).double().cpu()
                sums[name] = sums.get(name, 0) + found
                stride = size / output.shape[-1]
                centers[name] = (middle + 0.5) * stride - 0.5
    return sums, centers


def area_ratios(contributions, center):
    """Shares of the image that the centered squares of `SHARES` take.

    Args:
        contributions (Tensor): (size, size), not negative.
        center (float): The row and column of the center.

    Returns:
        list[float]: For each of `SHARES`, the area in the image of the
        smallest square around the center that has this share of the
        contributions.
    """
    distance = (torch.arange(len(contributions)) - center).abs()
    ring = torch.maximum(distance[:, None], distance)
    radii = ring.unique()
    sums = torch.stack([contributions[ring <= r].sum() for r in radii])
    smallest = [(sums < share * sums[-1]).sum() for share in SHARES]
    return [(ring <= radii[i]).double().mean().item() for i in smallest]


def draw_erf(backbone, images, args):
    """The effective receptive field of the Focus-Net's two stages.

    The gradient, with respect to the image, of the central position of the
    last block's output, summed over its channels; where positive, summed over
    colors and images (RepLKNet, CVPR 2022). The areas are those of the
    smallest centered squares with the given shares of the sum itself, not of
    logarithms.
    """
    modules = {
        f'stage {stage}': find_module(backbone, f'sub_blocks{stage}')[-1]
        for stage in (3, 4)
    }
    images = list(images)
    sums, centers = effective_field(backbone, modules, images, args.size)
    size = 0.8 * WIDTH, 2.9
    figure, grid = plt.subplots(1, 2, figsize=size, layout='constrained')
    print(f'area ratios, {len(images)} images of {args.size} x {args.size}')
    print(' ' * 7, *(f'{share:6.0%}' for share in SHARES))
    shares = ' / '.join(f'{share:.0%}'.strip('%') for share in SHARES)
    for axes, (name, found) in zip(grid, sums.items(), strict=True):
        ratios = area_ratios(found, centers[name])
        print(name, *(f'{ratio:6.1%}' for ratio in ratios))
        shown = axes.imshow(
            found / found.max().clamp_min(1e-300),
            cmap='inferno',
            norm=LogNorm(1e-3, 1, clip=True),
        )
        axes.set_title(f'Focus-Net, {name}')
        area = ' / '.join(f'{ratio:.1%}'.strip('%') for ratio in ratios)
        axes.set_xlabel(
            f'{shares} % of the contributions\nin {area} % of the area'
        )
        ticks = [0, args.size // 2, args.size]
        axes.set(xticks=ticks, yticks=ticks)
    grid[0].set_ylabel('pixels')
    label = 'contribution / largest one'
    figure.colorbar(shown, ax=grid, shrink=0.8, extend='min', label=label)
    save(figure, args.out / 'erf.png')


def draw_features(backbone, images, args):
    """The outputs of the backbone."""
    if backbone.classifier:
        titles = 'Overview-Net', 'Focus-Net'
    else:
        places = zip(backbone.out_indices, backbone.out_strides, strict=True)
        titles = [f'map {index}, stride {stride}' for index, stride in places]
    for name, inputs, picture in images:
        outputs = [output[0] for output in backbone(inputs)]
        maps = dict(zip(titles, outputs, strict=True))
        path = args.out / f'{name}_features.png'
        show_maps(maps, picture, inputs.shape[2:], path)


DRAW = {
    'prior': draw_prior,
    'kernels': draw_kernels,
    'erf': draw_erf,
    'features': draw_features,
}


# ------------------------------------------------------------- command line


def pixel(text):
    x, y = map(int, text.split(','))
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
        command.add_argument(
            '--device', type=cli.device, help='default: a GPU if there is'
        )
        cli.add_config_arguments(command)
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
    for path, name in find_files(args.inputs, args.out):
        try:
            data, _ = load(pipeline, str(path))
        except UnreadableImage as error:
            raise cli.UserError(f'{path}: {error}') from error
        yield name, *network_input(model, data)


def main(argv=None):
    cli.set_up()
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
            with torch.no_grad(), plt.rc_context(STYLE):
                DRAW[args.command](found[0], images, args)


if __name__ == '__main__':
    main()
