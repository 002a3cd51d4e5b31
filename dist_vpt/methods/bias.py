"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199), the baseline "bias" of VPT's tables. A writer.

D channels of a module's output.

It trains all biases of the backbone, as in VPT's baseline: those of the blocks, of the patch embedding and of the
norms before and after the blocks, and of the attention pooling where there is one.
"""

import torch
from torch import Tensor, nn

from dist_vpt.backbones.blocks import SplitBiasLinear, joint_bias, operations
from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.config import BiasConfig
from dist_vpt.methods.hooks import HookedMethod, attach_module, channel_shape, replace_output


class Bias(HookedMethod):
    """Float32 biases under timm's names, below ``biases``."""

    def __init__(self, recipe: BiasConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        biases = Biases(backbone)
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.biases = biases

    def merged(self) -> dict[str, Tensor]:
        return {self.backbone.timm_name(name): bias_D for name, bias_D in self.biases.named_parameters()}


class Biases(nn.Module):
    """Replaces every bias of a float32 backbone by a trained one that starts at its values.

    Added to a frozen bias in bf16, a small trained difference would be rounded away. The addition keeps nothing for
    backward.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        for name, module in operations(backbone):
            bias_D = getattr(module, "bias", None)
            if isinstance(module, SplitBiasLinear):
                if module.q_bias is None or module.v_bias is None:
                    continue
                shift: _Shift = _SplitShift(module.q_bias, module.v_bias)
                module.q_bias = module.v_bias = None
            elif isinstance(bias_D, nn.Parameter):
                shift = _OneShift(bias_D, channel_shape(module))
                module.register_parameter("bias", None)
            else:
                continue
            replace_output(module, shift.added_to)
            attach_module(self, name, shift)


class _Shift(nn.Module):
    def added_to(self, _: Tensor, output: Tensor) -> Tensor:
        return self(output)


class _OneShift(_Shift):
    def __init__(self, bias_D: Tensor, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.bias = nn.Parameter(bias_D.detach().clone())

    def forward(self, output: Tensor) -> Tensor:
        return output + self.bias.to(output.dtype).view(self.shape)


class _SplitShift(_Shift):
    """Of queries and values in one layer; keys have no bias, and get none."""

    def __init__(self, q_bias_E: Tensor, v_bias_E: Tensor):
        super().__init__()
        self.q_bias, self.v_bias = (nn.Parameter(bias_E.detach().clone()) for bias_E in (q_bias_E, v_bias_E))

    def forward(self, output: Tensor) -> Tensor:
        return output + joint_bias(self.q_bias, self.v_bias).to(output.dtype)
