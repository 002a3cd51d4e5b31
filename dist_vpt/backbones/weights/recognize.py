"""Which layout a weight file has, or which foreign architecture it holds.

D width, N tokens. No file is opened here.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from dist_vpt.backbones.weights.layouts.base import Tensors
from dist_vpt.errors import WeightsError

ONLY = "only timm's plain vision transformers, EVA and Swin Transformers are tuned here; see `dist-vpt backbones`"


def recognize(tensors: Tensors) -> str:
    """The name of a file's layout. Raises WeightsError, with what the file holds, where no model here fits."""
    foreign = _foreign(tensors)
    if foreign:
        raise WeightsError(f"holds {foreign}: {ONLY}")
    for layout, holds in _MARKS.items():
        if holds(tensors):
            return layout
    positions = tensors.get("pos_embed")
    if positions is not None and _is_fixed(positions, rows_first=True):
        return "mocov3_linear"
    if any(name.startswith("decoder_") for name in tensors) or (
        positions is not None and _is_fixed(positions, rows_first=False)
    ):
        return "mae"
    return "timm"


def _any(pattern: str) -> Callable[[Tensors], bool]:
    compiled = re.compile(pattern)
    return lambda tensors: any(compiled.match(name) for name in tensors)


def _all(*patterns: str) -> Callable[[Tensors], bool]:
    holds = [_any(pattern) for pattern in patterns]
    return lambda tensors: all(one(tensors) for one in holds)


_MARKS: dict[str, Callable[[Tensors], bool]] = {  # layouts that one name identifies, the first match wins
    "jax": _any(r"Transformer/encoderblock_\d|embedding/kernel$"),
    "mocov3": _any(r"(base|momentum)_encoder\."),
    "clip": _any(r"visual\.transformer\.resblocks\."),
    "dinov3_swiglu": _all(r"storage_tokens$|rope_embed\.", r"blocks\.\d+\.mlp\.w[123]\."),
    "dinov3": _any(r"storage_tokens$|rope_embed\."),
    "dinov2_registers_swiglu": _all(r"register_tokens$", r"blocks\.\d+\.mlp\.w12\."),
    "dinov2_registers": _any(r"register_tokens$"),
    "dinov2_swiglu": _any(r"blocks\.\d+\.mlp\.w12\."),
    "dinov2": lambda tensors: "mask_token" in tensors and not any(n.startswith("decoder_") for n in tensors),
    "swin": _any(r"layers\.0\.downsample\."),
    "swin_timm": _any(r"layers\.\d+\.blocks\."),
}
_FOREIGN: dict[str, Callable[[Tensors], bool]] = {
    "a hybrid (a vision transformer on a ResNet stem)": _any(r"(.*/)?conv_root/|patch_embed\.backbone\."),
    "an MLP-Mixer": _any(r"(.*/)?MixerBlock_\d"),
    "a ResNet (a convolutional network)": _any(r"(.*\.)?layer1\.0\.conv1\.|block1/unit1/"),
    "a Pyramid Vision Transformer": _any(r"(.*\.)?(attn\.(kv|sr)|mlp\.dwconv)\."),
    "a ConvNeXt (a convolutional network)": lambda tensors: (
        _any(r".*(dwconv|conv_dw)\.|downsample_layers\.\d")(tensors) and not _any(r".*attn")(tensors)
    ),
    "an XCiT (with attention among channels)": _any(r"blocks\.\d+\.local_mp\."),
    "an EVA-02 in its project's own layout (timm's file fits)": _any(
        r"(.*\.)?(blocks\.\d+\.(attn\.inner_attn_ln|mlp\.ffn_ln)\.|rope\.freqs_(cos|sin)$)"
    ),
    "a CaiT (with blocks of the class token alone)": _any(r"blocks_token_only\."),
    "a vision transformer with relative positions in its blocks": _any(r"(.*\.)?blocks\.\d+\.attn\.rel_pos"),
    "a Swin Transformer V2": _any(r"layers\.\d+\.blocks\.\d+\.attn\.(logit_scale|cpb_mlp)"),
    "a distilled DeiT (with a second, distillation token)": _any(r"dist_token$"),
    "a BEiT (with relative position biases in its blocks)": _any(r"blocks\.\d+\.attn\.relative_position_bias"),
    "a vision transformer in the layout of the transformers library (timm's or the project's own file fits)": _any(
        r"(vit\.|dinov2\.)?embeddings\.patch_embeddings\."
    ),
    "a language model": lambda tensors: (
        not _any(r"visual\.")(tensors)
        and _any(r"(.*\.)?(word_embeddings|embed_tokens|wte|tok_embeddings|lm_head|token_embedding)(\.|$)")(tensors)
    ),
    "a convolutional network": lambda tensors: (
        sum(t.ndim == 4 for t in tensors.values()) > 2 and not _any(r".*(attn|[aA]ttention)")(tensors)
    ),
}


def _foreign(tensors: Tensors) -> str:
    return next((what for what, holds in _FOREIGN.items() if holds(tensors)), "")


def _is_fixed(positions_1ND: Tensor, *, rows_first: bool) -> bool:
    """Whether positions are the fixed sines that MoCo v3 (rows first) and MAE (columns first) have, after a zero."""
    if positions_1ND.ndim != 3 or positions_1ND.shape[2] % 4 or positions_1ND.is_meta:
        return False
    _, N, D = positions_1ND.shape
    side = math.isqrt(N - 1)
    if side * side != N - 1:
        return False
    rate_W = 10000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    row_NW, column_NW = (torch.cartesian_prod(*[torch.arange(side)] * 2).double()[:, i, None] * rate_W for i in (0, 1))
    first_NW, second_NW = (row_NW, column_NW) if rows_first else (column_NW, row_NW)
    sines_ND = torch.cat([first_NW.sin(), first_NW.cos(), second_NW.sin(), second_NW.cos()], dim=1)
    expected_ND = torch.cat([torch.zeros(1, D, dtype=torch.float64), sines_ND])
    return torch.allclose(positions_1ND[0].double(), expected_ND, rtol=0, atol=2e-3)  # half-precision files, too
