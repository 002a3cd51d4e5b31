"""Which of the models in a weights file is meant, and the prefix that all its names have."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_vpt.backbones.weights.recognize import recognize
from dist_vpt.errors import WeightsError

# Of several models in a file, the first of these is loaded: what the project itself evaluates.
# Beside an image model, a model of images and text has a text model.
PREFERRED = ("state_dict", "model", "teacher", "model_ema", "ema", "student", "visual")
MAX_DEPTH = 3  # of mappings in mappings
BLOCK = re.compile(r"(.*?\.)?(?:blocks|layers)\.\d+\.")


@dataclass(frozen=True)
class Weights:
    """The tensors of one model, and lines about what was chosen and taken off."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def choose_model(content: object, entry: str | None) -> Weights:
    """The model of a file that ``entry`` names, or else the preferred one, without a prefix of all its names.

    Raises WeightsError, with what the file holds, where there is none or no way to choose.
    """
    found = dict(_entries(content))
    if not found:
        kinds = (
            [f"{key} ({type(value).__name__})" for key, value in content.items()] if isinstance(content, dict) else []
        )
        raise WeightsError(
            f"holds no mapping of names to tensors, but {', '.join(kinds[:8]) or type(content).__name__}"
        )
    if list(found) == [""]:
        return _without_prefix(Weights(found[""]), entry)
    models = {name: tensors for name, tensors in found.items() if any(map(BLOCK.match, tensors))} or found
    chosen = _chosen([*models], entry)
    others = [name for name in models if name != chosen]
    notes = (f"entry {chosen!r} is loaded; backbone.entry chooses another: {', '.join(others)}",) if others else ()
    return _without_prefix(Weights(models[chosen], notes), None)


def _without_prefix(weights: Weights, entry: str | None) -> Weights:
    """Take off the prefix that all blocks of a model have, such as ``model.``, ``_orig_mod.`` or ``backbone.``.

    Tensors outside of it are left out. Layouts that have prefixes of their own are returned as they are.
    """
    tensors = weights.tensors
    prefixes = list(dict.fromkeys(match[1] or "" for match in map(BLOCK.match, tensors) if match))
    if entry is not None and len(prefixes) < 2:
        raise WeightsError(f"has no entry {entry!r}, since it holds one model; remove backbone.entry")
    if not prefixes or "" in prefixes or _layout(tensors) != "timm":
        return weights
    names = [prefix.rstrip(".") for prefix in prefixes]
    prefix = f"{_chosen(names, entry) if len(names) > 1 else names[0]}."
    others = [name for name in names if name != prefix[:-1]]
    notes = [f"{prefix!r} is taken off all names"]
    notes += [f"backbone.entry chooses another model: {', '.join(others)}"] if others else []
    rest, depth = (name for name in tensors if not name.startswith(tuple(prefixes))), prefix.count(".")
    left_out = dict.fromkeys(".".join(name.split(".")[:depth]) for name in rest)
    notes += [f"left out, outside of {prefix!r}: {', '.join(left_out)}"] if left_out else []
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Weights(kept, (*weights.notes, "; ".join(notes)))


def _entries(content: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(content, dict) or not content or depth > MAX_DEPTH:
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield path, {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
        return
    for key, value in content.items():
        yield from _entries(value, f"{path}.{key}" if path else str(key), depth + 1)


def _chosen(names: list[str], entry: str | None) -> str:
    if entry is not None:
        matches = [name for name in names if entry in (name, name.split(".")[0])]
        if len(matches) == 1:
            return matches[0]
        raise WeightsError(f"has no entry {entry!r}; set backbone.entry to one of {', '.join(names)}")
    preferred = (name for key in PREFERRED for name in names if key in (name, name.split(".")[0]))
    chosen = next(preferred, names[0] if len(names) == 1 else None)
    if chosen is None:
        raise WeightsError(f"holds several models; set backbone.entry to one of {', '.join(names)}")
    return chosen


def _layout(tensors: dict[str, Any]) -> str:
    try:
        return recognize(tensors)
    except WeightsError:  # of a foreign architecture, which is reported where the file is loaded
        return "foreign"
