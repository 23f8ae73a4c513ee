"""Classification with mmpretrain: the released classifiers' two heads."""

from collections.abc import Sequence

from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from .heads import aux_class_head, class_head


@MODELS.register_module(force=True)  # a notebook may reload it
class OverLoCKClsHead(ClsHead):
    """The head of OverLoCK, and an auxiliary one on the Overview-Net.

    The auxiliary head is for training only: it makes the context prior say
    what is there. mmpretrain's mixup and cutmix work with both.

    Args:
        num_classes (int): Number of classes.
        in_channels (Sequence[int]): Channels of the two maps of
            ``OverLoCK(classifier=True)``, its ``out_channels``.
        aux_loss_weight (float): Weight of the auxiliary loss. Defaults to
            0.4.
        loss (dict, optional): Loss of both heads. Defaults to
            ``dict(type='CrossEntropyLoss')``.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`.
            Defaults to truncated normal weights with std 0.02.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        aux_loss_weight: float = 0.4,
        loss: dict | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(
            loss=loss or dict(type='CrossEntropyLoss'),
            init_cfg=init_cfg
            or dict(type='TruncNormal', layer='Conv2d', std=0.02),
        )
        overview, focus = in_channels
        self.num_classes = num_classes
        self.aux_loss_weight = aux_loss_weight
        self.head = class_head(focus, num_classes)
        self.aux_head = aux_class_head(overview, num_classes)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Two (B, C, H, W) maps to what the last layer reads, (B, 1024)."""
        _, focus = self._unpack(feats)
        return self.head[:-1](focus).flatten(1)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Two (B, C, H, W) maps to the logits, (B, num_classes)."""
        _, focus = self._unpack(feats)
        return self.head(focus).flatten(1)

    def aux_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Two (B, C, H, W) maps to the auxiliary logits."""
        overview, _ = self._unpack(feats)
        return self.aux_head(overview).flatten(1)

    def loss(
        self, feats: Sequence[Tensor], data_samples: list[DataSample]
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            feats (Sequence[Tensor]): The two maps of the backbone.
            data_samples (list[DataSample]): Labels, or scores after mixup.

        Returns:
            dict[str, Tensor]: ``loss_cls`` and ``loss_aux``.
        """
        loss, aux_loss = (
            # In full precision under autocast too.
            self._get_loss(logits.float(), data_samples)['loss']
            for logits in (self(feats), self.aux_logits(feats))
        )
        return {'loss_cls': loss, 'loss_aux': self.aux_loss_weight * aux_loss}

    @staticmethod
    def _unpack(feats: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(feats) != 2:
            raise ValueError(
                'OverLoCKClsHead takes the two maps of '
                f'OverLoCK(classifier=True), got {len(feats)}'
            )
        return feats


@MODELS.register_module(force=True)
class OverLoCKFocusClsHead(OverLoCKClsHead):
    """The head without the auxiliary one, for variants without its loss.

    Args:
        num_classes (int): Number of classes.
        in_channels (Sequence[int]): Channels of the one map of such a
            variant, its ``out_channels``.
        kwargs (dict): ``loss`` and ``init_cfg``, see
            :class:`OverLoCKClsHead`.
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], **kwargs):
        super().__init__(num_classes, (1, *in_channels), **kwargs)
        del self.aux_head

    def loss(
        self, feats: Sequence[Tensor], data_samples: list[DataSample]
    ) -> dict[str, Tensor]:
        """See :class:`OverLoCKClsHead`; there is ``loss_cls`` only."""
        logits = self(feats).float()
        loss = self._get_loss(logits, data_samples)['loss']
        return {'loss_cls': loss}

    @staticmethod
    def _unpack(feats: Sequence[Tensor]) -> tuple[None, Tensor]:
        if len(feats) != 1:
            raise ValueError(
                'OverLoCKFocusClsHead takes the one map of a classifier '
                f'without the auxiliary loss, got {len(feats)}'
            )
        return None, *feats
