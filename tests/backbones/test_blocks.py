"""Blocks of timm taken apart: by what they compute, whatever attributes timm's version gives them."""

from collections.abc import Callable

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dist_vpt.backbones.blocks import unpack_block
from dist_vpt.errors import UserError


@pytest.fixture
def block(tiny_vit: Callable[..., VisionTransformer]) -> nn.Module:
    return tiny_vit().blocks[1]


def test_a_block_of_a_timm_without_gates_is_unpacked(block: nn.Module) -> None:
    if hasattr(block.attn, "gate"):
        del block.attn.gate
    assert not hasattr(block.attn, "gate")
    parts = unpack_block(block, 1)
    assert parts.projections == (block.attn.qkv,)
    assert parts.mlp is block.mlp


def test_a_block_whose_gate_is_left_out_is_unpacked(block: nn.Module) -> None:
    block.attn.gate = None
    assert unpack_block(block, 1).proj is block.attn.proj


def test_a_gated_block_is_refused(block: nn.Module) -> None:
    block.attn.gate = nn.Linear(8, 8)
    with pytest.raises(UserError, match="block 1 of the backbone is a Block with Attention"):
        unpack_block(block, 1)
