"""OverLoCK for programs of one's own, with torch and mmengine alone."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import read
from .heads import HIDDEN_CHANNELS, aux_class_head, class_head
from .overlock import OverLoCK
from .weights import (
    HEADS,
    OUTPUT_LAYERS,
    STEM,
    State,
    fit,
    is_release,
    load_pretrained,
    remove_prefixes,
)

RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'


class OverLoCKClassifier(OverLoCK):
    """An image classifier with the names of the released ones.

    ``load_state_dict`` takes weights of the release and of classifiers trained
    with MMPretrain here; it leaves out the auxiliary head where the model has
    none.

    Args:
        arch (str | dict): See :class:`OverLoCK`.
        num_classes (int): Number of classes; 0 for the pooled features, which
            the last layer would read. Defaults to 1000.
        aux_head (bool): Build the auxiliary head, for training. Defaults to
            False.
        drop_rate (float): Probability to drop what the last layer reads.
            Defaults to 0.
        kwargs (dict): Other arguments of :class:`OverLoCK`.
    """

    def __init__(
        self,
        arch: str | dict,
        num_classes: int = 1000,
        aux_head: bool = False,
        drop_rate: float = 0.0,
        **kwargs,
    ):
        super().__init__(arch, classifier=True, **kwargs)
        self.drop_rate = drop_rate
        overview, self.num_features = self.out_channels
        self.head_hidden_size = HIDDEN_CHANNELS
        self.head = class_head(self.num_features, max(num_classes, 1))
        self.aux_head = None
        if aux_head:
            self.aux_head = aux_class_head(overview, max(num_classes, 1))
        for head in filter(None, (self.head, self.aux_head)):
            head.apply(self._init_weights)
        if num_classes == 0:
            self.reset_classifier(0)
        self.num_classes = num_classes
        self.register_load_state_dict_pre_hook(take_names)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the Focus-Net's map, (B, num_features, H / 32, W / 32)."""
        return super().forward(x)[1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That map to the logits (B, num_classes).

        Args:
            x (Tensor): (B, num_features, H, W).
            pre_logits (bool): Return what the last layer reads, (B, 1024).
                Defaults to False.
        """
        x = F.dropout(self.head[:4](x), self.drop_rate, self.training)
        if not pre_logits:
            x = self.head[4](x)
        # There may be no pooling.
        return x if isinstance(self.head[3], nn.Identity) else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, in_channels, H, W) to logits (B, num_classes).

        In training, with an auxiliary head, to a tuple of two such: the loss
        of the second has the weight 0.4 in the paper's recipe.
        """
        overview, focus = super().forward(x)
        logits = self.forward_head(focus)
        if not self.training or self.aux_head is None:
            return logits
        return logits, self.aux_head(overview).flatten(1)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head[4]

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Replace the last layers by untrained ones.

        Args:
            num_classes (int): Number of classes; 0 for none.
            global_pool (str, optional): ``'avg'``, or ``''`` for maps instead
                of vectors. Defaults to None: as it is.

        Raises:
            ValueError: If the pooling is another.
        """
        if global_pool not in (None, '', 'avg'):
            raise ValueError(f"global_pool is 'avg' or '', not {global_pool}")
        if global_pool is not None:
            pool = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()
            self.head[3] = pool.train(self.training)
        like = self.patch_embed1[0].weight
        for head in filter(None, (self.head, self.aux_head)):
            last = nn.Identity()
            if num_classes:
                width = HIDDEN_CHANNELS
                if head is self.aux_head:
                    width = len(head[0].weight)
                last = nn.Conv2d(width, num_classes, 1).to(like)
                self._init_weights(last)
            head[-1] = last.train(self.training)
        if num_classes == 0:
            self.aux_head = None
        self.num_classes = num_classes


def take_names(model: OverLoCK, state: State, prefix: str, *_) -> None:
    """Bring weights to the names of a model, as ``load_state_dict`` begins.

    Of OpenMMLab's models, only the backbone and the heads of a classifier are
    taken. Heads that the model has not are left out, and the layers that make
    maps of dense predictors stay as they are where the state has none.

    Args:
        model (OverLoCK): What is loaded into.
        state (dict): Weights by name; changed in place.
        prefix (str): Of the model's names in it.
    """
    names = [name for name in state if name.startswith(prefix)]
    part = {name.removeprefix(prefix): state.pop(name) for name in names}
    if any(name.startswith('backbone.') for name in part):
        kept = 'backbone.', 'head.'
        part = remove_prefixes(
            {k: weight for k, weight in part.items() if k.startswith(kept)}
        )
    own = model.state_dict()
    for name, weight in part.items():
        if name in own or not name.startswith(HEADS):
            state[prefix + name] = weight
    for name, weight in own.items():
        if name.startswith(OUTPUT_LAYERS):
            state.setdefault(prefix + name, weight)


def build(
    arch: str,
    pretrained: bool | str = False,
    *,
    features_only: bool = False,
    num_classes: int = 1000,
    **kwargs,
) -> OverLoCK:
    """A classifier, or the backbone of dense predictors.

    Args:
        arch (str): 'xt', 't', 's' or 'b'.
        pretrained (bool | str): True for the released ImageNet weights, or a
            checkpoint, see :func:`mmoverlock.checkpoint.read`. The last layer
            starts anew where it is for other classes, and so does the first
            convolution where it is for other channels; the log says so.
            Defaults to False.
        features_only (bool): Build the backbone, which returns a tuple of
            maps. Defaults to False.
        num_classes (int): Number of classes of the classifier; 0 for pooled
            features. Defaults to 1000.
        kwargs (dict): Arguments of :class:`OverLoCKClassifier`, or of
            :class:`OverLoCK` for the backbone.

    Raises:
        CheckpointError: If the weights are of something else.
    """
    if features_only:
        model = OverLoCK(arch, **kwargs)
        model.register_load_state_dict_pre_hook(take_names)
    else:
        model = OverLoCKClassifier(arch, num_classes, **kwargs)
    if not pretrained:
        return model
    source = pretrained
    if pretrained is True:
        source = f'{RELEASE}overlock_{arch}_in1k_224.pth'
    if features_only:
        load_pretrained(model, source)
        return model
    state = read(source)['state_dict']
    if not is_release(state):
        state = remove_prefixes(state)
    optional = 'head.4.', 'aux_head.2.', *({STEM} & state.keys())
    fitting = fit(state, model, source, optional)
    model.load_state_dict(fitting, strict=False)
    return model


def overlock_xt(pretrained: bool | str = False, **kwargs) -> OverLoCK:
    """OverLoCK-XT (extreme-tiny); see :func:`build`."""
    return build('xt', pretrained, **kwargs)


def overlock_t(pretrained: bool | str = False, **kwargs) -> OverLoCK:
    """OverLoCK-T (tiny); see :func:`build`."""
    return build('t', pretrained, **kwargs)


def overlock_s(pretrained: bool | str = False, **kwargs) -> OverLoCK:
    """OverLoCK-S (small); see :func:`build`."""
    return build('s', pretrained, **kwargs)


def overlock_b(pretrained: bool | str = False, **kwargs) -> OverLoCK:
    """OverLoCK-B (base); see :func:`build`."""
    return build('b', pretrained, **kwargs)
