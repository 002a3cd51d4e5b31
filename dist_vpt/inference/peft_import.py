"""``dist-vpt import-peft``: a run made of PEFT's LoRA adapter for a timm model (``peft_layout`` has the mathematics).

The run has adapters and a recipe whose method is ``lora`` with the adapter's layers, rank and alpha. The head reads the
features as they are, as timm's does. It is used as any other run, and has no scores before `dist-vpt eval`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from dist_vpt.backbones.blocks import LAYERS, PARTS, SplitBiasLinear, Target, targets_of
from dist_vpt.backbones.build import build, is_known
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError, WeightsError
from dist_vpt.files import to_json, write_atomically
from dist_vpt.inference.hub import PEFT_FILES, download, is_hub_id, parse_id
from dist_vpt.inference.load import refuse_several
from dist_vpt.inference.peft_layout import Factors, PeftAdapter, read_peft
from dist_vpt.methods.config import LoRAConfig
from dist_vpt.recipe.loading import load_recipe, sets_method, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sharing import NOT_SHARED
from dist_vpt.runs.adapters import write_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.inputs import resolve_inputs

TARGETS = (*PARTS, *LAYERS)  # of a block, as recipes call them


class PeftRun(NamedTuple):
    """What a run folder needs of an adapter."""

    recipe: Recipe
    tensors: dict[str, Tensor]  # of adapters.safetensors
    classes: list[str]


def import_peft(folder: str, out: str, arguments: Sequence[str] = (), classes: str | None = None) -> Path:
    """Make a run folder of an adapter that PEFT has saved.

    ``folder``: a folder, or ``hub:user/name``. ``arguments``: names of recipes and ``a.b=c`` overrides: the backbone,
    where the adapter does not name one of timm's, and how images come in (``data``). ``classes``: a file of their names
    in the head's order, JSON or one a line; None: their numbers.

    Raises UserError before anything is written: for a folder that is none, another backbone, what `lora` here does not
    have, a run folder that is in use.
    """
    run = load_peft(folder, arguments, classes)
    recipe = run.recipe.changed("run", dir=out)
    made = RunFolder(out)
    with made.acquire(recipe) as done:
        if done:
            raise UserError(f"--out {out}: holds a run already; name a new folder")
        facts = {"recipe": recipe.model_dump(mode="json"), "epoch": 0, "classes": run.classes}
        write_adapters(made.adapters, run.tensors, facts)
        write_atomically(made.result, to_json({"last": {}, "best": None, "imported_from": "PEFT"}, indent=1) + "\n")
        made.mark("done")
    print(f"{out}: a run of {recipe.backbone.name} with lora on {', '.join(recipe.method.targets)}")  # type: ignore[union-attr]
    return made.path


def load_peft(folder: str, arguments: Sequence[str] = (), classes: str | None = None) -> PeftRun:
    """The recipe, tensors and classes of an adapter that PEFT has saved; arguments as of ``import_peft``."""
    place = str(download(parse_id(folder), PEFT_FILES)) if is_hub_id(folder) else folder
    adapter = read_peft(place)
    recipe = _recipe(adapter, arguments)
    refuse_several(recipe, "import-peft")
    backbone = _shapes(recipe)
    features, count = adapter.head["weight"].shape[1], len(adapter.head["weight"])
    if features != backbone.width or adapter.head["bias"].shape != (count,):
        raise WeightsError(
            f"{folder}: its head reads {features} features, and the backbone {recipe.backbone.name} has "
            f"{backbone.width}; name the adapter's own backbone (backbone.name=...)"
        )
    settings, tensors = _as_lora(adapter, backbone, recipe.backbone.name)
    tensors |= {f"head.{name}": tensor for name, tensor in adapter.head.items()}
    return PeftRun(recipe.model_copy(update={"method": settings}), tensors, _names(classes, count))


def _recipe(adapter: PeftAdapter, arguments: Sequence[str]) -> Recipe:
    """The recipe of the arguments, on top of the backbone that the adapter names and of timm's own preprocessing."""
    first: dict[str, Any] = {"data": {"task": "imported", "format": "image_folder", "root": NOT_SHARED}}
    first |= {"method": {"name": "lora", "head": "published"}}
    if adapter.base_model and is_known(adapter.base_model):
        first["backbone"] = {"name": adapter.base_model}
    files, overrides = split_arguments(arguments)
    methods = [file for file in files if sets_method(file)]
    methods += [override for override in overrides if override.startswith("method.")]
    if methods:
        raise UserError(f"import-peft: {methods[0]}: the adapter itself gives the method; leave it out")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "peft.yaml"
        file.write_text(yaml.safe_dump(first))
        recipe = load_recipe([file, *files], overrides)
    if recipe.backbone.name == "demo" and "backbone" not in first and not _names_backbone(files, overrides):
        raise UserError(
            f"{adapter.folder}: names no model of timm (base_model_name_or_path = "
            f"{adapter.config.get('base_model_name_or_path')!r}); name its backbone (backbone.name=...)"
        )
    return recipe


