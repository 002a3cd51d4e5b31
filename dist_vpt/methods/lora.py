"""Low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685). A writer.

N tokens, D inputs and O outputs of a linear layer, r rank.

A targeted linear layer gives W x + (alpha / r) B A x, with A [r, D] and B [O, r] trained. Queries, keys and values are
rows of one layer in timm, and each has its own A and B.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.blocks import linear_of
from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.config import LoRAConfig
from dist_vpt.methods.hooks import HookedMethod, Projection, replace_output


class LoRA(HookedMethod):
    """``lora.BLOCK.TARGET.down`` is A, ``up`` is B. B starts at zero, A does not, so that both get gradients."""

    def __init__(self, recipe: LoRAConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.recipe = recipe
        self.lora = nn.ModuleList()
        for number, block in enumerate(backbone.blocks):
            updates = nn.ModuleDict()
            for target in recipe.targets:
                _, linear, rows = linear_of(block, number, target)
                update = _LowRank(recipe, linear.in_features, len(range(linear.out_features)[rows]), rows)
                replace_output(linear, update.added_to)
                updates[target] = update
            self.lora.append(updates)

    def merged(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, (block, updates) in enumerate(zip(self.backbone.blocks, self.lora, strict=True)):
            for target, update in updates.items():  # type: ignore[operator]
                name, linear, rows = linear_of(block, number, target)
                weight_OD = tensors.setdefault(f"{name}.weight", linear.weight.detach().clone())
                weight_OD[rows] += update.scale * update.up.weight.detach() @ update.down.weight.detach()
        return tensors


class _LowRank(nn.Module):
    def __init__(self, recipe: LoRAConfig, inputs: int, outputs: int, rows: slice):
        super().__init__()
        self.scale, self.dropout, self.rows = recipe.alpha / recipe.rank, recipe.dropout, rows
        self.down, self.up = Projection(inputs, recipe.rank, bias=False), Projection(recipe.rank, outputs, bias=False)
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="linear")
        nn.init.zeros_(self.up.weight)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.up(self.down(F.dropout(x_BND, self.dropout, self.training)) * self.scale)

    def added_to(self, x_BND: Tensor, output_BNO: Tensor) -> Tensor:
        # Not in place: a checkpointing policy may keep the layer's output.
        after_rows = output_BNO.shape[-1] - self.rows.stop if self.rows.stop is not None else 0
        return output_BNO + F.pad(self(x_BND), (self.rows.start or 0, after_rows))
