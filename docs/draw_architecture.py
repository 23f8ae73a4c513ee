"""Draw docs/architecture.png: ``python docs/draw_architecture.py``.

Depths, channels and kernel sizes are read from the model.
"""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import torch

from mmoverlock.models import OverLoCK

COLORS = {'Base': '#cfe2f3', 'Overview': '#fde9c9', 'Focus': '#d5ecd4'}
WIDTH, HEIGHT = 2.1, 1.15
TOP, BOTTOM = 2.9, 0.7  # of the lower edges of boxes


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
    axes.set(xlim=(-0.1, 11.3), ylim=(-0.4, 4.15), aspect='equal')
    axes.axis('off')
    axes.set_title(f'OverLoCK-{arch}', size=10)

    prior = model.high_level_proj.out_channels
    columns = 1.0, 3.6, 6.2, 8.8  # of stages 1 to 4
    for group, title, stage, y in (
        ('blocks1', 'Base-Net, stage 1', 0, TOP),
        ('blocks2', 'Base-Net, stage 2', 1, TOP),
        ('blocks3', 'Base-Net, stage 3', 2, TOP),
        ('blocks4', 'Overview-Net', 3, TOP),
        ('sub_blocks3', 'Focus-Net, stage 3', 2, BOTTOM),
        ('sub_blocks4', 'Focus-Net, stage 4', 3, BOTTOM),
    ):
        blocks = getattr(model, group)
        kernel, channels = model.kernel_sizes[stage], model.channels[stage]
        kernels = f'kernel {kernel} x {kernel}'
        if y == BOTTOM:
            kernels = f'dynamic 5 x 5 and {kernel} x {kernel}'
            channels = f'{channels} + {prior}'
        x = columns[stage]
        box(axes, x, y, COLORS[title.partition('-')[0]])
        axes.text(
            *(x + WIDTH / 2, y + HEIGHT - 0.2, title),
            **dict(ha='center', va='center', size=8, weight='bold'),
        )
        text = (
            f'{len(blocks)} x {type(blocks[0]).__name__}\n{kernels}\n'
            f'{channels} channels\nstride {4 * 2**stage}'
        )
        axes.text(
            *(x + WIDTH / 2, y + 0.44, text),
            **dict(ha='center', va='center', size=7),
        )

    middle = TOP + HEIGHT / 2
    axes.text(0.1, middle, 'image', ha='center', va='center', size=8)
    arrow(axes, (0.38, middle), (columns[0], middle))
    for left, right in zip(columns, columns[1:], strict=False):
        arrow(axes, (left + WIDTH, middle), (right, middle))

    stage3, stage4 = (x + WIDTH / 2 for x in columns[2:])
    roof = BOTTOM + HEIGHT
    arrow(axes, (stage3, TOP), (stage3, roof))
    # From the Overview-Net to both stages of the Focus-Net.
    arrow(axes, (stage4, TOP), (stage4, roof), style='--')
    fork = (TOP + roof) / 2
    arrow(axes, (stage4, fork), (stage3 + 0.5, roof), style='--')
    axes.text(
        *(stage4 + 0.1, fork, f'context prior P0,\n{prior} channels'),
        **dict(size=7.5, style='italic', va='center'),
    )
    between = BOTTOM + HEIGHT / 2
    arrow(axes, (columns[2] + WIDTH, between), (columns[3], between))
    axes.text(
        *((columns[2] + WIDTH + columns[3]) / 2, between + 0.12, 'x, P'),
        **dict(ha='center', size=7),
    )

    for index, (x, start) in enumerate(
        zip(columns, (TOP, TOP, BOTTOM, BOTTOM), strict=True)
    ):
        x += WIDTH / 2
        arrow(axes, (x, start), (x, 0.1))
        axes.text(
            *(x, 0, f'map {index}\n{model.out_channels[index]} channels'),
            **dict(ha='center', va='top', size=8),
        )
    return figure


def box(axes, x, y, color):
    axes.add_patch(
        plt.matplotlib.patches.FancyBboxPatch(
            *((x, y), WIDTH, HEIGHT),
            **dict(boxstyle='round,pad=0', fc=color, ec='0.4'),
        )
    )


def arrow(axes, start, end, style='-'):
    axes.annotate(
        *('', end, start),
        **dict(
            arrowprops=dict(
                arrowstyle='->', ls=style, color='0.3', shrinkA=0, shrinkB=0
            )
        ),
    )


if __name__ == '__main__':
    path = Path(__file__).with_name('architecture.png')
    draw('t').savefig(path, dpi=130)
    print(path)
