"""Mixed precision on CPUs."""

from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn

try:
    # On CPUs, they take single precision only.
    SINGLE_PRECISION = (
        (import_module('mmcv.ops.nms').NMSop, 'apply'),
        (import_module('mmcv.ops.roi_align'), 'roi_align'),
    )
except ImportError:  # classification needs no compiled ops
    SINGLE_PRECISION = ()


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Trains in bfloat16 on a CPU, where mmengine's AmpOptimWrapper does not.

    That format has the range of single precision: losses are not scaled.
    Arguments are those of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        with super().optim_context(model), autocast('cpu'), ExitStack() as ops:
            for owner, name in SINGLE_PRECISION:
                function = _in_single_precision(getattr(owner, name))
                ops.enter_context(patch.object(owner, name, function))
            yield


def _in_single_precision(function):
    def call(x, *args):
        args = (
            arg.float()
            if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16
            else arg
            for arg in (x, *args)
        )
        out = function(*args)
        return out.to(x.dtype) if out.is_floating_point() else out

    return call
