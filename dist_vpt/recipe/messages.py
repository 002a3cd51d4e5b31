"""Mistakes in a recipe, as sentences with file, line, key, value, rule and fix."""

import re
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dist_vpt.errors import nearest
from dist_vpt.recipe.merging import Draft, KeyPath
from dist_vpt.recipe.schema import Recipe


def explain(error: Any, draft: Draft) -> list[str]:
    """Mistakes, one but for rules over several keys, as place: key = value: rule; fix."""
    loc: KeyPath = error["loc"]
    model, path = model_at(loc)
    key = ".".join(map(str, path))
    place = next((draft.said[path[:n]] for n in range(len(path), 0, -1) if path[:n] in draft.said), "recipe")
    kind, context = error["type"], error.get("ctx", {})
    value = error["input"]
    if kind == "extra_forbidden":
        names = [*(model.model_fields if model else ()), *(("base",) if model is Recipe else ())]
        return [f"{place}: {key} = {value!r}: unknown key; {nearest(str(path[-1]), names)}"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, dict) else value
        tags = re.findall(r"'(\w+)'", str(context.get("expected_tags", ""))) or [
            tag for member in _union_members(Recipe.model_fields["method"].annotation) for tag in _tag(member)
        ]
        place = draft.said.get((*path, "name"), place)
        return [f"{place}: {key}.name = {name!r}: not a method; {nearest(str(name), tags)}"]
    if kind == "value_error":  # a rule over several keys: its own message names keys and fix
        messages = str(context.get("error", error["msg"])).split("\n")
        if key:
            return [f"{place}: {key}: {message}" for message in messages]
        return [f"{_location_of(message, draft)}: {message}" for message in messages]
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return [f"{place}: {key} = {value!r}: must be one of its choices; {nearest(str(value), expected)}"]
    rule = error["msg"][0].lower() + error["msg"][1:]
    return [f"{place}: {key} = {value!r}: {rule}; mend the value"]


def _location_of(message: str, draft: Draft) -> str:
    """Where the keys that a message mentions were said."""
    mentioned = [path for path in draft.said if len(path) > 1 and ".".join(map(str, path)) in message]
    return ", ".join(dict.fromkeys(draft.said[path] for path in mentioned)) or "recipe"


def model_at(loc: KeyPath) -> tuple[type[BaseModel] | None, KeyPath]:
    """The model that holds the last key of a pydantic location, and the location without union tags."""
    model: type[BaseModel] | None = Recipe
    path: list[str | int] = []
    pending: dict[str, type[BaseModel]] = {}
    for i, key in enumerate(loc):
        if pending and key in pending:  # a discriminator's tag, not a key of the recipe
            model, pending = pending[str(key)], {}
            continue
        path.append(key)
        if i == len(loc) - 1 or model is None:
            break
        info = model.model_fields.get(str(key))
        members = list(_union_members(info.annotation)) if info else []
        pending = {tag: member for member in members for tag in _tag(member)} if len(members) > 1 else {}
        model = members[0] if members else None
    return model, tuple(path)


def _union_members(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None or isinstance(annotation, type(Union[int, str])):  # noqa: UP007
        for part in get_args(annotation):
            yield from _union_members(part)


def _tag(model: type[BaseModel]) -> tuple[str, ...]:
    name = model.model_fields.get("name")
    return get_args(name.annotation) if name and get_origin(name.annotation) is Literal else ()
