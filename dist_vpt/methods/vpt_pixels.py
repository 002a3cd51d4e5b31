"""Visual Prompt Tuning with prompts that are pixels: prepended patches, a frame around the image, further channels.

B batch, N tokens, P prompts, D width, R prefix tokens, G side of a patch in pixels, X numbers of a prompt, S image
side, T side of an image with a frame, I and J rows and columns of patches.
"""

import math

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.config import VPTConfig
from dist_vpt.methods.hooks import replace_output
from dist_vpt.methods.vpt import VPT


class PatchVPT(VPT):
    """Patches of pixels [1, P, 3 G G], embedded by the backbone's own patch embedding and prepended."""

    def _shape(self, width: int) -> tuple[int, int]:
        return self.recipe.prompts, 3 * math.prod(self.backbone.patch_size)

    def _embedded(self, prompts_PX: Tensor) -> Tensor:
        embed, side = self.backbone.stem.patch_embed, self.backbone.patch_size
        patches_P3GG = prompts_PX.to(self.backbone.dtype).unflatten(1, (3, *side))
        return embed.norm(embed.proj(patches_P3GG).flatten(1))


class FrameVPT(VPT):
    """A frame of pixels [1, 3, 4 P (T - P)] around the image, P pixels wide."""

    def _schedule(self, blocks: int) -> dict[int, int]:
        return {}

    def _shape(self, width: int) -> tuple[int, int]:
        return 3, 4 * self.recipe.prompts * (self.backbone.image_size - self.recipe.prompts)

    def _init_range(self, width: int) -> tuple[float, float]:
        return 0.0, 1.0  # any color

    def prompted_images(self, images_B3SS: Tensor) -> Tensor:
        """Images with the frame around them, [B, 3, T, T]."""
        size, width = images_B3SS.shape[-1], self.recipe.prompts
        frame_B3X = 255 * self._per_image(self.prompts[0], images_B3SS.shape[0])
        row, column = width * (size + 2 * width), width * size
        top, left, right, bottom = frame_B3X.split([row, column, column, row], dim=2)
        left, right = left.unflatten(2, (size, width)), right.unflatten(2, (size, width))
        middle_B3ST = torch.cat([left, images_B3SS.to(frame_B3X.dtype), right], dim=3)
        return torch.cat([top.unflatten(2, (width, -1)), middle_B3ST, bottom.unflatten(2, (width, -1))], dim=2)


class ChannelVPT(VPT):
    """P further channels of the image, patch by patch [1, N - R, P G G], with a trained embedding of their own."""

    def __init__(self, recipe: VPTConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(recipe, backbone, classes, compute)
        replace_output(backbone.stem.patch_embed.proj, self._with_channels)

    def _schedule(self, blocks: int) -> dict[int, int]:
        return {}

    def _shape(self, width: int) -> tuple[int, int]:
        return self.backbone.patches, self.recipe.prompts * math.prod(self.backbone.patch_size)

    def _projection(self) -> nn.Module:
        return self._linear_projection()

    def _with_channels(self, _: Tensor, patches_BDIJ: Tensor) -> Tensor:
        """Embedded patches, plus the embedding of their further channels."""
        further_BND = self._per_image(self.projection(self.prompts[0]), patches_BDIJ.shape[0])
        return patches_BDIJ + further_BND.transpose(1, 2).to(patches_BDIJ.dtype).view(patches_BDIJ.shape)
