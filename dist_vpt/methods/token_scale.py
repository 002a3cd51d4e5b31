"""Trained tokens as multiples of the scale of the backbone's tokens, so that training does not depend on it.

B batch, S image side, N tokens, D width, L blocks.

A step of AdamW moves every number by about the learning rate. The tokens of pretrained backbones have root mean squares
from 0.07 (DINOv2) to 2 (the demo), and different ones from block to block; a step that is small for one is a jump for
another. So the trained numbers start with a deviation of RAW_STD, and what the blocks see are their products with a
constant ``token_scale``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone

IMAGES = 32  # of which tokens are measured
RAW_STD = 0.1  # with it, a step of 1e-3 is a hundredth of a token


def init_scaled(raw: Tensor, std: float = RAW_STD) -> Tensor:
    """Draw trained tokens, normal with this deviation, which their ``token_scale`` multiplies."""
    return nn.init.normal_(raw, std=std)


@torch.no_grad()
def token_scales(backbone: Backbone, batches: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    """The ``token_scale`` before each of some blocks [L], float32: the root mean square of its tokens, over RAW_STD.

    That of a few images, evenly spread over the batches [B, 3, S, S]: tokens of other images are as large.
    """
    images = torch.cat(list(batches))
    images_B3SS = images[torch.linspace(0, len(images) - 1, min(len(images), IMAGES)).long()]
    found = {n: tokens_BND.float().square().mean().sqrt() for n, tokens_BND in block_inputs(backbone, images_B3SS)}
    return torch.stack([found[number] for number in blocks]) / RAW_STD


def block_inputs(backbone: Backbone, images_B3SS: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Number of each block, and the tokens [B, N, D] that enter it."""
    tokens_BND = backbone.embed(images_B3SS)
    for number, block in enumerate(backbone.blocks):
        yield number, tokens_BND
        tokens_BND = backbone.run_block(block, tokens_BND)
