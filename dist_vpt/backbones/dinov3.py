"""DINOv3 at the same seams as a ViT: its blocks turn queries and keys by the place of each patch.

B batch, N tokens, D width, E width of a head.
"""

from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone


class RotaryBackbone(Backbone):
    """timm's Eva with DINOv3's rotary positions, which every block is handed beside its tokens.

    Prefix tokens have no place and are not turned; prompts stand behind them and are not turned either.
    """

    turns: Tensor  # [patches, 2 * E]: sines, then cosines

    def _take_apart(self, eva: Eva) -> None:  # type: ignore[override]
        super()._take_apart(eva)
        self.register_buffer("turns", eva.rope.get_embed(shape=list(eva.patch_embed.grid_size)), persistent=False)
        for block in self.blocks:
            block.register_forward_pre_hook(self._hand_turns, with_kwargs=True)

    def hold_in(self, dtype: torch.dtype) -> "RotaryBackbone":
        """Hold the weights in ``dtype``, and with them the keys' biases, which are fixed at zero."""
        super().hold_in(dtype)
        for module in self.modules():
            if getattr(module, "k_bias", None) is not None:
                module.k_bias = module.k_bias.to(dtype)  # type: ignore[operator]
        return self

    def _hand_turns(
        self, block: nn.Module, inputs: tuple[Tensor], named: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        prompts = inputs[0].shape[1] - self.prefix - self.patches
        sines_PE = self.turns.new_zeros(prompts, self.turns.shape[1] // 2)
        unturned = torch.cat([sines_PE, sines_PE + 1], dim=1)
        return inputs, named | {"rope": torch.cat([unturned, self.turns])}


def is_dinov3(model: nn.Module) -> bool:
    """Whether a timm model is of this kind: Eva has others, which are given positions in other ways."""
    return type(model) is Eva and type(model.rope).__name__ == "RotaryEmbeddingDinoV3"
