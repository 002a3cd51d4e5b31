"""Scaling and shifting features (Lian et al., NeurIPS 2022, arXiv 2210.08823). A writer.

D channels of a module's output.

After every operation of the backbone (patch embedding, linear layers, norms) its output y becomes scale * y + shift, a
trained pair for each channel. Backward keeps y for the scale's gradient. After training, both fold into the weights.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_vpt.backbones.blocks import operations
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.methods.config import SSFConfig
from dist_vpt.methods.hooks import HookedMethod, attach_module, channel_shape, replace_output


class SSF(HookedMethod):
    """Scales (1 at first) and shifts (0 at first) under the names of timm's modules, below ``ssf``."""

    def __init__(self, recipe: SSFConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.ssf = nn.Module()
        for name, module in operations(backbone):
            pair = _ScaleShift(len(module.weight), channel_shape(module))  # type: ignore[arg-type]
            replace_output(module, pair.applied_to)
            attach_module(self.ssf, name, pair)

    def merged(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, operation in operations(self.backbone):
            module, pair = cast(Any, operation), cast(_ScaleShift, self.ssf.get_submodule(name))
            if not isinstance(getattr(module, "bias", None), nn.Parameter):
                raise UserError(f"{name} has no bias for its shift: this run cannot be merged")
            tensors[f"{name}.weight"] = pair.scale.view(-1, *[1] * (module.weight.ndim - 1)) * module.weight
            tensors[f"{name}.bias"] = pair.scale * module.bias + pair.shift
        return tensors


class _ScaleShift(nn.Module):
    def __init__(self, channels: int, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, output: Tensor) -> Tensor:
        scale, shift = (values.to(output.dtype).view(self.shape) for values in (self.scale, self.shift))
        return torch.addcmul(shift, output, scale)

    def applied_to(self, _: Tensor, output: Tensor) -> Tensor:
        return self(output)
