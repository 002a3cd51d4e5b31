"""A frozen timm SwinTransformer in the same parts as a ViT: embed, blocks, norm, pool.

B batch, N tokens, P prompts, D width of a stage, I and J rows and columns of patches on a stage's grid, W windows,
M patches of a window.

Between blocks the tokens are a list as in a ViT, [B, N, D]: prompts, if there are any, then the patches of the grid,
row by row. What a block does with the list changes from stage to stage: it attends within windows of the grid (every
second one of a shifted grid), and at the end of a stage four neighboring patches become one of twice the width.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import global_pool_nlc
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone


class SwinBackbone(Backbone):
    """The timm model taken apart into patch embedding, blocks and norm, each still timm's own module.

    Blocks of all stages are in one list; merging patches belongs to the last block of a stage, and drops prompts.
    """

    def _take_apart(self, swin: SwinTransformer) -> None:  # type: ignore[override]
        self.width = swin.num_features
        self.image_size = swin.patch_embed.img_size[0]
        self.patch_size = swin.patch_embed.patch_size
        self.prefix = self.pool_skips = 0
        rows, columns = swin.layers[-1].output_resolution
        self.patches = rows * columns  # tokens that are pooled
        self.own_pool = partial(global_pool_nlc, pool_type="avg", num_prefix_tokens=0)
        for stage, following in pairwise(swin.layers):
            stage.blocks[-1].downsample = following.downsample
        self.stem = swin.patch_embed
        self.blocks = nn.Sequential(*(block for stage in swin.layers for block in stage.blocks))
        self.positions = [(number, block) for number, stage in enumerate(swin.layers) for block in range(stage.depth)]
        self.widths = [block.dim for block in self.blocks]
        for block in self.blocks:
            _Windows(block)
        self.norm, self.fc_norm, self.attn_pool = swin.norm, nn.Identity(), None

    def timm_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        if part != "blocks":
            return {"stem": "patch_embed", "head": "head.fc"}.get(part, part) + f".{rest}"
        number, _, rest = rest.partition(".")
        stage, block = self.positions[int(number)]
        if rest.startswith("downsample"):  # timm merges patches at the beginning of a stage
            return f"layers.{stage + 1}.{rest}"
        return f"layers.{stage}.blocks.{block}.{rest}"

    def hold_in(self, dtype: torch.dtype) -> "SwinBackbone":
        """Hold the weights in ``dtype``, and with them the masks of shifted windows, which are added to scores."""
        super().hold_in(dtype)
        for module in self.modules():
            if getattr(module, "attn_mask", None) is not None:
                module.attn_mask = module.attn_mask.to(dtype)  # type: ignore[operator]
        return self

    def embed(self, images_B3SS: Tensor) -> Tensor:
        """Images as uint8 (or floats of the same range) -> patches before the first block, [B, N, D]."""
        return super().embed(images_B3SS).flatten(1, 2)


class _Windows:
    """Wraps a timm block so that it takes a list of tokens.

    A block treats tokens one by one except in its attention, so it gets the list as a grid of one row; attention gets
    the patches' grid. Prompts join the patches of every window there, without a relative position and seen by all, and
    leave as the mean over the windows.
    """

    def __init__(self, block: Any):
        self.grid = block.input_resolution  # I, J
        self.patches = self.grid[0] * self.grid[1]
        self.prompts_BPD: Tensor | None = None  # on their way into the windows and out of them
        self.attend, self.bias = block._attn, block.attn._get_rel_pos_bias
        block._attn, block.attn._get_rel_pos_bias = self._attended, self._bias_with_prompts
        block.attn.register_forward_pre_hook(self._into_windows, with_kwargs=True)
        block.attn.register_forward_hook(self._out_of_windows)
        block.register_forward_pre_hook(lambda _, inputs: inputs[0].unsqueeze(1))
        block.register_forward_hook(self._end)

    def _end(self, block: nn.Module, _: Any, tokens_B1ND: Tensor) -> Tensor:
        tokens_BND = tokens_B1ND.squeeze(1)
        merge: Any = getattr(block, "downsample", None)
        if merge is None:
            return tokens_BND
        return merge(tokens_BND[:, -self.patches :].unflatten(1, self.grid)).flatten(1, 2)

    def _attended(self, normed_B1ND: Tensor) -> Tensor:
        prompts_BPD, patches_BND = normed_B1ND.squeeze(1).tensor_split([normed_B1ND.shape[2] - self.patches], dim=1)
        self.prompts_BPD = prompts_BPD if prompts_BPD.shape[1] else None
        attended_BND = self.attend(patches_BND.unflatten(1, self.grid)).flatten(1, 2)
        if self.prompts_BPD is not None:
            attended_BND = torch.cat([self.prompts_BPD, attended_BND], dim=1)
            self.prompts_BPD = None
        return attended_BND.unsqueeze(1)

    def _into_windows(self, _: nn.Module, inputs: tuple[Tensor], named: dict[str, Any]) -> Any:
        if self.prompts_BPD is None:
            return None
        windows_XMD = inputs[0]  # X = B * W, the windows of an image one after the other
        prompts_XPD = self.prompts_BPD.repeat_interleave(windows_XMD.shape[0] // self.prompts_BPD.shape[0], dim=0)
        mask = named["mask"]
        return (torch.cat([prompts_XPD, windows_XMD], dim=1),), {"mask": mask if mask is None else self._padded(mask)}

    def _out_of_windows(self, _: nn.Module, inputs: tuple[Tensor], attended_XMD: Tensor) -> Tensor | None:
        if self.prompts_BPD is None:
            return None
        images, prompts = self.prompts_BPD.shape[:2]
        self.prompts_BPD = attended_XMD[:, :prompts].unflatten(0, (images, -1)).mean(1)
        return attended_XMD[:, prompts:]

    def _bias_with_prompts(self) -> Tensor:
        return self.bias() if self.prompts_BPD is None else self._padded(self.bias())

    def _padded(self, scores: Tensor) -> Tensor:
        """Pad a bias or mask of scores [..., M, M] with zeros from and to prompts: [..., P + M, P + M]."""
        assert self.prompts_BPD is not None
        return F.pad(scores, (prompts := self.prompts_BPD.shape[1], 0, prompts, 0))
