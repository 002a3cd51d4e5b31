"""Maps of a method's attention: of the class token, and of each prompt or query, to the image's patches.

B images, L blocks, H heads, N tokens, R tokens whose attention is shown, Q queries, M patches, D width, E = D / H.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_vpt.backbones.blocks import unpack_block, widened
from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamSpec, compute_stream
from dist_vpt.methods.base import Method
from dist_vpt.methods.vqt import VQT

ONLY = "attention can be drawn of runs on such backbones alone"


@dataclass(frozen=True)
class Attention:
    """Weights of the patches in the softmax over all tokens, [B, H, R, M] for each block, float32."""

    class_token: list[Tensor]  # R = 1: of the class token, or without one the mean over the patches
    prompts: list[Tensor]  # of each prompt or query; R = 0 in a block without any
    names: tuple[str, str]  # of the token and of a prompt, in file names and titles


@torch.no_grad()
def attend(method: Method, images_B3SS: Tensor) -> Attention:
    """Run a method whose kernel is eager on images. Raises UserError for blocks that cannot be unpacked."""
    backbone = method.backbone
    with _matrices(backbone) as found:
        if isinstance(method, VQT):
            prompts = _queries(method, images_B3SS)
        else:
            method(images_B3SS)
            prompts = [weights_BHNN[:, :, backbone.prefix : -backbone.patches] for weights_BHNN in found]
    has_class = backbone.stem.cls_token is not None
    rows = [weights[:, :, :1] if has_class else weights[:, :, -backbone.patches :].mean(2, True) for weights in found]
    return Attention(
        [weights[..., -backbone.patches :] for weights in rows],
        [weights[..., -backbone.patches :] for weights in prompts],
        ("class" if has_class else "patches", "query" if isinstance(method, VQT) else "prompt"),
    )


def joined(found: Sequence[Attention]) -> Attention:
    """The maps of several batches of images as those of one."""
    class_token = [torch.cat(maps) for maps in zip(*(each.class_token for each in found), strict=True)]
    prompts = [torch.cat(maps) for maps in zip(*(each.prompts for each in found), strict=True)]
    return Attention(class_token, prompts, found[0].names)


@contextmanager
def _matrices(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Collect the attention matrices [B, H, N, N] of all blocks that run inside the context."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(widened(inputs[0]))

    for number, block in enumerate(backbone.blocks):
        unpack_block(block, number, ONLY)
    hooks = [block.attn.attn_drop.register_forward_pre_hook(keep) for block in backbone.blocks]  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _queries(method: VQT, images_B3SS: Tensor) -> list[Tensor]:
    """Attention of VQT's queries to the image's tokens, [B, H, Q, N] of each block; Q = 0 in a block without any."""
    backbone = method.backbone
    stream = compute_stream(backbone, images_B3SS, StreamSpec(method.blocks, keys=True))
    found: list[Tensor] = []
    for number, block in enumerate(backbone.blocks):
        parts = unpack_block(block, number)
        if number not in method.blocks:
            found.append(torch.zeros(len(images_B3SS), parts.heads, 0, backbone.tokens, device=images_B3SS.device))
            continue
        i = method.blocks.index(number)
        z_QD = method.scaled_queries[i].to(backbone.dtype)
        q_QHE = parts.q_norm(parts.project(0, parts.norm1(z_QD))) * parts.scale
        scores_BHQN = q_QHE.transpose(0, 1) @ stream.keys[i].transpose(2, 3)
        found.append(widened(scores_BHQN).softmax(-1))
    return found
