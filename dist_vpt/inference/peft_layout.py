"""PEFT's files of a LoRA adapter for a timm model: writing them for a run of ``lora``, and reading them.

D inputs and O outputs of a linear layer, T targets of one layer, r rank, R = T r, F features, K classes.

    adapter_config.json          which layers, rank, alpha
    adapter_model.safetensors    lora_A [r, D] and lora_B [O, r] of each layer, and the head

PEFT gives a whole layer W x + (alpha / r) B A x. Here queries, keys and values, rows of one layer in most of timm, have
factors of their own. T of them are one of rank T r and alpha T alpha, exactly: A is theirs one below the other, and
each has its own rows and columns of B, which is 0 elsewhere. The other way round a target has its rows of B, and the
columns in which they are not 0.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dist_vpt.backbones.blocks import SplitBiasLinear
from dist_vpt.backbones.build import weights_source
from dist_vpt.errors import UserError, WeightsError
from dist_vpt.files import new_folder, raising_disk_full, write_atomically
from dist_vpt.inference.hub import PEFT_FILES, adapters_file, open_run
from dist_vpt.inference.load import classes_of, refuse_several
from dist_vpt.methods.lora import LoRA
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs

PREFIX = "base_model.model."  # of PEFT's names
# Settings of PEFT's LoRA that change what is computed and that `lora` here does not have, with what they have without.
OTHER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "alora_invocation_tokens": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
}


class Factors(NamedTuple):
    """The update of a linear layer: scale * B A."""

    a_rD: Tensor
    b_Or: Tensor
    scale: float


@dataclass(frozen=True)
class PeftAdapter:
    """The content of PEFT's files."""

    folder: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Factors]  # by timm's name of the layer
    head: Mapping[str, Tensor]  # weight [K, F] and bias [K]

    @property
    def base_model(self) -> str | None:
        """timm's name of the model with its weights, where the adapter names one."""
        name = self.config.get("base_model_name_or_path")
        return str(name).removeprefix("timm/") if name else None


def write_peft(run: str, out: str, adapters: str = "last") -> Path:
    """Write a run of ``lora`` as PEFT's files into a new folder; ``run``: a folder or ``hub:user/name``.

    Neither PEFT nor the backbone's weights are needed. Raises UserError for other methods, and for backbones on which
    PEFT's layers would have no effect.
    """
    folder = open_run(run)
    path = adapters_file(folder, adapters)
    recipe = folder.load()
    refuse_several(recipe, "PEFT")
    tensors, facts = read_adapters(path)
    files, target = peft_files(recipe, tensors, classes_of(facts, path), path), new_folder(out)
    with raising_disk_full("the adapter", target, "empty the folder and start again"):
        for name, content in files.items():
            write_atomically(target / name, content)
    return target


