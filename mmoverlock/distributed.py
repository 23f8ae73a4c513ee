"""What training in several processes needs beside mmengine's own."""

from mmengine._strategy import FSDPStrategy
from mmengine.dist import all_reduce_params
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import FUNCTIONS, STRATEGIES
from mmengine.runner import IterBasedTrainLoop
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from .models.blocks import FocusBlock, RepConvBlock


class AverageStatistics(Hook):
    """Averages the running statistics of batch norms over all processes.

    Without SyncBN, every process has those of the images it has seen itself.
    They become equal at the end of epochs, and where training by iterations
    stops for a validation. So do those of the averaged weights of `EMAHook`.
    """

    priority = 'NORMAL'  # after EMAHook, before CheckpointHook

    def after_train_epoch(self, runner) -> None:
        models = [runner.model]
        models += [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]
        statistics = [
            buffer
            for model in models
            for name, buffer in model.named_buffers()
            if name.endswith(('running_mean', 'running_var'))
        ]
        all_reduce_params(statistics, op='mean')

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            if self.every_n_train_iters(runner, loop.val_interval):
                self.after_train_epoch(runner)


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """mmengine's, whose checkpoints can be read and resumed from.

    Arguments are those of mmengine's.
    """

    def model_state_dict(self) -> dict:
        """The weights, without the marks that FSDP may leave on them.

        With those, pickles ask for more than data, and are refused.
        """
        state = super().model_state_dict()
        for name, weight in state.items():
            state[name] = weight.detach()
        return state

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load optimizer states; mmengine does so in the way of torch 2.0."""
        optimizer = self.optim_wrapper.optimizer
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                model=self.model, optim=optimizer, optim_state_dict=state_dict
            )
        )


@FUNCTIONS.register_module()
def overlock_wrap_policy(
    module: nn.Module, recurse: bool, nonwrapped_numel: int
) -> bool:
    """Have FSDP gather the parameters of a block at a time.

    For ``auto_wrap_policy`` of mmengine's ``MMFullyShardedDataParallel``. What
    is in no block, neck and heads among it, is gathered together.

    Args:
        module (nn.Module): What to decide on.
        recurse (bool): Whether the question is to look into the module, not to
            wrap it.
        nonwrapped_numel (int): Its parameters that nothing gathers yet.
    """
    return transformer_auto_wrap_policy(
        module, recurse, nonwrapped_numel, {RepConvBlock, FocusBlock}
    )
