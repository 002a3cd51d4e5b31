"""Weights loaded into a model with a check of every tensor."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from dist_vpt.backbones.config import PositionResize
from dist_vpt.backbones.weights.convert import LoadReport, convert, heads_of
from dist_vpt.backbones.weights.deferred import is_complete, refer_to
from dist_vpt.backbones.weights.entries import Weights, choose_model
from dist_vpt.backbones.weights.layouts import LAYOUTS
from dist_vpt.backbones.weights.reading import read_tensors
from dist_vpt.backbones.weights.recognize import ONLY, recognize
from dist_vpt.errors import WeightsError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FAMILIES = {"vit": "a vision transformer", "swin": "a Swin Transformer"}


def read_weights(path: Path, entry: str | None = None) -> Weights:
    """Read a model from a file of tensors: safetensors, NumPy's or torch's.

    ``entry``: which one, where the file holds several. Raises WeightsError for a missing, damaged or foreign file.
    """
    content = read_tensors(path)
    try:
        weights = choose_model(content, entry)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    for name, tensor in weights.tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = "has no values" if tensor.is_meta else f"is stored as {str(tensor.layout).removeprefix('torch.')}"
            raise WeightsError(f"{path}: {name} {kind}; save it as a dense tensor with its values")
    return weights


def load_into(
    model: nn.Module,
    path: Path,
    *,
    lenient: bool,
    entry: str | None = None,
    position_resize: PositionResize = "timm",
    defer: bool = False,
) -> LoadReport | None:
    """Load a file into a timm model, resampling its position embedding to the model's grid as ``position_resize`` says.

    Strict: raises WeightsError unless the two sets of tensors are equal (what else the file's layout holds, such as a
    classifier, is left out). Lenient: returns the differences, after checking that all other tensors are bit-equal to
    the file's.

    ``defer``: the model was made ``without_matrices``, and those of its blocks stay in the file. Returns None where
    the file lacks some of them, which only a whole model has initial values for.
    """
    weights = read_weights(path, entry)
    tensors = weights.tensors
    layout = layout_of(tensors, path)
    family = "swin" if isinstance(model, SwinTransformer) else "vit"
    if LAYOUTS[layout].family != family:
        raise WeightsError(
            f"{path}: holds {FAMILIES[LAYOUTS[layout].family]}, and backbone.name is {FAMILIES[family]}; "
            f"use a backbone.name that fits (`dist-vpt backbones check {path}` lists them)"
        )
    if layout.startswith("mocov3") and getattr(model, "embed_dim", 0) == 384 and heads_of(model) != 12:
        raise WeightsError(
            f"{path}: MoCo v3's ViT-S has 12 attention heads, the model {heads_of(model)}; set backbone.name=mocov3_s16"
        )
    offered, load_report = convert(layout, tensors, model, position_resize)
    if load_report and (not lenient or not offered):
        fix = "name the architecture they are of in backbone.name" + (
            "" if lenient or not offered else ", or use backbone.load=lenient"
        )
        raise WeightsError(f"{path}: not weights of this architecture ({fix}):\n{load_report}")
    check_values(tensors, load_report, path)
    if defer:
        if not is_complete(model, offered):
            return None
        refer_to(model, offered)
        held = model.state_dict()
        offered = {name: tensor for name, tensor in offered.items() if not held[name].is_meta}
    state = model.state_dict()
    result = model.load_state_dict(offered, strict=False)
    _prove(model, offered, set(result.missing_keys), state.keys() - offered.keys(), path)
    return replace(load_report, notes=weights.notes)


def check_values(tensors: dict[str, Tensor], load_report: LoadReport, path: Path) -> None:
    """Raises WeightsError where what the model uses is not finite, no floating point numbers, or nothing but 0."""
    for name, tensor in tensors.items():
        if name in load_report.left_out:
            continue
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(
                f"{path}: {name} holds {kind} numbers, and weights are float32, float16, bfloat16 or float64; use the "
                "file that was not quantized"
            )
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise WeightsError(f"{path}: {name} holds {bad} values that are not finite; download the file again")
    matrices = [tensor for name, tensor in tensors.items() if tensor.ndim > 1 and name not in load_report.left_out]
    if not any(tensor.any() for tensor in matrices):
        raise WeightsError(f"{path}: all weights are 0; download the file again")


def layout_of(tensors: dict[str, Tensor], path: Path) -> str:
    """The name of a file's layout. Raises WeightsError, with what the file holds, where no model here fits."""
    try:
        layout = recognize(tensors)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if path.suffix == ".npz" and layout != "jax":
        raise WeightsError(
            f"{path}: not a JAX vision transformer (no 'embedding/kernel' among its {len(tensors)} arrays)"
        )
    if layout == "timm" and not any(re.match(r"(.*\.)?(blocks|layers)\.\d+\.", name) for name in tensors):
        raise WeightsError(f"{path}: holds no blocks of a transformer: {ONLY}")
    return layout


def _prove(model: nn.Module, loaded: dict[str, Tensor], missing: set[str], expected: set[str], path: Path) -> None:
    if missing != expected:
        raise WeightsError(f"{path}: torch reports {sorted(missing)} as missing, the report {sorted(expected)}")
    state = model.state_dict()
    for name, tensor in loaded.items():
        if not torch.equal(state[name], tensor.to(state[name].dtype)):
            raise WeightsError(f"{path}: {name} differs from the file after loading")
