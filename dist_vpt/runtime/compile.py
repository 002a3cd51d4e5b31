"""Compiled blocks, and what happens where the compiler gives up.

B batch, N tokens, D width, L blocks.

All blocks are calls of one function, so that blocks of one kind share a graph. Dynamo makes another graph for each
shape of the tokens and each kind of block (a Swin has one or two a stage), and by default runs the function
uncompiled from the ninth on without a word. Here the limit leaves each block a graph of its own for each shape, and
a block that cannot be compiled is reported.
"""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

# A batch to train on, one to score (each with another where a split is smaller than a batch), with gradients and
# without.
SHAPES = 8
# Floating-point operations of a process from which compiling is worth its minute: ten minutes at 150 TFLOP/s, an
# estimate. Kernels that are not products take about a quarter of a step, and a compiler saves most of those.
WORTH_COMPILING = 9e16


def is_worth_compiling(backbone: "Backbone", images: int) -> bool:
    """Whether training on so many images (of one process, over all epochs) takes long enough for ``compile: null``."""
    weights = sum(parameter.numel() for parameter in backbone.blocks.parameters() if not parameter.requires_grad)
    return 4 * weights * backbone.tokens * images >= WORTH_COMPILING  # 2 forward, 2 for the inputs' gradients


def apply_compile(backbone: "Backbone", *, cpu: bool) -> None:
    """Compile the blocks as one function, for static shapes; without a compiler they run uncompiled."""
    try:
        _try_compiler("cpu" if cpu else str(torch.accelerator.current_accelerator()))
    except Exception as error:  # no C++ compiler, no Triton, no headers: each raises its own error
        reason = _first_line(error)
        backbone.chosen["compile"] = f"warning: no compiler here, blocks run uncompiled ({reason})"
        return
    from torch._dynamo import config as dynamo  # takes seconds to import

    # Of this process: graphs of earlier models count as well, so that each model adds what it may need.
    needed = SHAPES * len(backbone.blocks)
    dynamo.recompile_limit += needed
    dynamo.accumulated_recompile_limit += needed
    dynamo.fail_on_recompile_limit_hit = True
    backbone.run_block = CompiledBlocks(backbone)
    backbone.chosen["compile"] = "each block"
    backbone.compiled = True


class CompiledBlocks:
    """Runs blocks through one compiled function, and uncompiled what cannot be compiled, with a warning."""

    def __init__(self, backbone: "Backbone"):
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        run = backbone.run_block

        def compiled(block: nn.Module, tokens_BND: Tensor) -> Tensor:
            return run(block, tokens_BND)

        self._run, self._compiled = run, torch.compile(compiled, dynamic=False)
        # The compiler's own errors: those of the block, as of a full memory, pass.
        self._errors = (FailOnRecompileLimitHit, TorchDynamoException)
        self._blocks = {block: number for number, block in enumerate(backbone.blocks)}
        self._chosen, self._reporters = backbone.chosen, backbone.reporters
        # By block, shape and gradients: what checkpointing computes again must come from the same kernels.
        self._uncompiled: set[tuple[nn.Module, torch.Size, bool]] = set()

    def __call__(self, block: nn.Module, tokens_BND: Tensor) -> Tensor:
        call = (block, tokens_BND.shape, torch.is_grad_enabled())
        if call in self._uncompiled:
            return self._run(block, tokens_BND)
        try:
            return self._compiled(block, tokens_BND)
        except self._errors as error:
            self._uncompiled.add(call)
            self._report(error)
        return self._run(block, tokens_BND)

    def _report(self, error: Exception) -> None:
        """The result gets all blocks, the log the first."""
        numbers = sorted({self._blocks[block] for block, _, _ in self._uncompiled})
        blocks = f"{'blocks' if len(numbers) > 1 else 'block'} {', '.join(map(str, numbers))} of {len(self._blocks)}"
        limit = isinstance(error, self._errors[0])
        reason = (
            f"more than {torch._dynamo.config.recompile_limit} graphs"
            if limit
            else _first_line(getattr(error, "inner_exception", error))
        )
        self._chosen["compile"] = text = f"warning: {blocks} could not be compiled and run uncompiled ({reason})"
        if len(self._uncompiled) == 1:
            for report in self._reporters or [warnings.warn]:
                report(text)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _try_compiler(device: str) -> None:
    """Compile something tiny. Raises whatever the compiler raises."""
    torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(2, device=device))
