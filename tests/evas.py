"""Tiny kinds of timm's Eva, like DINOv3, EVA-02 and the Perception Encoder, and how the reference describes them."""

from typing import Any

from timm.layers import LayerNorm

from tests.reference.eva import Rotary


def loose_norm(width: int, **options: Any) -> LayerNorm:
    """DINOv3's and the Perception Encoder's."""
    return LayerNorm(width, eps=1e-5, **options)


_DINOV3: dict[str, Any] = {
    "global_pool": "token",
    "init_values": 0.5,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 2,
    "use_fc_norm": False,
    "norm_layer": loose_norm,
}
_EVA02: dict[str, Any] = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
EVAS: dict[str, dict[str, Any]] = {
    "dinov3": _DINOV3,  # queries, keys and values in one layer, with biases of queries and values
    "dinov3_swiglu": _DINOV3 | {"qkv_bias": False, "swiglu_mlp": True, "swiglu_align_to": 8},
    "eva02": _EVA02,  # a SwiGLU whose two first layers are one
    "eva02_normed": _EVA02 | {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
    "perception": {
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "use_post_transformer_norm": False,
        "use_fc_norm": False,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (2, 2),
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "norm_layer": loose_norm,
    },
    "eva": {},  # no rotary positions
}
_TURNS = Rotary(base=100.0, centered=True, halves=True)
_NUMBERS = Rotary(base=10000.0, centered=False, halves=False, reference=4)
REFERENCE: dict[str, dict[str, Any]] = {  # of tests/reference/vit.py's Config
    "dinov3": {"eps": 1e-5, "rotary": _TURNS},
    "dinov3_swiglu": {"eps": 1e-5, "rotary": _TURNS},
    "eva02": {"rotary": _NUMBERS},
    "eva02_normed": {"rotary": _NUMBERS},
    "perception": {
        "eps": 1e-5,
        "rotary": Rotary(base=10000.0, centered=False, halves=False, reference=2, offset=1.0, column_first=True),
    },
}
