"""DINOv3 in PyTorch, with and without SwiGLU."""

import re

from torch import Tensor

from dist_vpt.backbones.weights.layouts import dinov2
from dist_vpt.backbones.weights.layouts.base import Layout, Shape

LEFT_OUT = rf"{dinov2.LEFT_OUT}|rope_embed\.periods$|local_cls_norm\.|.*\.qkv\.bias(_mask)?$"
_PARTS = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


def _sources(name: str) -> tuple[str, ...]:
    """Of three biases in one, the keys' is fixed at zero; timm's model has the other two, or none."""
    pattern = "|".join(_PARTS)
    return (re.sub(pattern, lambda found: _PARTS[found[0]], re.sub(r"attn\.[qv]_bias", "attn.qkv.bias", name)),)


def _swiglu(name: str) -> tuple[str, ...]:
    """The huge model's MLP is a SwiGLU of three layers."""
    parts = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    return _sources(re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], name))


def _shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [(3 * shape[0],) if name.endswith(("q_bias", "v_bias")) else shape]


def _value(name: str, found: list[Tensor]) -> Tensor:
    if name.endswith(("q_bias", "v_bias")):
        return found[0].chunk(3)[0 if name.endswith("q_bias") else 2]
    return found[0]


DINOV3 = Layout("DINOv3, PyTorch", "vit", LEFT_OUT, _sources, _shapes, _value)
DINOV3_SWIGLU = Layout("DINOv3 with SwiGLU, PyTorch", "vit", LEFT_OUT, _swiglu, _shapes, _value)
