"""How published weight files name and shape their tensors, what a file is, and what it gives a model.

D width, E = D / H of H heads, N tokens, R prefix tokens. No file is opened here.

A layout goes from the model to the file: for each tensor of the model it says which tensors of the file it is made
of, so that whatever is missing, of another shape or left over is told under the file's own names.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dist_vpt.errors import WeightsError

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...] | None  # of a tensor in the file; None: whatever it has
CLASSIFIER = r"(head|head_dist|fc|pre_logits)\."  # what a tuned model brings its own of
_BUFFERS = r".*\.(attn_mask|relative_position_index)$"  # of Swin: what the model computes itself
SHOWN = 8  # names of a difference that a message lists


@dataclass(frozen=True)
class LoadReport:
    """How a file's tensors differ from the model's, under the file's names."""

    missing: tuple[str, ...] = ()  # in the model, not in the file
    unexpected: tuple[str, ...] = ()  # in the file, not in the model
    mismatched: tuple[str, ...] = ()  # "name: file (shape), model (shape)"
    left_out: tuple[str, ...] = ()  # on purpose: the file's own classifier, a decoder, a second encoder

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = []
        for title, names in (
            ("missing in the file", self.missing),
            ("unexpected in the file", self.unexpected),
            ("of another shape", self.mismatched),
        ):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(names[:SHOWN])}{_more(len(names))}")
        return "\n".join(lines)

    def told_left_out(self) -> str:
        """What was left out on purpose, by the parts of the file that it belongs to."""
        parts: dict[str, int] = {}
        for name in self.left_out:
            pieces = re.split(r"[./]", name)
            part = pieces[-1] if re.match(_BUFFERS, name) else pieces[0]
            part = ".".join(pieces[:2]) if part == "base_encoder" else part
            parts[part] = parts.get(part, 0) + 1
        shown = [part if count == 1 else f"{part} ({count})" for part, count in parts.items()]
        return f"{', '.join(shown[:SHOWN])}{_more(len(shown))}"


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""


def _same_name(name: str) -> tuple[str, ...]:
    return (name,)