def _names_backbone(files: Sequence[str], overrides: Sequence[str]) -> bool:
    return bool(files) or any(override.startswith("backbone.name=") for override in overrides)


def _shapes(recipe: Recipe) -> Backbone:
    """The backbone with random weights: only its layers and their sizes matter here."""
    inputs = resolve_inputs(recipe)
    plain = recipe.backbone.model_copy(update={"weights": "random", "entry": None})
    return build(plain, image_size=inputs.transform.image_size, mean=inputs.mean, std=inputs.std)[0]


def _targets(backbone: Backbone) -> Iterator[tuple[int, str, Target]]:
    """All layers that `lora` can change, with the block's number and the name in a recipe."""
    for number, block in enumerate(backbone.blocks):
        for name in TARGETS:
            try:
                found = targets_of(block, number, name)
            except UserError:  # a block without this layer
                continue
            yield from ((number, name, target) for target in found)


@torch.no_grad()
def _as_lora(adapter: PeftAdapter, backbone: Backbone, name: str) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The settings and tensors of `lora` that compute what the adapter does."""
    found = list(_targets(backbone))
    _refuse_other_layers(adapter, [target for _, _, target in found], name)
    scale = max(factors.scale for factors in adapter.layers.values())
    updates: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # A [r, D] and B [rows, r], r their own
    used: set[str] = set()
    for number, recipe_name, target in found:
        updates[number, target.key] = a_rD, b_rows_r = _update(adapter.layers.get(target.name), target, scale)
        if len(a_rD):
            used.add(recipe_name)
    used = used or {recipe_name for _, recipe_name, target in found if target.name in adapter.layers}
    rank = max(1, *(len(a_rD) for a_rD, _ in updates.values()))
    targets = tuple(target for target in TARGETS if target in used)
    tensors: dict[str, Tensor] = {}
    for number, recipe_name, target in found:
        if recipe_name in used:
            a_rD, b_rows_r = updates[number, target.key]
            missing = rank - len(a_rD)  # rows and columns of zeros change nothing
            tensors[f"lora.{number}.{target.key}.down.weight"] = torch.nn.functional.pad(a_rD, (0, 0, 0, missing))
            tensors[f"lora.{number}.{target.key}.up.weight"] = torch.nn.functional.pad(b_rows_r, (0, missing))
    dropout = float(adapter.config.get("lora_dropout") or 0.0)
    settings = {"rank": rank, "alpha": scale * rank, "targets": targets, "dropout": dropout, "head": "published"}
    return LoRAConfig.model_validate({"name": "lora", **settings}), tensors


def _update(factors: Factors | None, target: Target, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [rows, r] of a target, without the ranks that its rows do not use; for ``scale``."""
    if factors is None:
        rows = len(range(target.linear.out_features)[target.rows])
        return torch.zeros(0, target.linear.in_features), torch.zeros(rows, 0)
    b_rows_r = factors.b_Or[target.rows] * (factors.scale / scale)
    kept = b_rows_r.any(dim=0)
    return factors.a_rD[kept], b_rows_r[:, kept]


def _refuse_other_layers(adapter: PeftAdapter, targets: Sequence[Target], name: str) -> None:
    known: Mapping[str, Target] = {target.name: target for target in targets}
    for layer, factors in adapter.layers.items():
        if layer not in known:
            raise WeightsError(
                f"{adapter.folder}: has an update of {layer}, which is no layer that lora can change on {name} "
                f"({', '.join(dict.fromkeys(key.split('.', 2)[2] for key in known))} of its blocks); name the "
                "adapter's own backbone, or in PEFT merge_and_unload() it and load the merged weights with "
                "backbone.weights=FILE"
            )
        linear = known[layer].linear
        if isinstance(linear, SplitBiasLinear):
            raise WeightsError(
                f"{adapter.folder}: {layer} of {name}: timm reads its weight without calling it, so that PEFT's update "
                "had no effect in training; train it with lora here"
            )
        shapes = factors.a_rD.shape[1], len(factors.b_Or)
        if shapes != (linear.in_features, linear.out_features):
            raise WeightsError(
                f"{adapter.folder}: {layer} has {shapes[0]} inputs and {shapes[1]} outputs, that of {name} "
                f"{linear.in_features} and {linear.out_features}; name the adapter's own backbone (backbone.name=...)"
            )


def _names(file: str | None, count: int) -> list[str]:
    if file is None:
        return [str(number) for number in range(count)]
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {file}: cannot be read ({error}); give a JSON list or a name a line") from error
    names = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    if len(names) != count or len(set(names)) != count:
        distinct = len(set(names))
        raise UserError(
            f"--classes {file}: has {distinct} different names, and the head {count} classes; list each once"
        )
    return names
