"""A frozen timm VisionTransformer in parts: embed, blocks, norm, pool.

B batch, S image side in pixels, N tokens (prefix tokens, then patches), R prefix tokens (class and registers),
P prompts, D width, L blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import global_pool_nlc
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dist_vpt.backbones.products import take_over_linears

Pooling = str  # "original" | "img_pool" | "prompt_pool" | "imgprompt_pool"


def _call(block: nn.Module, tokens_BND: Tensor) -> Tensor:
    return block(tokens_BND)


class Backbone(nn.Module):
    """The timm model taken apart into stem, blocks and norm, each still timm's own module.

    The stem is the model itself with its blocks, norm and pooling taken out, so that whatever timm does between
    pixels and the first block (class token, registers, position embedding, pre-norm) is timm's, and runs through
    the module's own call (which is what DeepSpeed's ZeRO-3 gathers sharded weights at).
    """

    mean: Tensor
    std: Tensor
    rotary: Tensor | None  # of the patches, [patches, 2 * E]: sines, then cosines; None: blocks rotate nothing

    def __init__(self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], stochastic: bool):
        super().__init__()
        self.group_matcher: Any = model.group_matcher(coarse=False)  # type: ignore[operator]  # timm's layers
        take_over_linears(model)
        self._take_apart(model)
        self.stochastic = stochastic
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        # Kernels and memory policies (runtime/) wrap this call from outside; blocks are never run in another way.
        self.run_block: Callable[[nn.Module, Tensor], Tensor] = _call
        self.chosen: dict[str, str] = {}  # what they chose, for the log and the result
        self.compiled = False  # by runtime/compile.py, for static shapes: batches of one size save graphs
        self.reporters: list[Callable[[str], None]] = []  # of warnings that come up while blocks run
        self.train(False)

    def _take_apart(self, vit: VisionTransformer) -> None:
        self.width = vit.embed_dim
        self.image_size = vit.patch_embed.img_size[0]
        self.patch_size = vit.patch_embed.patch_size
        self.prefix = vit.num_prefix_tokens
        self.patches = vit.patch_embed.num_patches
        self.own_pool = partial(
            global_pool_nlc, pool_type=vit.global_pool, num_prefix_tokens=self.prefix,
            reduce_include_prefix=getattr(vit, "pool_include_prefix", False),
        )  # fmt: skip
        self.pool_skips = 0 if getattr(vit, "pool_include_prefix", False) else self.prefix
        self.blocks, vit.blocks = vit.blocks, nn.Sequential()
        self.widths = [self.width] * len(self.blocks)  # of the tokens that each block sees
        self.norm, vit.norm = vit.norm, nn.Identity()
        self.fc_norm, vit.fc_norm = vit.fc_norm, nn.Identity()
        self.attn_pool, vit.attn_pool = vit.attn_pool, None
        vit.head, vit.global_pool = nn.Identity(), ""
        self.register_buffer("rotary", None, persistent=False)
        self.stem = vit

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode (no dropout, no stochastic depth) unless the recipe sets stochastic depth."""
        return super().train(mode and self.stochastic)

    @property
    def members(self) -> "list[Backbone]":
        """The backbones that it is made of: itself, unless it is a group."""
        return [self]

    def timm_name(self, name: str) -> str:
        """timm's name of a tensor of this module, or of the head."""
        return name.removeprefix("stem.")

    def hold_in(self, dtype: torch.dtype) -> "Backbone":
        """Hold the frozen weights in ``dtype``; mean and std stay float32, in which pixels are normalized."""
        for parameter in self.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return self

    @property
    def tokens(self) -> int:
        """N: tokens of an image without prompts."""
        return self.prefix + self.patches

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens that enter the first block."""
        return next(self.stem.parameters()).dtype

    def normalized(self, images_B3SS: Tensor) -> Tensor:
        """Images as uint8 (or floats of the same range) normalized, [B, 3, S, S], in float32 at any precision."""
        # bf16 has 8 bits, so that x - mean would lose detail.
        return (images_B3SS.to(self.mean.dtype) - self.mean) / self.std

    def embed(self, images_B3SS: Tensor) -> Tensor:
        """Images as uint8 (or floats of the same range) -> tokens before the first block, [B, N, D]."""
        return self.stem(self.normalized(images_B3SS).to(self.dtype))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """The frozen stream's end: tokens after the final norm, [B, N, D]."""
        tokens_BND = self.embed(images_B3SS)
        for block in self.blocks:
            tokens_BND = self.run_block(block, tokens_BND)
        return self.norm(tokens_BND)

    def pool(self, tokens_BND: Tensor, pooling: Pooling = "original", prompts: int = 0) -> Tensor:
        """Tokens [B, R + P + patches, D] -> features [B, D].

        ``original`` is the weights' own pooling, with prompts excluded from a mean; the others are means over
        the image's patches, over the prompts, and over both (VPT, arXiv 2203.12119, section 4.3 and appendix B).
        """
        end = self.prefix + prompts
        if pooling == "img_pool":
            pooled_BD = tokens_BND[:, end:].mean(1)
        elif pooling == "prompt_pool":
            pooled_BD = tokens_BND[:, self.prefix : end].mean(1)
        elif pooling == "imgprompt_pool":
            pooled_BD = tokens_BND[:, self.prefix :].mean(1)
        else:
            if prompts:
                tokens_BND = torch.cat([tokens_BND[:, : self.prefix], tokens_BND[:, end:]], dim=1)
            if self.attn_pool is None:
                pooled_BD = self.own_pool(tokens_BND)
            else:
                pooled_BD = self.attn_pool(tokens_BND[:, self.pool_skips :])
        return self.fc_norm(pooled_BD)
