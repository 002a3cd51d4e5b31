"""The layers of a backbone, as timm groups them, and the learning rates of what is trained in them.

Layer-wise learning rates: Clark et al. 2020 (ELECTRA, arXiv 2003.10555); of vision transformers Bao et al. 2022 (BEiT,
arXiv 2106.08254).
"""

import re

from dist_vpt.backbones.layers import layer_numbers
from dist_vpt.methods.base import Method

# Trees of a method's own modules: with a branch for each block, or with timm's names below them.
NUMBERED = re.compile(r"(?:lora|adapters)\.(\d+)\.")
NAMED = re.compile(r"(?:biases|ssf)\.")


def layer_scales(method: Method, decay: float) -> dict[str, float]:
    """The factor of the learning rate of each trained tensor: decay ** (layers after its own); the head's is 1."""
    places = {name: _timm_place(method, name) for name, _ in method.trainable()}
    layer_of = layer_numbers(method.backbone, places.values())
    last = max(layer_of.values())
    return {name: decay ** (last - layer_of[place]) for name, place in places.items()}


def _timm_place(method: Method, name: str) -> str:
    """timm's name of the tensor of the backbone, or of a neighbor in its block, that a trained tensor stands at."""
    name_in = method.backbone.timm_name
    if block := NUMBERED.match(name):
        return name_in(f"blocks.{block[1]}.norm1.weight")
    if tree := NAMED.match(name):  # timm's names already
        return name[tree.end() :]
    return name_in(name.removeprefix("backbone."))
