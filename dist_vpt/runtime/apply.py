"""Memory policies and attention kernels, applied to a backbone or a process from outside.

B images, H heads, N tokens, D width, E = D / H.

Each policy wraps ``backbone.run_block``, through which all blocks run: first the attention kernel, then the
compiler, then checkpointing, then offload, each around the one before.
"""

from typing import TYPE_CHECKING

import torch

from dist_vpt.errors import UserError
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.attention import apply_attention
from dist_vpt.runtime.compile import apply_compile, is_worth_compiling
from dist_vpt.runtime.cpu_speed import use_faster_products
from dist_vpt.runtime.offload import apply_offload
from dist_vpt.runtime.tf32 import apply_tf32

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone
    from dist_vpt.recipe.schema import RuntimeConfig


def apply_runtime(
    backbone: "Backbone", runtime: "RuntimeConfig", compute: torch.dtype, *, writes: bool, images: int = 0
) -> None:
    """Apply the runtime settings, after the method is attached.

    ``writes``: gradients flow through the blocks. ``images``: how many this process will train on, over all epochs.
    """
    cpu = runtime.device == "cpu" or not torch.accelerator.is_available()
    if not cpu:
        apply_tf32(backbone, runtime)
    if runtime.quantize == "int8":
        from dist_vpt.runtime.int8 import apply_int8

        apply_int8(backbone)
    apply_attention(backbone, runtime.attention, compute, writes=writes, cpu=cpu)
    compiles = runtime.compile
    if compiles is None:  # a budget chooses among operations, which a compiled block has none of
        simple = writes and torch.cuda.is_available() and not runtime.activation_checkpointing.startswith("budget")
        compiles = not cpu and simple and is_worth_compiling(backbone, images)
    if compiles:
        apply_compile(backbone, cpu=cpu)
    # What is compiled or quantized has products of its own.
    if cpu and (products := use_faster_products()) and compute == torch.float32 and runtime.quantize == "none":
        backbone.chosen |= {} if backbone.compiled else {"float32 products": products}
    apply_checkpointing(backbone, runtime.activation_checkpointing)
    if runtime.activation_checkpointing != "none":
        backbone.chosen["checkpointing"] = runtime.activation_checkpointing
    if runtime.offload:
        if cpu:
            raise UserError(
                "runtime.offload = true: a CPU's tensors are in host memory already; set runtime.offload=false"
            )
        apply_offload(backbone)
        backbone.chosen["offload"] = "to host memory"
