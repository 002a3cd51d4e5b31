"""Tuning the class token (the baseline "cls" of VPT's code, arXiv 2203.12119). A writer.

B batch, N tokens, D width.
"""

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.methods.config import ClsConfig
from dist_vpt.methods.hooks import HookedMethod


class Cls(HookedMethod):
    """One trained token, ``class_token.token`` [1, 1, D], before the first block."""

    def __init__(self, recipe: ClsConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        class_token = ClassToken(backbone, reinit=recipe.reinit)
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.class_token = class_token

    def merged(self) -> dict[str, Tensor]:
        return {"cls_token": self.class_token.token}


class ClassToken(nn.Module):
    """Replaces a float32 backbone's class token. It starts at the token's values, or (``reinit``) as in timm: normal
    with a standard deviation of 1e-6.
    """

    position: Tensor

    def __init__(self, backbone: Backbone, *, reinit: bool = False):
        super().__init__()
        stem = backbone.stem
        if stem.cls_token is None:
            raise UserError("the backbone has no class token that could be tuned; choose another method or backbone")
        self.token = nn.Parameter(stem.cls_token.detach().clone())
        if reinit:
            nn.init.normal_(self.token, std=1e-6)
        placed = stem.pos_embed is not None and not stem.no_embed_class
        position_11D = stem.pos_embed[:, :1].detach().clone() if placed else torch.zeros_like(stem.cls_token)
        self.register_buffer("position", position_11D, persistent=False)  # its embedding, added to the token
        # The last call before the blocks, even if an identity: positions are added, nothing is normalized yet.
        stem.norm_pre.register_forward_pre_hook(lambda _, inputs: self(inputs[0]))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        token_11D = (self.token + self.position).to(tokens_BND.dtype)
        return torch.cat([token_11D.expand(tokens_BND.shape[0], -1, -1), tokens_BND[:, 1:]], dim=1)
