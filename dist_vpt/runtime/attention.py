"""The attention kernel of all blocks."""

import warnings
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_vpt.errors import UserError
from dist_vpt.runtime.run_block import RunBlock

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,  # whose kernels a package has replaced
}
# Eager's forward and backward are 1.4 to 10 times as fast as the fused ones on a CPU in bfloat16; with more tokens
# this also holds, but there the attention matrix is half of what a block keeps.
EAGER_TOKENS = 256


def apply_attention(backbone: "Backbone", kernel: str, compute: torch.dtype, *, writes: bool, cpu: bool) -> None:
    """Choose the kernel of all blocks and note it in ``backbone.chosen``. Raises UserError if it is not available.

    ``eager`` computes and keeps the attention matrix; the others are scaled_dot_product_attention: chosen by
    torch (``sdpa``), one kernel, or a flash-attn package (``flash``). ``auto`` is sdpa except where gradients flow
    through the blocks (``writes``) on a CPU in half precision: the fused backward is slow there.
    """
    if kernel == "auto":
        slow = cpu and writes and compute != torch.float32 and backbone.tokens <= EAGER_TOKENS
        kernel = "eager" if slow else "sdpa"
    choosers: list[Any] = [module for module in backbone.modules() if hasattr(module, "fused_attn")]
    for module in choosers:
        module.fused_attn = kernel != "eager"
    chosen = kernel
    restore_flash()  # what an earlier run of this process has activated
    if kernel in BACKENDS:
        wanted = {AttentionScores.of(module) for module in choosers}
        if kernel == "flash":
            chosen += f" ({activate_flash(compute, wanted, cpu=cpu)})"
        else:
            refuse_missing(kernel, compute, cpu, wanted)
        backbone.run_block = partial(_with_backend, BACKENDS[kernel], backbone.run_block)
    backbone.chosen["attention"] = chosen


def _with_backend(backend: SDPBackend, run: RunBlock, block: nn.Module, tokens_BND: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return run(block, tokens_BND)


def activate_flash(compute: torch.dtype, wanted: Collection["AttentionScores"], *, cpu: bool) -> str:
    """Have a flash-attn package replace torch's own flash kernels. Returns its name in torch's registry.

    The newest first, the first is taken whose forward and backward run on this device for all ``wanted`` scores; torch
    activates one for a GPU that it does not support too (FlashAttention-3: compute capability 9.0 alone, 4: 9.x and
    10.x), and raises where it is called. Raises UserError where there is none; torch's own kernels are active then.
    """
    device = torch.device("cpu") if cpu else torch.accelerator.current_accelerator()
    reasons = []
    for name in sorted(getattr(attention, "list_flash_attention_impls", list)(), reverse=True):
        try:
            attention.activate_flash_attention_impl(name)
            for scores in wanted:
                _probe("flash", compute, device, scores)
        except Exception as error:  # not installed, or not for this torch or this GPU: each raises its own error
            restore_flash()
            reasons.append(f"{name}: {_first_line(error)}")
        else:
            return name
    raise UserError(
        f"runtime.attention = flash: no package with flash attention for {_device_name(device)} "
        f"({'; '.join(reasons) or 'torch lists none'}); pip install 'dist-vpt[flash]', or set "
        "runtime.attention=sdpa_flash for torch's own kernels"
    )


def restore_flash() -> None:
    """Have torch's own flash kernels back, where a package has replaced them."""
    if getattr(attention, "current_flash_attention_impl", lambda: None)() is not None:
        attention.restore_flash_attention_impl()


def _device_name(device: torch.device | None) -> str:
    """For people: a GPU's with its compute capability, on which it depends whether a kernel supports it."""
    if device is None or device.type != "cuda":
        return f"{device}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class AttentionScores(NamedTuple):
    """The properties of attention scores that decide whether a kernel supports them."""

    width: int  # of a head
    biased: bool = False  # whether something is added to them, as Swin adds a bias by relative position
    bias_trained: bool = False

    @classmethod
    def of(cls, module: Any) -> "AttentionScores":
        table = getattr(module, "relative_position_bias_table", None)
        return cls(getattr(module, "head_dim", 64), table is not None, table is not None and table.requires_grad)


def refuse_missing(kernel: str, compute: torch.dtype, cpu: bool, wanted: Collection[AttentionScores]) -> None:
    """Raises UserError where a kernel of torch cannot compute ``wanted`` scores on this device."""
    device = torch.device("cpu") if cpu else torch.accelerator.current_accelerator()
    for scores in wanted:
        try:
            _probe(kernel, compute, device, scores)
        except RuntimeError as error:
            precision = str(compute).removeprefix("torch.")
            bias = f", with a {'trained ' if scores.bias_trained else ''}bias on their scores" if scores.biased else ""
            raise UserError(
                f"runtime.attention = {kernel}: there is no such kernel for {_device_name(device)}, {precision} and "
                f"heads of width {scores.width}{bias}; set runtime.attention=auto"
            ) from error


def _probe(kernel: str, compute: torch.dtype, device: torch.device | None, scores: AttentionScores) -> None:
    """Run a kernel forward and backward on something tiny. Raises whatever it raises."""
    q_1HNE = torch.zeros(1, 1, 8, scores.width, dtype=compute, device=device, requires_grad=True)
    bias_1HNN = torch.zeros(1, 1, 8, 8, dtype=compute, device=device, requires_grad=scores.bias_trained)
    bias = bias_1HNN if scores.biased else None
    with sdpa_kernel(BACKENDS[kernel]), warnings.catch_warnings(action="ignore"), torch.enable_grad():
        nn.functional.scaled_dot_product_attention(q_1HNE, q_1HNE, q_1HNE, bias).sum().backward()
    if q_1HNE.is_cuda:
        torch.cuda.synchronize()  # a kernel that is not for this GPU may fail later than it is called
