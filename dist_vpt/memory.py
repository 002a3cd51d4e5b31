"""Memory policies, applied to a backbone from outside."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_vpt.backbones.backbone import Backbone


def _checkpointed(block: nn.Module, tokens_BND: Tensor) -> Tensor:
    # Not the reentrant form: it gives no gradient where the tokens before the prompts ask for none.
    return checkpoint(block, tokens_BND, use_reentrant=False)


def apply_checkpointing(backbone: Backbone, policy: str) -> None:
    """``none`` keeps what backward needs; ``block`` keeps each block's input and computes the block again."""
    if policy == "block":
        backbone.run_block = _checkpointed
