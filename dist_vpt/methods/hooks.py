"""Tools of methods that act inside a frozen backbone: small trained modules, run by hooks on timm's modules.

B batch, S image side, N tokens, D width, r width of a bottleneck.

The backbone's modules and their names stay timm's. A hook runs whenever its module is called, also when activation
checkpointing recomputes it, and calls the small module, at which ZeRO-3 gathers its parameters. Trained tensors are
float32 and are cast where they are used: activations keep their dtype, and gradients accumulate in float32.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.methods.base import Method


class HookedMethod(Method):
    """A writer that runs the backbone unchanged: all that it adds is attached to the backbone's modules."""

    def forward(self, images_B3SS: Tensor) -> Tensor:
        return self.classify(self.backbone.pool(self.backbone(images_B3SS)))


def replace_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """From now on ``change(input, output)`` replaces the output of a module."""
    module.register_forward_hook(lambda _, inputs, output: change(inputs[0], output))


def replace_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """From now on ``change(input)`` replaces the input of a module."""
    module.register_forward_pre_hook(lambda _, inputs: change(inputs[0]))


def attach_module(tree: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a tree of empty ones, so that its tensors get timm's names."""
    *branches, leaf = name.split(".")
    for branch in branches:
        if branch not in tree._modules:
            tree.add_module(branch, nn.Module())
        tree = tree.get_submodule(branch)
    tree.add_module(leaf, module)


def channel_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape in which one number per output channel broadcasts to a module's output."""
    return (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)


class Projection(nn.Linear):
    """A linear layer whose float32 weights are cast to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Bottleneck(nn.Module):
    """up(activation(down(x))). Only ``up`` starts at zero: if both did, neither would get a gradient."""

    def __init__(self, width: int, bottleneck: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.down, self.up = Projection(width, bottleneck), Projection(bottleneck, width)
        self.activation = activation
        nn.init.kaiming_normal_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x_BND)))
