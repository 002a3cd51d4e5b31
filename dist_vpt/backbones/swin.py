"""A timm SwinTransformer opened at the same seams as a ViT: embed, blocks, norm, pool.

B batch, D width of a stage, I and J rows and columns of patches on a stage's grid.

Its tokens are not one list that every block sees: a block attends within windows (every second one shifted), and
between stages four neighbouring patches are merged into one token of twice the width. So the tokens here are
[B, I, J, D], and D and the grid change from stage to stage.
"""

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from dist_vpt.backbones.backbone import Backbone, Pooling


class SwinBackbone(Backbone):
    """The timm model taken apart into patch embedding, blocks and norm, each still timm's own module.

    Blocks of all stages stand in one list; where a stage begins with merging patches, that belongs to its first block.
    """

    timm_head = "head.fc"

    def _take_apart(self, swin: SwinTransformer) -> None:  # type: ignore[override]
        self.width = swin.num_features
        self.patch_size = swin.patch_embed.patch_size
        self.prefix = 0
        rows, columns = swin.layers[-1].output_resolution
        self.patches = rows * columns  # tokens that are pooled
        blocks: list[nn.Module] = []
        for stage in swin.layers:
            first, *others = stage.blocks
            merges = not isinstance(stage.downsample, nn.Identity)
            blocks += [nn.Sequential(stage.downsample, first) if merges else first, *others]
        self.stem = swin.patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = swin.norm

    def hold_in(self, dtype: torch.dtype) -> "SwinBackbone":
        """Hold the weights in ``dtype``, and with them the masks of shifted windows, which are added to scores."""
        super().hold_in(dtype)
        for module in self.modules():
            if getattr(module, "attn_mask", None) is not None:
                module.attn_mask = module.attn_mask.to(dtype)  # type: ignore[operator]
        return self

    def pool(self, tokens_BIJD: Tensor, pooling: Pooling = "original", prompts: int = 0) -> Tensor:
        """Tokens of the last stage -> their mean, [B, D]: the only pooling that Swin has."""
        assert prompts == 0
        assert pooling in ("original", "img_pool")
        return tokens_BIJD.mean((1, 2))
