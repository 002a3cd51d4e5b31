"""Adapters (Houlsby et al., ICML 2019, arXiv 1902.00751; Pfeiffer et al., EACL 2021, arXiv 2005.00247). A writer.

N tokens, D width, r bottleneck.

A branch h of a block, right before it joins the stream (after its LayerScale, where there is one), becomes
h + up(gelu(down(h))): both branches of each block with ``houlsby``, only the MLP's with ``pfeiffer``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.blocks import unpack_block
from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.config import AdapterConfig
from dist_vpt.methods.hooks import Bottleneck, HookedMethod, replace_input


class Adapter(HookedMethod):
    """``adapters.BLOCK.attn`` (houlsby) and ``adapters.BLOCK.mlp``, each with down and up; initially zero."""

    def __init__(self, recipe: AdapterConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.adapters = nn.ModuleList()
        for number, block in enumerate(backbone.blocks):
            parts = unpack_block(block, number)
            ends = {"mlp": parts.end2} if recipe.style == "pfeiffer" else {"attn": parts.end1, "mlp": parts.end2}
            adapters = nn.ModuleDict()
            for branch, end in ends.items():
                adapter = _SerialAdapter(backbone.width, recipe.bottleneck, F.gelu)
                replace_input(end, adapter.added_to)
                adapters[branch] = adapter
            self.adapters.append(adapters)


class _SerialAdapter(Bottleneck):
    def added_to(self, branch_BND: Tensor) -> Tensor:
        return branch_BND + self(branch_BND)
