"""The layouts of published weight files, one module a family.

A layout goes from the model to the file: for each tensor of the model it names the tensors of the file that it is made
of, so that whatever is missing, of another shape or left over is reported under the file's own names.
"""

from dist_vpt.backbones.weights.layouts.base import Layout
from dist_vpt.backbones.weights.layouts.clip import CLIP
from dist_vpt.backbones.weights.layouts.dinov2 import (
    DINOV2,
    DINOV2_REGISTERS,
    DINOV2_REGISTERS_SWIGLU,
    DINOV2_SWIGLU,
)
from dist_vpt.backbones.weights.layouts.dinov3 import DINOV3, DINOV3_SWIGLU
from dist_vpt.backbones.weights.layouts.jax import JAX
from dist_vpt.backbones.weights.layouts.swin import SWIN, SWIN_TIMM
from dist_vpt.backbones.weights.layouts.vit import MAE, MOCOV3, MOCOV3_LINEAR, TIMM

LAYOUTS: dict[str, Layout] = {
    "jax": JAX,
    "timm": TIMM,
    "mae": MAE,
    "mocov3": MOCOV3,
    "mocov3_linear": MOCOV3_LINEAR,
    "dinov2": DINOV2,
    "dinov2_swiglu": DINOV2_SWIGLU,
    "dinov2_registers": DINOV2_REGISTERS,
    "dinov2_registers_swiglu": DINOV2_REGISTERS_SWIGLU,
    "dinov3": DINOV3,
    "dinov3_swiglu": DINOV3_SWIGLU,
    "clip": CLIP,
    "swin": SWIN,
    "swin_timm": SWIN_TIMM,
}
