"""Products of float32 numbers on a GPU, with the 10 bits of TF32 or with all of float32's."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone
    from dist_vpt.recipe.schema import RuntimeConfig


def apply_tf32(backbone: "Backbone", runtime: "RuntimeConfig") -> None:
    """Set matrix products and convolutions alike; torch's defaults differ: TF32 for convolutions alone.

    Set for the process, before every run: with other recipes runs of one process differ in it. By torch's older names,
    since its compiler reads them, and torch refuses to answer by one kind of names what was set by the other.
    """
    used = not runtime.deterministic if runtime.tf32 is None else runtime.tf32
    torch.backends.cuda.matmul.allow_tf32 = used
    torch.backends.cudnn.allow_tf32 = used
    backbone.chosen["tf32"] = "on" if used else "off"
