"""Weight files: read without executing code, and loaded with a check of every tensor."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from dist_vpt.backbones.config import PositionResize, require_file
from dist_vpt.backbones.weights.convert import LoadReport, convert, heads_of
from dist_vpt.backbones.weights.entries import Weights, choose_model
from dist_vpt.backbones.weights.layouts import LAYOUTS
from dist_vpt.backbones.weights.recognize import ONLY, recognize
from dist_vpt.errors import WeightsError
from dist_vpt.files import first_bytes, looks_like

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FAMILIES = {"vit": "a vision transformer", "swin": "a Swin Transformer"}


def read_weights(path: Path, entry: str | None = None) -> Weights:
    """Read a model from a .safetensors, .npz or torch file of tensors. No pickle is ever executed.

    ``entry``: which one, where the file holds several. Raises WeightsError for a missing, damaged or foreign file.
    """
    content = _read(path)
    try:
        return choose_model(content, entry)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _read(path: Path) -> object:
    require_file(path)
    if kind := looks_like(first_bytes(path)):
        raise WeightsError(f"{path}: no weights: {kind}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments: numbers and text
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file ({error}); download it again") from error
    except Exception as error:  # torch, pickle, zip and NumPy raise a dozen types for a foreign file
        # Torch's message on a pickle advises to load it nevertheless: only the object's name is kept of it.
        reason = str(error).split("\n")[0] or type(error).__name__
        if "TorchScript" in reason:
            reason = "a TorchScript archive, which is a program"
        elif isinstance(error, UnpicklingError):
            found = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"a pickle of {found[1]}" if found else "neither tensors nor text"
        raise WeightsError(
            f"{path}: not a file of plain tensors ({reason}). "
            "Pickled objects are never executed: convert the weights to .safetensors on a machine where you trust them"
        ) from error


def load_into(
    model: nn.Module,
    path: Path,
    *,
    lenient: bool,
    entry: str | None = None,
    position_resize: PositionResize = "timm",
) -> LoadReport:
    """Load a file into a timm model, resampling its position embedding to the model's grid as ``position_resize`` says.

    Strict: raises WeightsError unless the two sets of tensors are equal (what else the file's layout holds, such as a
    classifier, is left out). Lenient: returns the differences, after checking that all other tensors are bit-equal to
    the file's.
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
    refuse_infinite(tensors, load_report, path)
    state = model.state_dict()
    result = model.load_state_dict(offered, strict=False)
    _prove(model, offered, set(result.missing_keys), state.keys() - offered.keys(), path)
    return replace(load_report, notes=weights.notes)


def refuse_infinite(tensors: dict[str, Tensor], load_report: LoadReport, path: Path) -> None:
    """Raises WeightsError where a tensor that the model uses holds NaN or an infinity, or no floating point numbers."""
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
