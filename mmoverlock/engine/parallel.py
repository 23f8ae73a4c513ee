"""Training in several processes that exchange gradients by few operators.

DistributedDataParallel takes two operators for the gradient of a parameter:
one writes it to a bucket, the other copies the average back. For the 1,755
parameters of OverLoCK-T that is twice as many as blocks of kernels take for a
training step.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, distributed, nn
from torch.autograd import Variable

from .optimizers import lay_out_as


class _Bucket(NamedTuple):
    """Parameters, and memory for the gradients of all of them."""

    parameters: list[nn.Parameter]
    memory: Tensor
    views: list[Tensor]  # of the memory, with strides of the parameters

    def gradients(self) -> list[Tensor]:
        """With the strides of the parameters, where these are as good.

        With others, operators on lists would take them one by one.
        """
        return [
            lay_out_as(view, parameter.grad)
            for view, parameter in zip(
                self.views, self.parameters, strict=True
            )
        ]


def _buckets(parameters: Iterable[nn.Parameter], size: float) -> list[_Bucket]:
    """Buckets of one dtype and device, closed when they have so many bytes."""
    groups, unfinished = [], {}
    for parameter in parameters:
        kind = parameter.dtype, parameter.device
        group, room = unfinished.get(kind, (None, 0))
        if room <= 0:
            group, room = [], size
            groups.append(group)
        group.append(parameter)
        unfinished[kind] = group, room - parameter.nbytes
    buckets = []
    for group in groups:
        starts = [0]
        for parameter in group:  # each of them aligned
            starts.append(starts[-1] + -(-parameter.numel() // 16) * 16)
        memory = group[0].detach().new_zeros(starts[-1])
        views = [
            memory.as_strided(
                parameter.shape, torch.empty_like(parameter).stride(), start
            )
            for parameter, start in zip(group, starts, strict=False)
        ]
        buckets.append(_Bucket(group, memory, views))
    return buckets


@MODEL_WRAPPERS.register_module(force=True)
class ForeachDistributedDataParallel(nn.Module):
    """Averages gradients over all processes, many in an operator.

    Takes the place of mmengine's ``MMDistributedDataParallel`` where every
    parameter gets a gradient in every step. Gradients are exchanged bucket by
    bucket during the backward pass; where they are accumulated over several
    steps, at the end of the last one. Weights and buffers are those of the
    first process in the beginning.

    Args:
        module (BaseModel): The model, on its device.
        bucket_cap_mb (float): Size of a bucket in MiB. Defaults to 25.
    """

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25):
        super().__init__()
        self.module = module
        for tensor in (*module.parameters(), *module.buffers()):
            _broadcast(tensor.detach())
        trained = [p for p in module.parameters() if p.requires_grad]
        # The last layers have their gradients first
        self._buckets = _buckets(trained[::-1], bucket_cap_mb * 2**20)
        self._sent = None  # of the buckets, while gradients are made
        for bucket in self._buckets[1:]:  # when those before may be complete
            first = bucket.parameters[0]
            first.register_post_accumulate_grad_hook(self._send_complete)

    def forward(self, *args, **kwargs) -> Any:
        return self.module(*args, **kwargs)

    def train_step(
        self, data: dict | tuple | list, optim_wrapper: OptimWrapper
    ) -> dict[str, Tensor]:
        """A step of training, with a batch of this process.

        Args:
            data (dict | tuple | list): From a data loader.
            optim_wrapper (OptimWrapper): Updates the parameters.

        Returns:
            dict[str, Tensor]: Losses to log.

        Raises:
            RuntimeError: If a parameter has no gradient, or more than one.
        """
        with optim_wrapper.optim_context(self):
            data = self.module.data_preprocessor(data, training=True)
            losses = self.module._run_forward(data, mode='loss')
        loss, logged = self.module.parse_losses(losses)
        if optim_wrapper.should_sync():
            loss.register_hook(self._start)
        optim_wrapper.update_params(loss)
        return logged

    def val_step(self, data: dict | tuple | list) -> list:
        """Predictions for a batch; see :class:`mmengine.model.BaseModel`."""
        return self.module.val_step(data)

    def test_step(self, data: dict | tuple | list) -> list:
        """See :meth:`val_step`."""
        return self.module.test_step(data)

    def _start(self, grad: Tensor) -> None:
        """Begin to exchange, as a backward pass begins."""
        parameters = (p for bucket in self._buckets for p in bucket.parameters)
        # Gradients that are there already do not show when a sum is whole
        self._is_early = all(p.grad is None for p in parameters)
        self._sent = []
        Variable._execution_engine.queue_callback(self._finish)

    def _send_complete(self, parameter: nn.Parameter) -> None:
        """Send what is complete, in the order that all processes have."""
        if self._sent is None or not self._is_early:
            return
        for bucket in self._buckets[len(self._sent) :]:
            if any(p.grad is None for p in bucket.parameters):
                break
            self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        grads = bucket.gradients()
        torch._foreach_copy_(bucket.views, grads)
        bucket.memory.div_(distributed.get_world_size())
        work = distributed.all_reduce(bucket.memory, async_op=True)
        self._sent.append((work, grads, _versions(grads)))

    def _finish(self) -> None:
        """Send all others, and put averages in the place of gradients."""
        left = self._buckets[len(self._sent) :]
        missing = {p for b in left for p in b.parameters if p.grad is None}
        if missing:
            names = [
                name
                for name, parameter in self.module.named_parameters()
                if parameter in missing
            ]
            raise RuntimeError(
                f'{len(names)} parameters have no gradient, the first of them '
                f'{names[0]}: take them out of the model, or set '
                'find_unused_parameters = True in the config'
            )
        for bucket in left:
            self._send(bucket)
        # Before any is written, as views of one tensor share a version
        if any(_versions(grads) != sent for _, grads, sent in self._sent):
            raise RuntimeError(
                'a gradient grew after it had been sent, as it may where '
                'layers that share weights are recomputed: set '
                "model_wrapper_cfg = dict(type='MMDistributedDataParallel', "
                'broadcast_buffers=False) in the config'
            )
        for bucket, (work, grads, _) in zip(
            self._buckets, self._sent, strict=True
        ):
            work.wait()
            torch._foreach_copy_(grads, bucket.views)
        self._sent = None


def _broadcast(tensor: Tensor) -> None:
    """Give it the values of the first process, however it lies in memory."""
    first = tensor.contiguous()  # gloo takes memory from start to end
    distributed.broadcast(first, 0)
    if first is not tensor and not first.equal(tensor):
        tensor.copy_(first)


def _versions(tensors: list[Tensor]) -> list[int]:
    """They change where a tensor does."""
    return [tensor._version for tensor in tensors]


def exchanging_lists(runner_type: type) -> type:
    """Derive a runner class whose models are wrapped in the class above.

    Where the config has a ``model_wrapper_cfg``, or sets
    ``find_unused_parameters``, that is what counts.

    Args:
        runner_type (type): mmengine's, or another with its ``wrap_model``.
    """

    class ListRunner(runner_type):
        def wrap_model(
            self, model_wrapper_cfg: dict | None, model: nn.Module
        ) -> nn.Module:
            is_free = not self.cfg.get('find_unused_parameters')
            if model_wrapper_cfg is None and self.distributed and is_free:
                model_wrapper_cfg = dict(type=ForeachDistributedDataParallel)
            return super().wrap_model(model_wrapper_cfg, model)

    return ListRunner
