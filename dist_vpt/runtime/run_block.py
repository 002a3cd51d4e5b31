"""RunBlock, the function on a block and its tokens that all policies wrap."""

from collections.abc import Callable

from torch import Tensor, nn

RunBlock = Callable[[nn.Module, Tensor], Tensor]  # a block on tokens [B, N, D]


def is_block_weight(tensor: Tensor, block: nn.Module) -> bool:
    """Whether a tensor is a weight of the block or of what a method attached to it, or a view of one."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    address = tensor.untyped_storage()._cdata
    return any(parameter.untyped_storage()._cdata == address for parameter in block.parameters())
