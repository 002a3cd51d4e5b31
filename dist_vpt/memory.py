"""Memory policies, applied to a backbone or a process from outside."""

import ctypes
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:  # workers that load images import this module too, and no model
    from dist_vpt.backbones.backbone import Backbone

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have this process use freed host memory again rather than give it back; whether its malloc can (glibc's).

    By default every large tensor comes from the system as fresh pages, and goes back when it is freed: a step on a CPU
    then pays a page fault for each 4 KiB that it writes, which on a virtual machine can cost as much as its arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))


def _checkpointed(block: nn.Module, tokens_BND: Tensor) -> Tensor:
    # Not the reentrant form: it gives no gradient where the tokens before the prompts ask for none.
    return checkpoint(block, tokens_BND, use_reentrant=False)


def apply_attention(backbone: "Backbone", kernel: str) -> None:
    """``sdpa`` is torch's fused scaled_dot_product_attention; ``eager`` computes and keeps the attention matrix.

    On a CPU with few tokens eager is the faster one (the fused backward is slow there); it keeps N x N numbers more
    per head for backward.
    """
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = kernel == "sdpa"  # type: ignore[assignment]


def apply_checkpointing(backbone: "Backbone", policy: str) -> None:
    """``none`` keeps what backward needs; ``block`` keeps each block's input and computes the block again."""
    if policy == "block":
        backbone.run_block = _checkpointed
