"""Activation checkpointing: what backward recomputes instead of keeping."""

import inspect
from collections.abc import Collection
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_vpt.backbones.products import ONEDNN_LINEAR
from dist_vpt.errors import UserError
from dist_vpt.runtime.run_block import RunBlock, is_block_weight

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, ONEDNN_LINEAR}
FUSED_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
}
# Newer torch passes what selective checkpointing keeps to outer hooks, such as those that count or offload it.
HOOK_OPTIONS = {"respect_saved_tensors_hooks": True}
HAS_HOOK_OPTIONS = HOOK_OPTIONS.keys() <= inspect.signature(checkpoint).parameters.keys()


def apply_checkpointing(backbone: "Backbone", policy: str) -> None:
    """Have backward recompute what the policy does not keep; losses and gradients stay equal.

    ``none`` keeps all that backward needs; ``mlp`` only the input of an MLP; ``block`` only each block's input;
    ``every-N`` does so in every N-th block; ``budget-F`` keeps at most F of what ``none`` keeps.
    """
    # Never the reentrant form: it gives no gradient where the tokens before the prompts require none.
    run = backbone.run_block
    if policy == "mlp":
        inside = [module for name, module in backbone.blocks.named_modules() if name.endswith(".mlp")]
        if not inside:
            raise UserError(
                f"runtime.activation_checkpointing = mlp: a {type(backbone.blocks[0]).__name__} of the backbone has no "
                "MLP module; use block, every-N or budget-F"
            )
        for mlp in inside:
            mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)  # type: ignore[method-assign]
    elif policy.startswith("budget-"):
        backbone.run_block = _Budget(float(policy.removeprefix("budget-")), run)
    elif policy != "none":
        every = 1 if policy == "block" else int(policy.removeprefix("every-"))
        if every > len(backbone.blocks):
            raise UserError(
                f"runtime.activation_checkpointing = {policy}: the backbone has {len(backbone.blocks)} blocks, and "
                f"none would be recomputed; use at most every-{len(backbone.blocks)}, or none"
            )
        backbone.run_block = partial(_checkpointed, run, frozenset(backbone.blocks[every - 1 :: every]))


def _checkpointed(run: RunBlock, chosen: Collection[nn.Module], block: nn.Module, tokens_BND: Tensor) -> Tensor:
    return checkpoint(run, block, tokens_BND, use_reentrant=False) if block in chosen else run(block, tokens_BND)


class _Budget:
    """Blocks that keep at most a fraction of what they would keep: what costs most to recompute.

    What a block may keep, besides its input, are the outputs of its matrix products and of fused attention; norms,
    activations and sums cost next to nothing to recompute. Attention comes first (it is the slowest per number of
    its output), then the products with the most multiplications per number, of equals the larger. What a block leaves
    of its budget goes to the next one; a block whose budget covers all is not checkpointed.
    """

    def __init__(self, fraction: float, run: RunBlock):
        self.fraction, self.run = fraction, run
        self.spare: float | None = None  # bytes that the blocks so far have left
        self.plans: dict[nn.Module, frozenset[int] | None] = {}  # numbers of the operations kept; None: all

    def __call__(self, block: nn.Module, tokens_BND: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.run(block, tokens_BND)
        if block not in self.plans:
            self.plans[block] = self._plan(block, tokens_BND)
        kept = self.plans[block]
        if kept is None:
            return self.run(block, tokens_BND)
        hook_options: Any = HOOK_OPTIONS if HAS_HOOK_OPTIONS else {}
        return checkpoint(
            self.run, block, tokens_BND, use_reentrant=False, context_fn=partial(_contexts, kept), **hook_options
        )

    def _plan(self, block: nn.Module, tokens_BND: Tensor) -> frozenset[int] | None:
        """Choose the operations to save, from a run on two images: the fractions are the same for more.

        With a single image the heads are contiguous without a copy, which would count too little.
        """
        tokens_2ND = tokens_BND[:2].detach().clone().requires_grad_(tokens_BND.requires_grad)
        recorded, devices = _SavedTensors(block), [tokens_BND.device] if tokens_BND.is_cuda else []
        with torch.random.fork_rng(devices), saved_tensors_hooks(recorded.pack, lambda tensor: tensor), recorded:
            self.run(block, tokens_2ND)
        all_bytes, block_input = sum(recorded.saved.values()), tokens_2ND.nbytes
        if not all_bytes:  # nothing here requires a gradient
            return None
        free = not tokens_BND.requires_grad  # nothing before it is trained: little is kept, without the input
        if self.fraction * all_bytes < block_input and not free:
            raise UserError(
                f"runtime.activation_checkpointing = budget-{self.fraction}: a block's input alone is "
                f"{block_input / all_bytes:.2f} of what the block keeps for backward; use a larger fraction, or block"
            )
        if self.spare is None:
            self.spare = -block_input  # the last block's output, which is not within any block
        self.spare += self.fraction * all_bytes
        # A block without a trained tensor before it may exceed its budget; the blocks after it make up for that.
        if all_bytes <= self.spare or self.fraction * all_bytes < block_input:
            self.spare -= all_bytes
            return None
        self.spare -= block_input
        kept = []
        needed = recorded.products[: recorded.needed]
        for number, (_, size) in sorted(enumerate(needed), key=lambda item: item[1], reverse=True):
            if size <= self.spare:
                self.spare -= size
                kept.append(number)
        return frozenset(kept)


class _SavedTensors(TorchDispatchMode):
    """Records the bytes that a block saves for backward, without weights, and its costly operations in order."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.saved: dict[int, int] = {}  # storage -> bytes
        self.held: list[Tensor] = []  # so that no storage's address is reused
        self.products: list[tuple[float, int]] = []  # multiplications per number of the output, and its bytes
        self.factors: set[int] = set()  # storages of the last one's inputs
        self.needed = 0  # how many of them come before the last tensor that is kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FUSED_ATTENTION:
            self.products.append((float("inf"), sum(t.nbytes for t in out if isinstance(t, Tensor))))
        elif func.overloadpacket in PRODUCTS:
            factor = args[0] if func.overloadpacket is ONEDNN_LINEAR else args[-2]
            self.products.append((factor.shape[-1], out.nbytes))
            self.factors = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        return out

    def pack(self, tensor: Tensor) -> Tensor:
        # What was there before the last product does not need it: oneDNN's keep their factors after they are computed.
        self.needed = max(self.needed, len(self.products) - (tensor.untyped_storage()._cdata in self.factors))
        if not is_block_weight(tensor, self.block):
            self.saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            self.held.append(tensor)
        return tensor


def _contexts(kept: frozenset[int]) -> Any:
    """Of one checkpointed call: forward keeps the numbered ones of its products, backward recomputes the rest."""
    numbers = {False: count(), True: count()}  # of forward, and of backward, if torch calls it there too

    def keeps(context: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        costly = func.overloadpacket in PRODUCTS or func.overloadpacket in FUSED_ATTENTION
        keep = costly and next(numbers[context.is_recompute]) in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keeps)
