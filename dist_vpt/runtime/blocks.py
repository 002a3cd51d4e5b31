"""What all policies wrap: a block that runs on tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:  # workers that load images import this module too, and no model
    pass

RunBlock = Callable[[nn.Module, Tensor], Tensor]  # a block on tokens [B, N, D]


def is_block_weight(tensor: Tensor, block: nn.Module) -> bool:
    """Whether a tensor is a view of the block's weights or of those that a method has hung on it, or one of them."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    address = tensor.untyped_storage()._cdata
    return any(parameter.untyped_storage()._cdata == address for parameter in block.parameters())
