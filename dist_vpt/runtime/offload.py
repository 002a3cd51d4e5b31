"""Activations kept in host memory between forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dist_vpt.runtime.blocks import RunBlock, is_block_weight

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

PutAway = Callable[[Tensor], Callable[[], Tensor]]


def apply_offload(backbone: "Backbone", put_away: PutAway | None = None) -> None:
    """Move what blocks keep for backward to host memory until it is used; weights stay on the device.

    ``put_away`` stores a tensor and returns a function that brings it back; by default, host memory.
    """
    backbone.run_block = partial(_offloaded, put_away or _to_host, backbone.run_block)


def _offloaded(put_away: PutAway, run: RunBlock, block: nn.Module, tokens_BND: Tensor) -> Tensor:
    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return tensor if is_block_weight(tensor, block) else put_away(tensor)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        return run(block, tokens_BND)


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    # With its strides: what selective checkpointing returns must have the same layout.
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return partial(host.copy_(tensor).to, tensor.device)
