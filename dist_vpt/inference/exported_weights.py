"""A run in one .safetensors file: the backbone's weights, the adapters and the recipe, under this package's names.

Unlike a run folder it needs no other file, and unlike merged weights it exists for every method.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_vpt.errors import UserError, WeightsError
from dist_vpt.inference.load import device_of
from dist_vpt.inference.named_classes import thresholds_of
from dist_vpt.inference.tuned import Tuned
from dist_vpt.inference.weightless import build_empty_backbone
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.training.components import attach_method
from dist_vpt.training.inputs import resolve_inputs

CONTENTS = "backbone and method"  # of such a file; merged weights have "timm weights"
RUNTIMES = {
    ".onnx": "an ONNX file; run it with onnxruntime",
    ".pt2": "a torch.export program; run it with torch.export.load",
}


def own_tensors(method: Method, of_backbone: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors as they were before the method was attached, and the adapters'.

    A method may take over tensors of the backbone (biases) and may be initialized from them, so that these have to be
    there before it is attached again.
    """
    tensors = {f"backbone.{name}": tensor for name, tensor in of_backbone.items()} | dict(method.adapter_tensors())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_export(path: str | Path) -> Tuned:
    """A run from a file of ``dist-vpt export --format safetensors``, on its device and ready to score.

    Nothing in the file is executed. Raises UserError for a file of another kind, WeightsError for a damaged one.
    """
    path = Path(path)
    _refuse_other_kinds(path)
    tensors, facts = read_adapters(path)
    try:
        recipe = Recipe.model_validate(facts["recipe"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{path}: its recipe is not one of this version ({key}: {first['msg']}); export the run again"
        ) from error
    classes, inputs = facts["classes"], resolve_inputs(recipe)
    backbone = build_empty_backbone(recipe, inputs)
    names = {name: f"backbone.{name}" for name in backbone.state_dict()}
    if missing := sorted(set(names.values()) - tensors.keys()):
        raise WeightsError(f"{path}: {missing[0]} is missing; export the run again")
    try:
        backbone.load_state_dict({name: tensors[stored] for name, stored in names.items()})
    except RuntimeError as error:  # shapes
        raise WeightsError(f"{path}: not the weights of its recipe ({error}); export the run again") from error
    method = attach_method(recipe, backbone, len(classes))
    adapters = dict(method.adapter_tensors())
    of_backbone = set(names.values()) - adapters.keys()
    restore(method, {name: tensor for name, tensor in tensors.items() if name not in of_backbone}, path)
    return Tuned(recipe, method, classes, inputs, thresholds_of(recipe, facts, classes)).to(device_of(recipe))


def _refuse_other_kinds(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one that `dist-vpt export --format safetensors` wrote")
    if path.suffix in RUNTIMES:
        raise UserError(f"{path}: {RUNTIMES[path.suffix]}, without this package")
    contents = json.loads(_metadata(path).get("contents", '""'))
    if contents == CONTENTS:
        return
    kind = "is no file of `dist-vpt export`"
    if contents == "timm weights":
        kind = "holds plain timm weights, for a timm model as its metadata says"
    raise UserError(
        f"{path}: {kind}; name a file that `dist-vpt export --format safetensors` wrote without --merge, or a run "
        "folder"
    )


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged, or no .safetensors file ({error}); copy or export it again") from error
