"""Memory policies and attention kernels, applied to a backbone or a process from outside.

B images, H heads, N tokens, D width, E = D / H.

Each policy wraps ``backbone.run_block``, the one way in which blocks are run: first the attention kernel, then the
compiler, then checkpointing, then offload, each around the one before.
"""

import ctypes
import inspect
import warnings
from collections.abc import Callable, Collection
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_vpt.errors import UserError

if TYPE_CHECKING:  # workers that load images import this module too, and no model
    from dist_vpt.backbones.backbone import Backbone
    from dist_vpt.recipe import RuntimeRecipe

Run = Callable[[nn.Module, Tensor], Tensor]  # a block on tokens [B, N, D]
PutAway = Callable[[Tensor], Callable[[], Tensor]]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2**20  # bytes from which on a tensor that is freed goes back to the system
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,  # whose kernels a package has replaced
}
# Eager's forward and backward are 1.4 to 10 times as fast as the fused ones on a CPU in bfloat16; with more tokens
# they are so too, but there the attention matrix is half of what a block keeps.
EAGER_TOKENS = 256
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
FUSED_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
}
# Newer torch shows what selective checkpointing keeps to outer hooks, such as those that count or offload it.
SHOWN = {"respect_saved_tensors_hooks": True}
SHOWS = SHOWN.keys() <= inspect.signature(checkpoint).parameters.keys()


def keep_freed_memory() -> bool:
    """Have this process use freed host memory again rather than give it back; whether its malloc can (glibc's).

    By default every large tensor comes from the system as fresh pages, and goes back when it is freed: a step on a CPU
    then pays a page fault for each 4 KiB that it writes, which on a virtual machine can cost as much as its arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))


def give_back_freed_memory() -> bool:
    """Have this process give back host memory as soon as it is freed, and now; whether its malloc can (glibc's).

    Where weights are gathered and freed all the time, freed places are hardly ever of the size that is wanted next: a
    process that shares weights out would grow to the size of one that does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGE) and trim_freed_memory())


def trim_freed_memory() -> bool:
    """Give back the host memory that is free by now, and no other; whether this process's malloc can (glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    return bool(trim)


def apply_runtime(backbone: "Backbone", runtime: "RuntimeRecipe", compute: torch.dtype, *, writes: bool) -> None:
    """All that a recipe says. ``writes``: gradients flow through the blocks. After the method has been attached."""
    cpu = runtime.device == "cpu" or not torch.accelerator.is_available()
    if runtime.frozen_weights == "int8":
        from dist_vpt.int8 import apply_int8

        apply_int8(backbone)
    apply_attention(backbone, runtime.attention, compute, writes=writes, cpu=cpu)
    if runtime.compile:
        apply_compile(backbone, cpu=cpu)
    apply_checkpointing(backbone, runtime.checkpointing)
    if runtime.checkpointing != "none":
        backbone.chosen["checkpointing"] = runtime.checkpointing
    if runtime.offload:
        if cpu:
            raise UserError("runtime.offload = true: on a CPU all is in host memory already; set runtime.offload=false")
        apply_offload(backbone)
        backbone.chosen["offload"] = "to host memory"


def apply_attention(backbone: "Backbone", kernel: str, compute: torch.dtype, *, writes: bool, cpu: bool) -> None:
    """Choose the kernel of all blocks and note it in ``backbone.chosen``. Raises UserError for one that is not there.

    ``eager`` computes and keeps the attention matrix; the others are scaled_dot_product_attention: by torch's choice
    (``sdpa``), by one kernel alone, or by a flash-attn package (``flash``). ``auto`` is sdpa but where gradients flow
    through the blocks (``writes``) on a CPU in half precision: the fused backward is slow there.
    """
    if kernel == "auto":
        slow = cpu and writes and compute != torch.float32 and backbone.tokens <= EAGER_TOKENS
        kernel = "eager" if slow else "sdpa"
    choosers: list[Any] = [module for module in backbone.modules() if hasattr(module, "fused_attn")]
    for module in choosers:
        module.fused_attn = kernel != "eager"
    chosen = kernel
    if kernel in BACKENDS:
        chosen += f" ({_activate_flash()})" if kernel == "flash" else ""
        refuse_missing(kernel, compute, cpu, {Scores.of(module) for module in choosers})
        backbone.run_block = partial(_with_backend, BACKENDS[kernel], backbone.run_block)
    backbone.chosen["attention"] = chosen


def _with_backend(backend: SDPBackend, run: Run, block: nn.Module, tokens_BND: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return run(block, tokens_BND)


def _activate_flash() -> str:
    """Have a flash-attn package replace torch's own flash kernels, the newest that is installed; its name."""
    reasons = []
    for name in sorted(getattr(attention, "list_flash_attention_impls", list)(), reverse=True):
        try:
            attention.activate_flash_attention_impl(name)
        except Exception as error:  # not installed, or not for this torch or this GPU: each says it in its own way
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise UserError(
        f"runtime.attention = flash: no package with flash attention ({'; '.join(reasons) or 'torch knows of none'}); "
        "pip install 'dist-vpt[flash]', or set runtime.attention=sdpa_flash for torch's own kernels"
    )


