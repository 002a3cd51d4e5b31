"""Compiled blocks."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone


def apply_compile(backbone: "Backbone", *, cpu: bool) -> None:
    """Compile the blocks as one function, for static shapes; without a compiler they run uncompiled."""
    try:
        _try_compiler("cpu" if cpu else str(torch.accelerator.current_accelerator()))
    except Exception as error:  # no C++ compiler, no Triton, no headers: each raises its own error
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
