"""A frozen timm Eva in the same parts as a ViT: EVA, EVA-02, DINOv3, the Perception Encoder and others.

B batch, N tokens, D width, H heads, E width of a head, L blocks.

In most of them blocks rotate queries and keys by each patch's position.
"""

from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from dist_vpt.backbones.blocks import SplitBiasLinear
from dist_vpt.backbones.vit import Backbone


class EvaBackbone(Backbone):
    """timm's Eva, whose blocks get rotary positions beside their tokens.

    Prefix tokens and prompts get no rotary position embedding.
    """

    def _take_apart(self, eva: Eva) -> None:  # type: ignore[override]
        super()._take_apart(eva)
        self.pool_skips = 0  # its attention pooling reads the prefix tokens too
        if eva.rope is not None:
            self.rotary = eva.rope.get_embed(shape=list(eva.patch_embed.grid_size))
        for block in self.blocks:
            _join_biases(block.attn)
            if eva.rope is not None:
                block.register_forward_pre_hook(self._add_rotary, with_kwargs=True)

    def timm_name(self, name: str) -> str:
        """timm's name of a tensor of this module, or of the head."""
        for bias in ("q_bias", "v_bias"):
            name = name.replace(f".attn.qkv.{bias}", f".attn.{bias}")
        return super().timm_name(name)

    def _add_rotary(
        self, block: nn.Module, inputs: tuple[Tensor], named: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        assert self.rotary is not None
        prompts = inputs[0].shape[1] - self.prefix - self.patches
        sines_PE = self.rotary.new_zeros(prompts, self.rotary.shape[1] // 2)
        unrotated = torch.cat([sines_PE, sines_PE + 1], dim=1)
        return inputs, named | {"rope": torch.cat([unrotated, self.rotary])}


def _join_biases(attn: Any) -> None:
    """Give the layer of queries, keys and values their biases, so that the attention calls it."""
    if getattr(attn, "q_bias", None) is not None:
        attn.qkv = SplitBiasLinear(attn.qkv, attn.q_bias, attn.v_bias)
        attn.q_bias = attn.k_bias = attn.v_bias = None


def learns_rotary(eva: Eva) -> bool:
    """Whether the rotary positions are weights, other ones in each block."""
    return eva.rope is not None and any(True for _ in eva.rope.parameters())
