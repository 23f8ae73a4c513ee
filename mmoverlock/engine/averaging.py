"""Averages of weights, in a few launches."""

import weakref

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module(force=True)
class ForeachExponentialMovingAverage(ExponentialMovingAverage):
    """mmengine's moving average, of all weights at once.

    mmengine's makes a state dict for every update and takes the weights one by
    one, each with a launch on a GPU: 2,411 of OverLoCK-T and its buffers.
    ``EMAHook`` has this one with
    ``ema_type='ForeachExponentialMovingAverage'``.

    Arguments are those of :class:`mmengine.model.ExponentialMovingAverage`.
    """

    _slots = None  # whose weights, and where they and their averages are

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _slots=None)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average with the weights of a model of the same modules."""
        pairs = self._pairs(model)
        if self.steps == 0:
            torch._foreach_copy_(*zip(*pairs, strict=True))
        elif self.steps % self.interval == 0:
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            torch._foreach_lerp_(*zip(*floats, strict=True), self.momentum)
        if not self.update_buffers:
            for average, buffer in zip(
                self.module.buffers(), model.buffers(), strict=True
            ):
                average.copy_(buffer)
        self.steps += 1

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Averages and weights, each once, those of a state dict."""
        if self._slots is None or self._slots[0]() is not model:
            self._slots = weakref.ref(model), self._find(model)
        pairs = {}
        for averages, weights, name in self._slots[1]:
            average, weight = averages[name], weights[name]
            if weight.device != average.device:
                weight = weight.to(average.device)
            pairs[id(average)] = average, weight
        return [*pairs.values()]

    def _find(self, model: nn.Module) -> list[tuple[dict, dict, str]]:
        slots = []
        modules = self.module.modules(), model.modules()
        for own, other in zip(*modules, strict=True):
            tables = [(own._parameters, other._parameters)]
            if self.update_buffers:
                tables.append((own._buffers, other._buffers))
            left_out = own._non_persistent_buffers_set
            slots += [
                (averages, weights, name)
                for averages, weights in tables
                for name, average in averages.items()
                if average is not None and name not in left_out
            ]
        return slots
