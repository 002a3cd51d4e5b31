"""Values of keys that are typed where names of recipes are expected: ``demo`` in place of ``backbone.name=demo``."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.data.tasks import TASKS
from dist_vpt.files import shipped_folder
from dist_vpt.methods import METHODS

SCHEMA = "recipe.schema.json"  # in configs/
NOT_SEARCHED = ("base", "published", "backbones")  # sections whose keys stand elsewhere, too
KEYS_SHOWN = 3  # a value of more keys, such as auto, says nothing
# A name of timm's, by its shape: timm takes seconds to import.
TIMM = re.compile(r"(vit|deit3?|eva02|eva|swin)_\w+(\.\w+)?", re.ASCII)


def overrides_for(name: str) -> list[str]:
    """The overrides that a name may stand for, such as ``optim.name=adamw`` for adamw; [] for none or many."""
    if name in _keys():
        return [f"{name}=..."]
    if name in ("demo", *ZOO) or TIMM.fullmatch(name):
        return [f"backbone.name={name}"]
    if name in TASKS:
        return [f"data.task={name}"]
    if name in METHODS:
        return [f"method.name={name}"]
    found = [text for value, text in _choices() if value == name.lower()]
    return found if len(found) <= KEYS_SHOWN else []


@cache
def _keys() -> frozenset[str]:
    return frozenset(".".join(path) for path, node in _walk() if not {"$ref", "oneOf"} & node.keys())


@cache
def _choices() -> tuple[tuple[str, str], ...]:
    """Values and the overrides that give them."""
    found = []
    for path, node in _walk():
        if path[0] == "method":  # what its values mean depends on its name
            continue
        key = ".".join(path)
        for kind in (node, *node.get("anyOf", ())):
            found += [(value, f"{key}={value}") for value in _texts(kind)]
            found += [(value, f"{key}=[{value}]") for value in _texts(kind.get("items", {}))]
    return tuple(dict.fromkeys(found))


def _texts(node: dict[str, Any]) -> list[str]:
    return [value for value in node.get("enum", ()) if isinstance(value, str)]


def _walk() -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All keys of a recipe, with what the JSON Schema says of each."""
    schema = json.loads((shipped_folder("configs") / SCHEMA).read_text(encoding="utf-8"))
    left: list[tuple[tuple[str, ...], dict[str, Any]]]
    left = [((name,), node) for name, node in schema["properties"].items() if name not in NOT_SEARCHED]
    while left:
        path, node = left.pop(0)
        yield path, node
        for kind in (node, *node.get("anyOf", ()), *node.get("oneOf", ())):
            settings = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
            left += [((*path, name), inner) for name, inner in settings.get("properties", {}).items()]
