"""The frozen stream: what readers see of a frozen backbone, block by block, computed without autograd.

B images, S image side, N tokens, D width, H heads, E = D / H.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vpt.backbones.blocks import key_scale, keys_and_values, unpack_block, widened
from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.config import StreamDtype


@dataclass(frozen=True)
class StreamSpec:
    """The tensors of the stream that a reader needs besides the pooled features."""

    blocks: tuple[int, ...] = ()  # whose normalized inputs it reads, ascending
    key_scales: bool = False  # and the scale that qk-norm gives to each of their keys
    keys: bool = False  # keys and values in place of the two: twice the bytes, and nothing left to project
    pixels: bool = False  # and the image itself
    states: tuple[int, ...] = ()  # tokens between the blocks: 0 are those that enter block 0, n leave block n - 1
    patches_only: bool = False  # of the states no class token and no registers
    summed: bool = False  # of the states their sum alone, in which no state's tokens are larger than another's
    dtype: StreamDtype = "precision"  # in which a cache keeps what there is of each block

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The fields of StreamOutput that hold a tensor for each of some blocks or states, and their numbers.

        A sum has the number of its first state.
        """
        fields = ("keys", "values") if self.keys else ("normed", "key_scales") if self.key_scales else ("normed",)
        found = dict.fromkeys(fields, self.blocks) if self.blocks else {}
        return found | ({"states": self.states[:1] if self.summed else self.states} if self.states else {})


class StreamOutput(NamedTuple):
    """The frozen stream of a batch of images, in the backbone's dtype (pixels in float32)."""

    pooled: Tensor  # [B, D]: the weights' own pooling of the last block's normalized tokens
    normed: tuple[Tensor, ...] = ()  # [B, N, D] for each block that is read: what its attention sees
    key_scales: tuple[Tensor, ...] = ()  # [B, N, H] for each of them; empty unless asked for
    keys: tuple[Tensor, ...] = ()  # [B, H, N, E], and of values, in place of the two above where asked for
    values: tuple[Tensor, ...] = ()
    pixels: tuple[Tensor, ...] = ()  # [B, 3, S, S], normalized, float32, alone; empty unless asked for
    # [B, N, D], or of patches alone [B, N - prefix tokens, D], for each that is read, or one that is their sum
    states: tuple[Tensor, ...] = ()


@torch.no_grad()
def compute_stream(backbone: Backbone, images_B3SS: Tensor, spec: StreamSpec) -> StreamOutput:
    """Run the frozen backbone on images (uint8 [B, 3, S, S]) and keep what the spec asks for.

    Before tokens are summed, each is brought to mean 0 and deviation 1, in float32. This is our choice: in DINOv2,
    those that leave the last block are forty times larger than those of the first ones, which a plain sum would lose.
    """
    tokens_BND = backbone.embed(images_B3SS)
    normed, scales, keys, values = [], [], [], []
    states = list[Tensor]()
    skipped = backbone.prefix if spec.patches_only else 0

    def keep_state(number: int) -> None:
        if number not in spec.states:
            return
        state_BND = tokens_BND[:, skipped:]
        if spec.summed:
            wide_BND = widened(state_BND)
            unit_BND = F.layer_norm(wide_BND, wide_BND.shape[-1:], eps=1e-12)
            state_BND = states.pop().add_(unit_BND) if states else unit_BND
        states.append(state_BND)

    keep_state(0)
    for number, block in enumerate(backbone.blocks):
        if number in spec.blocks:
            parts = unpack_block(block, number)
            normed_BND = parts.norm1(tokens_BND)
            if spec.keys:
                keys_BHNE, values_BHNE = keys_and_values(parts, normed_BND, backbone.rotary)
                keys.append(keys_BHNE)
                values.append(values_BHNE)
            else:
                normed.append(normed_BND)
                if spec.key_scales:
                    scales.append(key_scale(parts, normed_BND))
        tokens_BND = backbone.run_block(block, tokens_BND)
        keep_state(number + 1)
    pooled_BD = backbone.pool(backbone.norm(tokens_BND))
    pixels = (backbone.normalized(images_B3SS),) if spec.pixels else ()
    of_states = tuple(state_BND.to(tokens_BND.dtype) for state_BND in states)
    return StreamOutput(pooled_BD, tuple(normed), tuple(scales), tuple(keys), tuple(values), pixels, of_states)
