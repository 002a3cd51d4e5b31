"""Tuning the last blocks (the baseline "partial" of VPT's tables, arXiv 2203.12119). A writer.

B batch, S image side, N tokens, D width.
"""

from itertools import islice

import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.methods.base import Method
from dist_vpt.methods.config import PartialConfig


class Partial(Method):
    """The last blocks, and the norms and the pooling after them: float32, computed in the recipe's precision.

    The blocks before run without autograd, with weights in the recipe's precision.
    """

    def __init__(self, recipe: PartialConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        depth = len(backbone.blocks)
        if recipe.blocks > depth:
            raise UserError(f"method.blocks = {recipe.blocks}: the backbone has {depth} blocks; use at most that many")
        self.frozen = depth - recipe.blocks
        after_blocks = [
            module for module in (backbone.norm, backbone.fc_norm, backbone.attn_pool) if module is not None
        ]
        tuned = [*backbone.blocks[self.frozen :], *after_blocks]
        super().__init__(backbone, classes, compute, head=recipe.head, tuned=tuned)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        backbone = self.backbone
        with torch.no_grad():
            tokens_BND = backbone.embed(images_B3SS)
            for block in islice(backbone.blocks, self.frozen):
                tokens_BND = backbone.run_block(block, tokens_BND)
        with self.autocast(images_B3SS.device):
            for block in islice(backbone.blocks, self.frozen, None):
                tokens_BND = backbone.run_block(block, tokens_BND)
            features_BD = backbone.pool(backbone.norm(tokens_BND))
        return self.classify(features_BD)

    def merged(self) -> dict[str, Tensor]:
        return {}