def _same_shape(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [shape]


def _as_it_is(name: str, found: list[Tensor]) -> Tensor:
    return found[0]


@dataclass(frozen=True)
class Layout:
    """A family of weight files."""

    what: str  # for people
    family: str  # of the models that it belongs to: "vit" or "swin"
    left_out: str  # pattern of the names that are left out on purpose
    sources: Callable[[str], tuple[str, ...]] = _same_name  # a tensor of the model -> tensors of the file
    shapes: Callable[[str, tuple[int, ...], int], list[Shape]] = _same_shape  # theirs, from the model's and its heads
    value: Callable[[str, list[Tensor]], Tensor] = _as_it_is  # the model's tensor, made of theirs
    antialias: bool = True  # whether positions are resampled as timm does (bicubic), or as JAX's (bilinear)


# JAX: kernels are [in, out], of attention by heads


def _jax_sources(name: str) -> tuple[str, ...]:
    whole = {
        "patch_embed.proj.weight": "embedding/kernel",
        "patch_embed.proj.bias": "embedding/bias",
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "norm.weight": "Transformer/encoder_norm/scale",
        "norm.bias": "Transformer/encoder_norm/bias",
    }
    if name in whole:
        return (whole[name],)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if not found:
        return (name,)  # a part that JAX files do not have
    at, part, kind = f"Transformer/encoderblock_{found[1]}", found[2], found[3]
    kernel, scale = ("kernel", "scale") if kind == "weight" else ("bias", "bias")
    attention = f"{at}/MultiHeadDotProductAttention_1"
    return {
        "norm1": (f"{at}/LayerNorm_0/{scale}",),
        "norm2": (f"{at}/LayerNorm_2/{scale}",),
        "attn.qkv": tuple(f"{attention}/{projection}/{kernel}" for projection in ("query", "key", "value")),
        "attn.proj": (f"{attention}/out/{kernel}",),
        "mlp.fc1": (f"{at}/MlpBlock_3/Dense_0/{kernel}",),
        "mlp.fc2": (f"{at}/MlpBlock_3/Dense_1/{kernel}",),
    }.get(part, (name,))


def _jax_shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    if name.endswith("attn.qkv.weight"):
        D = shape[1]
        return [(D, heads, D // heads)] * 3
    if name.endswith("attn.qkv.bias"):
        return [(heads, shape[0] // 3 // heads)] * 3
    if name.endswith("attn.proj.weight"):
        return [(heads, shape[1] // heads, shape[0])]
    if name == "patch_embed.proj.weight":
        return [(shape[2], shape[3], shape[1], shape[0])]
    return [shape[::-1]] if len(shape) == 2 else [shape]


def _jax_value(name: str, found: list[Tensor]) -> Tensor:
    if name.endswith("attn.qkv.weight"):
        return torch.cat([kernel_DHE.flatten(1).T for kernel_DHE in found])
    if name.endswith("attn.qkv.bias"):
        return torch.cat([bias_HE.flatten() for bias_HE in found])
    if name.endswith("attn.proj.weight"):
        return found[0].flatten(0, 1).T
    if name == "patch_embed.proj.weight":
        return found[0].permute(3, 2, 0, 1)
    return found[0].T if found[0].ndim == 2 else found[0]


# PyTorch


def _in_base_encoder(name: str) -> tuple[str, ...]:
    return (f"base_encoder.{name}",)


def _swin_sources(name: str) -> tuple[str, ...]:
    """The published files merge patches at the end of a stage, timm at the start of the next."""
    return (re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name),)


def _dinov2_sources(name: str) -> tuple[str, ...]:
    """The giant model's MLP is a SwiGLU, whose layers have other names."""
    return (name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"),)


def _registers(of: Callable[[str], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    """The file gives the class token a position; timm's model has none there, and gets it in the token itself."""

    def sources(name: str) -> tuple[str, ...]:
        return {"reg_token": ("register_tokens",), "cls_token": ("cls_token", "pos_embed")}.get(name) or of(name)

    return sources


def _registers_shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [shape, None] if name == "cls_token" else [shape]


def _registers_value(name: str, found: list[Tensor]) -> Tensor:
    if name == "cls_token":
        return found[0] + found[1][:, :1]
    return found[0][:, 1:] if name == "pos_embed" else found[0]


_DINOV3_PARTS = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


def _dinov3_sources(name: str) -> tuple[str, ...]:
    """Of three biases in one, the keys' is fixed at zero; timm's model has the other two, or none."""
    pattern = "|".join(_DINOV3_PARTS)
    return (re.sub(pattern, lambda found: _DINOV3_PARTS[found[0]], re.sub(r"attn\.[qv]_bias", "attn.qkv.bias", name)),)


def _dinov3_swiglu_sources(name: str) -> tuple[str, ...]:
    """The huge model's MLP is a SwiGLU of three layers."""
    parts = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    return _dinov3_sources(re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], name))


def _dinov3_shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [(3 * shape[0],) if name.endswith(("q_bias", "v_bias")) else shape]


def _dinov3_value(name: str, found: list[Tensor]) -> Tensor:
    if name.endswith(("q_bias", "v_bias")):
        return found[0].chunk(3)[0 if name.endswith("q_bias") else 2]
    return found[0]


_CLIP_PARTS = {
    "patch_embed.proj": "conv1",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre": "ln_pre",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "norm": "ln_post",
    "blocks": "transformer.resblocks",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _clip_sources(name: str) -> tuple[str, ...]:
    pattern = "|".join(rf"\b{re.escape(part)}" + ("" if part.endswith(".") else r"\b") for part in _CLIP_PARTS)
    return ("visual." + re.sub(pattern, lambda found: _CLIP_PARTS[found[0]], name),)


def _clip_shapes(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [shape[2:] if name == "cls_token" else shape[1:] if name == "pos_embed" else shape]


def _clip_value(name: str, found: list[Tensor]) -> Tensor:
    return found[0].reshape(1, 1, -1) if name == "cls_token" else found[0][None] if name == "pos_embed" else found[0]


_DINOV2 = rf"{CLASSIFIER}|mask_token$"
_DINOV3 = rf"{_DINOV2}|rope_embed\.periods$|local_cls_norm\.|.*\.qkv\.bias(_mask)?$"
LAYOUTS = {
    "jax": Layout(
        "vision transformer, JAX (.npz)",
        "vit",
        r"(head|pre_logits)/",
        _jax_sources,
        _jax_shapes,
        _jax_value,
        antialias=False,
    ),
    "timm": Layout("vision transformer, PyTorch with timm's names", "vit", CLASSIFIER),
    "mae": Layout("masked autoencoder, PyTorch", "vit", rf"{CLASSIFIER}|mask_token$|decoder_"),
    "mocov3": Layout(
        "MoCo v3 with both encoders, PyTorch",
        "vit",
        r"momentum_encoder\.|predictor\.|base_encoder\.head\.",
        _in_base_encoder,
    ),
    "mocov3_linear": Layout("MoCo v3 after linear probing, PyTorch", "vit", CLASSIFIER),
    "dinov2": Layout("DINOv2, PyTorch", "vit", _DINOV2),
    "dinov2_swiglu": Layout("DINOv2 with SwiGLU, PyTorch", "vit", _DINOV2, _dinov2_sources),
    "dinov2_registers": Layout(
        "DINOv2 with registers, PyTorch",
        "vit",
        _DINOV2,
        _registers(_same_name),
        _registers_shapes,
        _registers_value,
    ),
    "dinov2_registers_swiglu": Layout(
        "DINOv2 with registers and SwiGLU, PyTorch",
        "vit",
        _DINOV2,
        _registers(_dinov2_sources),
        _registers_shapes,
        _registers_value,
    ),
    "dinov3": Layout("DINOv3, PyTorch", "vit", _DINOV3, _dinov3_sources, _dinov3_shapes, _dinov3_value),
    "dinov3_swiglu": Layout(
        "DINOv3 with SwiGLU, PyTorch",
        "vit",
        _DINOV3,
        _dinov3_swiglu_sources,
        _dinov3_shapes,
        _dinov3_value,
    ),
    "clip": Layout(
        "CLIP with its text encoder, PyTorch",
        "vit",
        r"(?!visual\.)|visual\.proj$",
        _clip_sources,
        _clip_shapes,
        _clip_value,
    ),
    "swin": Layout("Swin Transformer, PyTorch", "swin", rf"head\.|{_BUFFERS}", _swin_sources),
    "swin_timm": Layout("Swin Transformer, PyTorch with timm's names", "swin", rf"head\.|{_BUFFERS}"),
}


# What a file is


ONLY = "only plain vision transformers, DINOv3 and Swin Transformers are tuned here; see `dist-vpt backbones`"


def recognise(tensors: Tensors) -> str:
    """The name of a file's layout. Raises WeightsError, which says what it is, for a file that no model here fits."""
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


_MARKS: dict[str, Callable[[Tensors], bool]] = {  # layouts that a name gives away, the first that holds
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
    "an EVA (a vision transformer with queries and values of another kind)": lambda tensors: (
        _any(r"blocks\.\d+\.attn\.(q_proj|inner_attn_ln)\.")(tensors)
        or ("pos_embed" in tensors and _any(r"blocks\.\d+\.attn\.q_bias$")(tensors))  # DINOv3 has no table of positions
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


# From a file to a model


def convert(name: str, tensors: Tensors, model: Any) -> tuple[dict[str, Tensor], LoadReport]:
    """What a file of a layout gives a timm model, under the model's names, and where the two differ.

    Position embeddings are resampled to the model's grid. The model may be on the meta device.
    """
    layout = LAYOUTS[name]
    own = model.state_dict()
    heads = heads_of(model)
    offered: dict[str, Tensor] = {}
    missing: list[str] = []
    mismatched: list[str] = []
    used: set[str] = set()
    for at, tensor in own.items():
        sources = layout.sources(at)
        used.update(sources)
        absent = [source for source in sources if source not in tensors]
        if absent:
            missing += absent
            continue
        found = [tensors[source] for source in sources]
        shapes = layout.shapes(at, tuple(tensor.shape), heads)
        if at == "pos_embed":
            value = _positions(layout, found, tensor, model)
            if value is None:
                mismatched.append(_told(sources[0], found[0], shapes[0]))
            else:
                offered[at] = value
            continue
        wrong = [
            _told(source, there, shape)
            for source, there, shape in zip(sources, found, shapes, strict=True)
            if shape is not None and tuple(there.shape) != shape
        ]
        mismatched += wrong
        if wrong:
            continue
        try:
            value = layout.value(at, found)
        except (IndexError, RuntimeError):
            continue  # one of several sources is of another shape, which is told where it is a tensor of its own
        if value.shape == tensor.shape:
            offered[at] = value
    rest = tensors.keys() - used
    left_out = {source for source in rest if re.match(layout.left_out, source)}
    mismatched += [
        f"{source}: its numbers differ from those that the model computes itself"
        for source in left_out
        if not _agrees(tensors[source], model, source)
    ]
    return offered, LoadReport(
        missing=tuple(sorted(set(missing))),
        unexpected=tuple(sorted(rest - left_out)),
        mismatched=tuple(sorted(set(mismatched))),
        left_out=tuple(sorted(left_out)),
    )


def heads_of(model: Any) -> int:
    """Attention heads of a model's first block."""
    blocks = model.blocks if hasattr(model, "blocks") else model.layers[0].blocks
    return blocks[0].attn.num_heads


def _told(source: str, found: Tensor, shape: Shape) -> str:
    return f"{source}: file {tuple(found.shape)}, model {shape}"


def _positions(layout: Layout, found: list[Tensor], own_1ND: Tensor, model: Any) -> Tensor | None:
    """Positions on the model's grid; None where the file's are of another width or on no square grid."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    try:
        there_1ND = layout.value("pos_embed", found)
    except (IndexError, RuntimeError):  # of another rank
        return None
    if there_1ND.ndim != 3 or there_1ND.shape[0] != 1 or there_1ND.shape[2] != own_1ND.shape[2]:
        return None
    side = math.isqrt(max(there_1ND.shape[1] - prefix, 0))
    if side == 0 or side * side != there_1ND.shape[1] - prefix:
        return None
    kernel = {} if layout.antialias else {"interpolation": "bilinear", "antialias": False}
    grid = list(model.patch_embed.grid_size)
    if [side, side] == grid:
        return there_1ND
    return resample_abs_pos_embed(there_1ND, grid, num_prefix_tokens=prefix, **kernel)


def _agrees(there: Tensor, model: nn.Module, name: str) -> bool:
    """Whether something left out is what the model computes itself.

    A buffer is compared where both hold it for windows of equal size and number. A bias that the model has not must be
    zero, as those of DINOv3's distilled models are.
    """
    if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name):
        return there.is_meta or not there.any()
    own = dict(model.named_buffers()).get(name)
    if own is None or own.is_meta or own.shape != there.shape:
        return True
    return torch.equal(own, there.to(own.dtype))
