"""Pydantic's validation errors as sentences with file, line, key, value, rule and fix."""

import re
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dist_vpt.errors import nearest
from dist_vpt.recipe.merging import Draft, KeyPath
from dist_vpt.recipe.schema import Recipe

FIXES = {  # by pydantic's type of error, with the values of its context
    "bool_type": "use true or false, without quotes",
    "dict_type": "use {{KEY: VALUE}}",
    "finite_number": "give a number other than inf and nan",
    "float_type": "use a number such as 0.1, without quotes",
    "greater_than": "use a value above {gt}",
    "greater_than_equal": "use {ge} or more",
    "int_from_float": "use a whole number",
    "int_type": "use a whole number such as 3, without quotes",
    "less_than": "use a value below {lt}",
    "less_than_equal": "use {le} or less",
    "list_type": "use a list such as [a, b]",
    "missing": "give every value of the list",
    "model_attributes_type": "use {{KEY: VALUE}}",
    "model_type": "use {{KEY: VALUE}}",
    "string_too_short": "use null to leave it out",
    "string_type": "use text, in quotes if it looks like a number",
    "too_long": "leave values out",
    "too_short": "add a value",
    "tuple_type": "use a list such as [a, b]",
}


def explain(error: Any, draft: Draft) -> list[str]:
    """One of pydantic's errors as "location: key = value: rule; fix"; several where a validator reports several."""
    model, path = model_at(error["loc"])
    key, value = ".".join(map(str, path)), error["input"]
    location, kind, context = draft.location(path), error["type"], error.get("ctx", {})
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return [_unknown_method(path, value, context, draft)]
    if kind == "value_error":  # from a validator of the schema, whose message names keys and fix
        messages = str(context.get("error", error["msg"])).split("\n")
        if not key:
            return [f"{_locations_of_keys_in(message, draft)}: {message}" for message in messages]
        if isinstance(value, dict):  # of a section, whose messages begin with a key in it
            return [f"{_location_of_first_key(path, message, draft)}: {key}.{message}" for message in messages]
        joined = ": " if path[-1] == value else " = "  # of a name that the user gave, or of a value
        return [f"{location}: {key}{joined}{message}" for message in messages]
    if kind == "extra_forbidden":
        names = [*(model.model_fields if model else ()), *(("base", "published") if model is Recipe else ())]
        rule = f"unknown key; {nearest(str(path[-1]), names)}"
    elif kind == "literal_error":
        expected = str(context.get("expected", ""))
        choices = re.findall(r"'([^']*)'", expected) or re.findall(r"\d+", expected)
        rule = f"must be one of its choices; {nearest(str(value), choices)}"
    else:
        rule = re.sub("^(Input|String|Tuple|List) should ", "must ", error["msg"]).replace(" after validation", "")
        bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        fix = FIXES.get(kind, "").format(**bounds)
        rule = f"{rule[0].lower()}{rule[1:]}" + (f"; {fix}" if fix else "")
    return [f"{location}: {key} = {value!r}: {rule}"]


def model_at(loc: KeyPath) -> tuple[type[BaseModel] | None, KeyPath]:
    """The model that holds the last key of a pydantic location, and the location without union tags."""
    model: type[BaseModel] | None = Recipe
    path: list[str | int] = []
    tagged: dict[str, type[BaseModel]] = {}
    for i, key in enumerate(loc):
        if tagged and key in tagged:  # a discriminator's tag, not a key of the recipe
            model, tagged = tagged[str(key)], {}
            continue
        path.append(key)
        if i == len(loc) - 1 or model is None:
            break
        if isinstance(key, int):  # of a list
            continue
        info = model.model_fields.get(str(key))
        members = list(_union_members(info.annotation)) if info else []
        tagged = {tag: member for member in members for tag in _tags(member)} if len(members) > 1 else {}
        model = members[0] if members else None
    return model, tuple(path)


def _unknown_method(path: KeyPath, value: Any, context: dict[str, Any], draft: Draft) -> str:
    name = value.get("name") if isinstance(value, dict) else value
    names = re.findall(r"'(\w+)'", str(context.get("expected_tags", ""))) or [
        tag for member in _union_members(Recipe.model_fields["method"].annotation) for tag in _tags(member)
    ]
    location = draft.location((*path, "name"))
    return f"{location}: {'.'.join(map(str, path))}.name = {name!r}: not a method; {nearest(str(name), names)}"


def _locations_of_keys_in(message: str, draft: Draft) -> str:
    """Where the keys that a message mentions were set, in its order: the key at fault is its first."""
    section = message.partition(":")[0]  # which a message without such keys begins with
    mentioned = [path for path in draft.locations if len(path) > 1 and ".".join(map(str, path)) in message]
    mentioned.sort(key=lambda path: message.index(".".join(map(str, path))))
    return ", ".join(dict.fromkeys(draft.locations[path] for path in mentioned)) or draft.location((section,))


def _location_of_first_key(section: KeyPath, message: str, draft: Draft) -> str:
    """Where the key with which a section's message begins was set."""
    return draft.location((*section, *re.split(r"[^\w.]", message)[0].split(".")))


def _union_members(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None or isinstance(annotation, type(Union[int, str])):  # noqa: UP007
        for part in get_args(annotation):
            yield from _union_members(part)


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    name = model.model_fields.get("name")
    return get_args(name.annotation) if name and get_origin(name.annotation) is Literal else ()
