"""Adapter files: the trained tensors alone, with the recipe and the classes as metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dist_vpt.distributed.zero import gathered
from dist_vpt.errors import WeightsError
from dist_vpt.files import write_atomically
from dist_vpt.methods.base import Method


def collect(method: Method) -> dict[str, Tensor]:
    """The adapters' tensors, whole and on the CPU. A collective call under ZeRO-3."""
    named = dict(method.adapter_tensors())
    with gathered(named.values()):
        tensors = {
            name: (t.detach().float() if t.is_floating_point() else t).cpu().clone() for name, t in named.items()
        }
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    assert not empty, f"gathered tensors are empty: {empty}"
    return tensors


def restore(method: Method, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy the adapters' tensors into the method after checking that names and shapes are exactly the method's.

    Raises WeightsError where they are not, and where an index is not of integers.
    """
    method.size_like(tensors)
    named = dict(method.adapter_tensors())
    missing, unexpected = sorted(named.keys() - tensors.keys()), sorted(tensors.keys() - named.keys())
    if missing or unexpected:
        raise WeightsError(
            f"{source}: not adapters of this recipe (missing: {missing or 'none'}; unexpected: {unexpected or 'none'})"
        )
    with gathered(named.values(), write=True), torch.no_grad():
        for name, tensor in named.items():
            if tensor.shape != tensors[name].shape:
                raise WeightsError(
                    f"{source}: {name} has shape {tuple(tensors[name].shape)}, this recipe's {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point() and tensor.dtype != tensors[name].dtype:
                raise WeightsError(f"{source}: {name} is {tensors[name].dtype}, this recipe's {tensor.dtype}")
            tensor.copy_(tensors[name])


def write_adapters(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a .safetensors file of trained tensors with the metadata needed to use it (recipe, classes)."""
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    write_atomically(path, save(dict(tensors), metadata))


def read_adapters(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained tensors and facts of an adapter file. Raises WeightsError for a missing or damaged one."""
    if not path.is_file():
        raise WeightsError(
            f"{path}: no adapters here; the run has not ended, had no validation split to find a best epoch on, "
            "or this is not a run folder"
        )
    try:
        with safe_open(path, "pt") as file:
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:  # metadata that is no JSON
        raise WeightsError(f"{path}: damaged adapters ({error}); train again or restore the file") from error
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise WeightsError(f"{path}: {broken[0]} holds numbers that are not finite; train again or restore the file")
    return tensors, facts
