"""AdaptFormer (Chen et al., NeurIPS 2022, arXiv 2205.13535). A writer.

N tokens, D width, r bottleneck.

Beside each block's MLP a bottleneck reads the same x' of the stream, before the MLP's norm (as the published code
does; so backward keeps nothing that it would not keep for the norm):

    x'' = x' + ls2(mlp(norm2(x'))) + scale * up(relu(down(x')))
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.blocks import BlockParts, unpack_block
from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.config import AdaptFormerConfig
from dist_vpt.methods.hooks import Bottleneck, HookedMethod, replace_input, replace_output


class AdaptFormer(HookedMethod):
    """``adapters.BLOCK``, each with down and up; their initial output is zero."""

    def __init__(self, recipe: AdaptFormerConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.adapters = nn.ModuleList()
        for number, block in enumerate(backbone.blocks):
            adapter = _ParallelAdapter(backbone.width, recipe.bottleneck, recipe.scale)
            adapter.attach_to(unpack_block(block, number))
            self.adapters.append(adapter)


class _ParallelAdapter(Bottleneck):
    def __init__(self, width: int, bottleneck: int, scale: float):
        super().__init__(width, bottleneck, F.relu)
        self.scale = scale
        self.read: Tensor | None = None  # x', from the beginning of the MLP's branch to its end

    def attach_to(self, parts: BlockParts) -> None:
        """Read at the beginning of the MLP's branch, write at its end."""
        replace_output(parts.norm2, self._begin)
        replace_input(parts.end2, self._end)

    def _begin(self, x_BND: Tensor, normed_BND: Tensor) -> Tensor:
        self.read = x_BND
        return normed_BND

    def _end(self, branch_BND: Tensor) -> Tensor:
        x_BND, self.read = self.read, None
        assert x_BND is not None
        return torch.add(branch_BND, self(x_BND), alpha=self.scale)