def peft_files(recipe: Recipe, tensors: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> dict[str, bytes]:
    """PEFT's files of a run's adapters, name -> content. Raises UserError where PEFT cannot express the run."""
    if recipe.method.name != "lora":
        raise UserError(f"{path}: method.name = {recipe.method.name}: of all methods only lora has a form in PEFT")
    if recipe.runtime.quantize != "none":
        raise UserError(
            f"{path}: runtime.quantize = {recipe.runtime.quantize}: the adapter was trained on quantized weights, and "
            "on PEFT's it would give other outputs; train it with runtime.quantize=none"
        )
    # Only the shapes of the backbone matter here: its weights need not be on this machine.
    random = recipe.changed("runtime", precision="fp32").changed("backbone", weights="random", entry=None)
    method, _ = build_method(random, resolve_inputs(recipe), len(classes))
    assert isinstance(method, LoRA)
    restore(method, tensors, path)
    layers = _joint_factors(method, f"{path}: {recipe.backbone.name}")
    named = {f"{PREFIX}{name}.lora_A.weight": factors.a_rD for name, factors in layers.items()}
    named |= {f"{PREFIX}{name}.lora_B.weight": factors.b_Or for name, factors in layers.items()}
    named |= {f"{PREFIX}head.{name}": tensor for name, tensor in method.plain_head().items()}
    content = {name: tensor.detach().float().contiguous() for name, tensor in named.items()}
    config = json.dumps(_config(recipe, layers), indent=2, sort_keys=True) + "\n"
    return dict(zip(PEFT_FILES, (config.encode(), save(content, {"format": "pt"})), strict=True))


@torch.no_grad()
def _joint_factors(method: LoRA, source: str) -> dict[str, Factors]:
    """The factors of whole layers, by timm's names."""
    found: dict[str, Factors] = {}
    for layer, updates in method.updates_of_layers():
        if isinstance(layer.linear, SplitBiasLinear):
            raise UserError(
                f"{source}: timm reads the weight of {layer.name} without calling it, so that an adapter of PEFT would "
                "have no effect; use `dist-vpt merge`"
            )
        a_RD = torch.cat([update.down.weight for update in updates])
        b_OR = a_RD.new_zeros(layer.linear.out_features, len(a_RD))
        for update, columns_OR in zip(updates, b_OR.chunk(len(updates), dim=1), strict=True):
            columns_OR[update.rows] = update.up.weight
        found[layer.name] = Factors(a_RD, b_OR, updates[0].scale)
    return found


def _config(recipe: Recipe, layers: Mapping[str, Factors]) -> dict[str, Any]:
    """adapter_config.json, with the keys that PEFT writes; those that are missing have PEFT's defaults."""
    settings: Any = recipe.method
    ranks = {name.split(".", 2)[2]: len(factors.a_rD) for name, factors in layers.items()}  # by the name in a block
    rank = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else settings.rank
    other = {name: found for name, found in ranks.items() if found != rank}
    scale = settings.alpha / settings.rank
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": weights_source(recipe.backbone)[0],
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "modules_to_save": ["head"],
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "rank_pattern": other,
        "alpha_pattern": {name: _number(scale * found) for name, found in other.items()},
        "lora_dropout": settings.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def read_peft(folder: str | Path) -> PeftAdapter:
    """The adapter in a folder that PEFT's ``save_pretrained`` has written. Nothing in it is executed.

    Raises WeightsError for a folder that holds none, a pickle, or what ``lora`` here cannot express, with the reason.
    """
    path = Path(folder).expanduser()
    config_file, tensors_file = (path / name for name in PEFT_FILES)
    if not config_file.is_file():
        raise WeightsError(f"{path}: no adapter of PEFT ({config_file.name} is missing); name a folder that PEFT wrote")
    if not tensors_file.is_file():
        pickle = " (adapter_model.bin, a pickle, is not read)" if (path / "adapter_model.bin").is_file() else ""
        raise WeightsError(f"{path}: {tensors_file.name} is missing{pickle}; save the adapter as safetensors")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        tensors = load_file(tensors_file)
    except (ValueError, OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: damaged ({error}); download or save it again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{config_file}: holds a {type(config).__name__}, not an object; save it again")
    _refuse_other(config, config_file)
    head, factors = _sorted(tensors, tensors_file)
    if missing := [name for name in ("weight", "bias") if name not in head]:
        raise WeightsError(
            f"{tensors_file}: has no trained head (head.{missing[0]} is missing), which a run here has; train it with "
            "modules_to_save=['head'] in PEFT"
        )
    layers = {}
    for name, parts in factors.items():
        if len(parts) < 2:
            raise WeightsError(f"{tensors_file}: {name} has lora_A or lora_B alone; save the adapter again")
        a_rD, b_Or = parts["lora_A"].float(), parts["lora_B"].float()
        if a_rD.ndim != 2 or b_Or.ndim != 2 or len(a_rD) != b_Or.shape[1]:
            raise WeightsError(f"{tensors_file}: {name} is not two matrices of one rank; only linear layers are read")
        layers[name] = Factors(a_rD, b_Or, _scale(config, name, len(a_rD), config_file))
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken or not layers:
        what = f"{broken[0]} holds numbers that are not finite" if broken else "no layer has an update"
        raise WeightsError(f"{tensors_file}: {what}; train it again or restore the file")
    return PeftAdapter(path, config, layers, head)


def _refuse_other(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise WeightsError(
            f"{file}: peft_type = {config.get('peft_type')}: only LORA can be a run here; train with a method of "
            "`dist-vpt recipe list`"
        )
    for key, plain in OTHER_SETTINGS.items():
        if key in config and config[key] not in plain:
            raise WeightsError(
                f"{file}: {key} = {config[key]!r}: lora here has {key} = {plain[0]!r} alone; in PEFT, "
                "merge_and_unload() the adapter and load the merged weights with backbone.weights=FILE"
            )


def _sorted(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The head's tensors, and the two factors of each layer by timm's name."""
    head: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(PREFIX)
        layer, dot, part = name.removesuffix(".weight").rpartition(".lora_")
        if name in ("head.weight", "head.bias", "head.modules_to_save.weight", "head.modules_to_save.bias"):
            head[name.rpartition(".")[2]] = tensor.float()
        elif dot and part in ("A", "B") and name.endswith(".weight"):
            factors.setdefault(layer, {})[f"lora_{part}"] = tensor
        else:
            raise WeightsError(
                f"{file}: {full}: lora here has updates of the blocks' linear layers and a head named head; train "
                "without it in PEFT (modules_to_save=['head'])"
            )
    return head, factors


def _scale(config: Mapping[str, Any], layer: str, rank: int, file: Path) -> float:
    """alpha / r, or with rslora alpha / sqrt(r); patterns count as in PEFT, from the end of a layer's name."""
    try:
        patterns = config.get("alpha_pattern") or {}
        key = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
        alpha = float(patterns[key] if key is not None else config.get("lora_alpha", 8))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise WeightsError(f"{file}: lora_alpha or alpha_pattern cannot be read ({error}); save it again") from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
