"""DINOv2 in PyTorch, with and without registers and SwiGLU."""

from collections.abc import Callable

from torch import Tensor

from dist_vpt.backbones.weights.layouts.base import CLASSIFIER, Layout, Shape, same_name

LEFT_OUT = rf"{CLASSIFIER}|mask_token$"


def _swiglu(name: str) -> tuple[str, ...]:
    """The giant model's MLP is a SwiGLU, whose layers have other names."""
    return (name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"),)


def _registers(of: Callable[[str], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    """The file gives the class token a position; timm's model has none there: it is added to the token."""

    def sources(name: str) -> tuple[str, ...]:
        return {"reg_token": ("register_tokens",), "cls_token": ("cls_token", "pos_embed")}.get(name) or of(name)

    return sources


def _registers_shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [shape, None] if name == "cls_token" else [shape]


def _registers_value(name: str, found: list[Tensor]) -> Tensor:
    if name == "cls_token":
        return found[0] + found[1][:, :1]
    return found[0][:, 1:] if name == "pos_embed" else found[0]


DINOV2 = Layout("DINOv2, PyTorch", "vit", LEFT_OUT)
DINOV2_SWIGLU = Layout("DINOv2 with SwiGLU, PyTorch", "vit", LEFT_OUT, _swiglu)
DINOV2_REGISTERS = Layout(
    "DINOv2 with registers, PyTorch",
    "vit",
    LEFT_OUT,
    _registers(same_name),
    _registers_shapes,
    _registers_value,
)
DINOV2_REGISTERS_SWIGLU = Layout(
    "DINOv2 with registers and SwiGLU, PyTorch",
    "vit",
    LEFT_OUT,
    _registers(_swiglu),
    _registers_shapes,
    _registers_value,
)