class Scores(NamedTuple):
    """What decides whether a kernel can compute an attention's scores."""

    width: int  # of a head
    biased: bool = False  # whether something is added to them, as Swin adds a bias by relative position
    bias_trained: bool = False

    @classmethod
    def of(cls, module: Any) -> "Scores":
        table = getattr(module, "relative_position_bias_table", None)
        return cls(getattr(module, "head_dim", 64), table is not None, table is not None and table.requires_grad)


def refuse_missing(kernel: str, compute: torch.dtype, cpu: bool, wanted: Collection[Scores]) -> None:
    device = torch.device("cpu") if cpu else torch.accelerator.current_accelerator()
    for scores in wanted:
        q_1HNE = torch.zeros(1, 1, 8, scores.width, dtype=compute, device=device, requires_grad=True)
        bias_1HNN = torch.zeros(1, 1, 8, 8, dtype=compute, device=device, requires_grad=scores.bias_trained)
        try:
            with sdpa_kernel(BACKENDS[kernel]), warnings.catch_warnings(action="ignore"):
                nn.functional.scaled_dot_product_attention(q_1HNE, q_1HNE, q_1HNE, bias_1HNN if scores.biased else None)
        except RuntimeError as error:
            precision = str(compute).removeprefix("torch.")
            bias = f", with a {'trained ' if scores.bias_trained else ''}bias on their scores" if scores.biased else ""
            raise UserError(
                f"runtime.attention = {kernel}: there is no such kernel for {device}, {precision} and heads of width "
                f"{scores.width}{bias}; set runtime.attention=auto"
            ) from error


def apply_compile(backbone: "Backbone", *, cpu: bool) -> None:
    """Compile blocks, all by one function, for the shapes that they meet; without a compiler they run as they are."""
    try:
        _try_compiler("cpu" if cpu else str(torch.accelerator.current_accelerator()))
    except Exception as error:  # no C++ compiler, no Triton, no headers: each says it in its own way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        backbone.chosen["compile"] = f"warning: no compiler here, blocks run uncompiled ({reason})"
        return
    run = backbone.run_block

    def compiled(block: nn.Module, tokens_BND: Tensor) -> Tensor:
        return run(block, tokens_BND)

    backbone.run_block = torch.compile(compiled, dynamic=False)
    backbone.chosen["compile"] = "each block"


def _try_compiler(device: str) -> None:
    """Compile something tiny. Raises whatever the compiler raises."""
    torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(2, device=device))


def apply_checkpointing(backbone: "Backbone", policy: str) -> None:
    """Have backward compute again what the policy does not keep; losses and gradients stay what they are.

    ``none`` keeps all that backward needs; ``mlp`` an MLP's input and nothing of its inside; ``block`` each block's
    input alone; ``every-N`` does so in every N-th block; ``budget-F`` keeps at most F of what ``none`` keeps.
    """
    # Never the reentrant form: it gives no gradient where the tokens before the prompts ask for none.
    run = backbone.run_block
    if policy == "mlp":
        inside = [module for name, module in backbone.blocks.named_modules() if name.endswith(".mlp")]
        if not inside:
            raise UserError(
                f"runtime.checkpointing = mlp: a {type(backbone.blocks[0]).__name__} of the backbone has no MLP as a "
                "module of its own; use block, every-N or budget-F"
            )
        for mlp in inside:
            mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)  # type: ignore[method-assign]
    elif policy.startswith("budget-"):
        backbone.run_block = _Budget(float(policy.removeprefix("budget-")), run)
    elif policy != "none":
        every = 1 if policy == "block" else int(policy.removeprefix("every-"))
        if every > len(backbone.blocks):
            raise UserError(
                f"runtime.checkpointing = {policy}: the backbone has {len(backbone.blocks)} blocks, and none would be "
                f"computed again; use at most every-{len(backbone.blocks)}, or none"
            )
        backbone.run_block = partial(_checkpointed, run, frozenset(backbone.blocks[every - 1 :: every]))


def _checkpointed(run: Run, chosen: Collection[nn.Module], block: nn.Module, tokens_BND: Tensor) -> Tensor:
    return checkpoint(run, block, tokens_BND, use_reentrant=False) if block in chosen else run(block, tokens_BND)


