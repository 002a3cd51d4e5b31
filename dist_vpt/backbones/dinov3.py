"""A frozen timm DINOv3 in the same parts as a ViT: its blocks rotate queries and keys by each patch's position.

B batch, N tokens, D width, E width of a head.
"""

from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone


class RotaryBackbone(Backbone):
    """timm's Eva with DINOv3's rotary positions, which every block gets beside its tokens.

    Prefix tokens and prompts get no rotary position embedding.
    """

    rotary: Tensor  # [patches, 2 * E]: sines, then cosines

    def _take_apart(self, eva: Eva) -> None:  # type: ignore[override]
        super()._take_apart(eva)
        self.register_buffer("rotary", eva.rope.get_embed(shape=list(eva.patch_embed.grid_size)), persistent=False)
        for block in self.blocks:
            block.register_forward_pre_hook(self._add_rotary, with_kwargs=True)

    def hold_in(self, dtype: torch.dtype) -> "RotaryBackbone":
        """Hold the weights in ``dtype``, and with them the keys' biases, which are fixed at zero."""
        super().hold_in(dtype)
        for module in self.modules():
            if getattr(module, "k_bias", None) is not None:
                module.k_bias = module.k_bias.to(dtype)  # type: ignore[operator]
        return self

    def _add_rotary(
        self, block: nn.Module, inputs: tuple[Tensor], named: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        prompts = inputs[0].shape[1] - self.prefix - self.patches
        sines_PE = self.rotary.new_zeros(prompts, self.rotary.shape[1] // 2)
        unrotated = torch.cat([sines_PE, sines_PE + 1], dim=1)
        return inputs, named | {"rope": torch.cat([unrotated, self.rotary])}


def is_dinov3(model: nn.Module) -> bool:
    """Whether a timm model is a DINOv3: other Evas have other position embeddings."""
    return type(model) is Eva and type(model.rope).__name__ == "RotaryEmbeddingDinoV3"
