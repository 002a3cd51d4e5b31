"""Activations kept in host memory between forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dist_vpt.runtime.run_block import RunBlock, is_block_weight

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

Offload = Callable[[Tensor], Callable[[], Tensor]]


def apply_offload(backbone: "Backbone", offload: Offload | None = None) -> None:
    """Move what blocks keep for backward to host memory until it is used; weights stay on the device.

    ``offload`` stores a tensor and returns a function that brings it back; by default, host memory.
    """
    backbone.run_block = partial(_offloaded, offload or _to_host, backbone.run_block)


def _offloaded(offload: Offload, run: RunBlock, block: nn.Module, tokens_BND: Tensor) -> Tensor:
    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return tensor if is_block_weight(tensor, block) else offload(tensor)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        return run(block, tokens_BND)


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    # With its strides: what selective checkpointing returns must have the same layout.
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return partial(host.copy_(tensor).to, tensor.device)
