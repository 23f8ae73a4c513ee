"""The layers of the released classifiers' two heads."""

from torch import nn

HIDDEN_CHANNELS = 1024


def class_head(channels: int, num_classes: int) -> nn.Sequential:
    """The head on the Focus-Net's map.

    Args:
        channels (int): Channels C of the map.
        num_classes (int): Number of classes.

    Returns:
        nn.Sequential: (B, C, H, W) to (B, num_classes, 1, 1).
    """
    return nn.Sequential(
        nn.Conv2d(channels, HIDDEN_CHANNELS, 1, bias=False),
        nn.BatchNorm2d(HIDDEN_CHANNELS),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(HIDDEN_CHANNELS, num_classes, 1),
    )


def aux_class_head(channels: int, num_classes: int) -> nn.Sequential:
    """The auxiliary head on the Overview-Net's map, for training only.

    Args:
        channels (int): Channels C of the map.
        num_classes (int): Number of classes.

    Returns:
        nn.Sequential: (B, C, H, W) to (B, num_classes, 1, 1).
    """
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, num_classes, 1),
    )
