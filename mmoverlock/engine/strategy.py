"""Training in several processes that share the weights (FSDP)."""

from mmengine._strategy import FSDPStrategy
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from ..models.blocks import FocusBlock, RepConvBlock


@STRATEGIES.register_module(force=True)
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


@FUNCTIONS.register_module(force=True)
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
