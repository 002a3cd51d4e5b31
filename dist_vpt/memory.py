"""Memory policies, applied to a backbone from outside."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_vpt.backbones.backbone import Backbone


def _checkpointed(block: nn.Module, tokens_BND: Tensor) -> Tensor:
    # Not the reentrant form: it gives no gradient where the tokens before the prompts ask for none.
    return checkpoint(block, tokens_BND, use_reentrant=False)


def apply_attention(backbone: Backbone, kernel: str) -> None:
    """``sdpa`` is torch's fused scaled_dot_product_attention; ``eager`` computes and keeps the attention matrix.

    On a CPU with few tokens eager is the faster one (the fused backward is slow there); it keeps N x N numbers more
    per head for backward.
    """
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = kernel == "sdpa"  # type: ignore[assignment]


def apply_checkpointing(backbone: Backbone, policy: str) -> None:
    """``none`` keeps what backward needs; ``block`` keeps each block's input and computes the block again."""
    if policy == "block":
        backbone.run_block = _checkpointed
