"""Draw docs/architecture.png: ``python docs/draw_architecture.py``.

Depths, channels and kernel sizes are read from the model.
"""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import torch

from mmoverlock.models import OverLoCK

COLOURS = {'base': '#cfe2f3', 'overview': '#fde9c9', 'focus': '#d5ecd4'}
WIDTH, HEIGHT = 1.9, 0.95


def draw(arch):
    """Draw an OverLoCK.

    Args:
        arch (str): A name of ``OverLoCK.arch_zoo``.

    Returns:
        Figure: The figure.
    """
    with torch.device('meta'):
        model = OverLoCK(arch)
    figure, axes = plt.subplots(figsize=(9.6, 4.1), layout='constrained')
    axes.set(xlim=(-0.2, 11.2), ylim=(-0.3, 4.3), aspect='equal')
    axes.axis('off')
    places = {
        'blocks1': (1.1, 3, 'base', 'Base-Net, stage 1'),
        'blocks2': (3.6, 3, 'base', 'Base-Net, stage 2'),
        'blocks3': (6.1, 3, 'base', 'Base-Net, stage 3'),
        'blocks4': (8.6, 3, 'overview', 'Overview-Net'),
        'sub_blocks3': (6.1, 0.9, 'focus', 'Focus-Net, stage 3'),
        'sub_blocks4': (8.6, 0.9, 'focus', 'Focus-Net, stage 4'),
    }
    sizes = dict(zip(model.block_groups, (0, 1, 2, 3, 2, 3), strict=True))
    for group, (x, y, part, title) in places.items():
        blocks, stage = getattr(model, group), sizes[group]
        kind = type(blocks[0]).__name__
        kernel = model.kernel_sizes[stage]
        kernels = f'kernel {kernel} x {kernel}'
        if part == 'focus':
            kernels = f'dynamic kernels 5 x 5, {kernel} x {kernel}'
        box(axes, x, y, COLOURS[part])
        text = (
            f'{len(blocks)} x {kind}\n{kernels}\n'
            f'{model.channels[stage]} channels, stride {4 * 2**stage}'
        )
        axes.text(
            x + WIDTH / 2, y + 0.4, text, ha='center', va='center', size=7
        )
        axes.text(
            x + WIDTH / 2, y + 1, title, ha='center', size=8, weight='bold'
        )
    axes.text(0.1, 3.475, 'image', ha='center', va='center', size=8)
    for x in (0.35, 3, 5.5, 8):  # along the top
        arrow(axes, (x, 3.475), (x + (0.75 if x < 1 else 0.6), 3.475))
    prior = model.high_level_proj.out_channels
    # From the Overview-Net back to stage 3 of the Focus-Net, with its map.
    arrow(axes, (7.05, 3), (7.05, 2.15))
    arrow(axes, (9.55, 3), (9.55, 2.15), style='--')
    arrow(axes, (9.55, 2.5), (7.5, 2.15), style='--')
    axes.text(
        *(9.65, 2.55, f'context prior P0,\n{prior} channels'),
        **dict(size=7.5, style='italic', va='center'),
    )
    arrow(axes, (8, 1.375), (8.6, 1.375))
    axes.text(8.3, 1.5, 'x, P', ha='center', size=7)
    for x, y, index, start in (
        *((2.05, 0.1, 0, 3), (4.55, 0.1, 1, 3)),
        *((7.05, 0.1, 2, 0.9), (9.55, 0.1, 3, 0.9)),
    ):
        arrow(axes, (x, start), (x, y))
        axes.text(
            *(
                x,
                y - 0.08,
                f'map {index}, {model.out_channels[index]} channels',
            ),
            **dict(ha='center', va='top', size=8),
        )
    axes.set_title(f'OverLoCK-{arch}', size=10)
    return figure


def box(axes, x, y, colour):
    axes.add_patch(
        plt.matplotlib.patches.FancyBboxPatch(
            *((x, y), WIDTH, HEIGHT - 0.1),
            **dict(boxstyle='round,pad=0.02', fc=colour, ec='0.4'),
        )
    )


def arrow(axes, start, end, style='-'):
    axes.annotate(
        *('', end, start),
        **dict(arrowprops=dict(arrowstyle='->', ls=style, color='0.3')),
    )


if __name__ == '__main__':
    path = Path(__file__).with_name('architecture.png')
    draw('t').savefig(path, dpi=130)
    print(path)