class _Budget:
    """Blocks that keep at most a fraction of what they would keep, and the dearest of it.

    What a block may keep, besides its input, are the outputs of its matrix products and of fused attention; norms,
    activations and sums cost next to nothing to compute again. Attention comes first (it is the slowest per number of
    its output), then the products with the most multiplications per number, of equals the larger. What a block leaves
    of its share goes to the next one; a block whose share is all that it would keep is left alone.
    """

    def __init__(self, fraction: float, run: Run):
        self.fraction, self.run = fraction, run
        self.spare: float | None = None  # bytes that the blocks so far have left
        self.plans: dict[nn.Module, frozenset[int] | None] = {}  # numbers of the operations kept; None: all there is

    def __call__(self, block: nn.Module, tokens_BND: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.run(block, tokens_BND)
        if block not in self.plans:
            self.plans[block] = self._plan(block, tokens_BND)
        kept = self.plans[block]
        if kept is None:
            return self.run(block, tokens_BND)
        shown: Any = SHOWN if SHOWS else {}
        return checkpoint(
            self.run, block, tokens_BND, use_reentrant=False, context_fn=partial(_contexts, kept), **shown
        )

    def _plan(self, block: nn.Module, tokens_BND: Tensor) -> frozenset[int] | None:
        """What the block keeps, from a run on two images: the shares are the same for more.

        One alone would not do: with it, heads of several images need no copy to lie side by side.
        """
        tokens_2ND = tokens_BND[:2].detach().clone().requires_grad_(tokens_BND.requires_grad)
        seen, devices = _Seen(block), [tokens_BND.device] if tokens_BND.is_cuda else []
        with torch.random.fork_rng(devices), saved_tensors_hooks(seen.pack, lambda tensor: tensor), seen:
            self.run(block, tokens_2ND)
        whole, own = sum(seen.saved.values()), tokens_2ND.nbytes
        if not whole:  # nothing here asks for a gradient
            return None
        free = not tokens_BND.requires_grad  # nothing before it is trained: little is kept, and not the input
        if self.fraction * whole < own and not free:
            raise UserError(
                f"runtime.checkpointing = budget-{self.fraction}: a block's input alone is {own / whole:.2f} of what "
                "the block keeps for backward; use a larger fraction, or block"
            )
        if self.spare is None:
            self.spare = -own  # the last block's output, which is not within any block
        self.spare += self.fraction * whole
        if whole <= self.spare or self.fraction * whole < own:  # the blocks that follow make up for such a free one
            self.spare -= whole
            return None
        self.spare -= own
        kept = []
        needed = seen.products[: seen.needed]
        for number, (_, size) in sorted(enumerate(needed), key=lambda item: item[1], reverse=True):
            if size <= self.spare:
                self.spare -= size
                kept.append(number)
        return frozenset(kept)


def apply_offload(backbone: "Backbone", put_away: PutAway | None = None) -> None:
    """Have what blocks keep for backward wait in host memory; weights stay where they are.

    ``put_away`` gives for a tensor what brings it back; in host memory unless given.
    """
    backbone.run_block = partial(_offloaded, put_away or _to_host, backbone.run_block)


def _offloaded(put_away: PutAway, run: Run, block: nn.Module, tokens_BND: Tensor) -> Tensor:
    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return tensor if _of_weights(tensor, block) else put_away(tensor)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        return run(block, tokens_BND)


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    # With its strides: what selective checkpointing gives back must be laid out as it was.
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return partial(host.copy_(tensor).to, tensor.device)


class _Seen(TorchDispatchMode):
    """What a block keeps for backward, weights left out, and its products and attention in order."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.saved: dict[int, int] = {}  # storage -> bytes
        self.held: list[Tensor] = []  # so that no storage's address is given out twice
        self.products: list[tuple[float, int]] = []  # multiplications per number of the output, and its bytes
        self.needed = 0  # how many of them are before the last thing that is kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FUSED_ATTENTION:
            self.products.append((float("inf"), sum(t.nbytes for t in out if isinstance(t, Tensor))))
        elif func.overloadpacket in PRODUCTS:
            self.products.append((args[-2].shape[-1], out.nbytes))
        return out

    def pack(self, tensor: Tensor) -> Tensor:
        self.needed = len(self.products)
        if not _of_weights(tensor, self.block):
            self.saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            self.held.append(tensor)
        return tensor


def _contexts(kept: frozenset[int]) -> Any:
    """Of one checkpointed call: forward keeps the numbered ones of its products, backward computes all else again."""
    numbers = {False: count(), True: count()}  # of forward, and of backward where torch asks there too

    def keeps(context: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        dear = func.overloadpacket in PRODUCTS or func.overloadpacket in FUSED_ATTENTION
        keep = dear and next(numbers[context.is_recompute]) in kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keeps)


def _of_weights(tensor: Tensor, block: nn.Module) -> bool:
    """Whether a tensor is a view of the block's weights or of those that a method has hung on it, or one of them."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    address = tensor.untyped_storage()._cdata
    return any(parameter.untyped_storage()._cdata == address for parameter in block.parameters())
