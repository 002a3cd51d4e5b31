"""A recipe file and its bases, or an a.b=c override, read into a draft."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_vpt.errors import RecipeError, nearest
from dist_vpt.files import printable
from dist_vpt.recipe.merging import COMMAND_LINE, Draft, KeyPath
from dist_vpt.recipe.messages import model_at
from dist_vpt.recipe.shipped import find_recipe, nearest_names, shipped_recipes
from dist_vpt.recipe.yaml import Loader

NOT_YAML = (
    yaml.YAMLError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
)  # a tag that its value contradicts: !!int x
NULLS = ("", "~", "null", "Null", "NULL")
MAX_BYTES = 1_000_000  # of a recipe file
MAX_VALUES = 100_000  # of a recipe file with its aliases written out


def read_file(name: str, draft: Draft, *, requested_by: str = COMMAND_LINE, parents: tuple[Path, ...] = ()) -> None:
    """Merge a file, by path or name, on top of its own ``base:`` files. Mistakes are collected in the draft."""
    try:
        file = find_recipe(name, parents[-1].parent if parents else Path())
        if file.resolve() in [parent.resolve() for parent in parents]:
            raise RecipeError(f"base: {file} inherits from itself; remove this base")
        text = _read_text(file)
    except RecipeError as error:
        draft.mistakes.append(f"{requested_by}: {error}")
        return
    try:
        content, node = _parse(text, file)
    except RecipeError as error:
        draft.mistakes.append(str(error))
        return
    _merge_with_bases(content, dict(_locations(node, file)), draft, (*parents, file))


def read_mapping(values: Mapping[str, Any], draft: Draft, location: str) -> None:
    """Merge the content of a recipe file that a program gives: keys, sections, ``base`` and dotted keys (``a.b``).

    ``location``: how messages call it.
    """
    content = _nested(values)
    _merge_with_bases(content, dict(_paths(content, location)), draft, ())


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which ``{"a.b": c}`` is ``{"a": {"b": c}}``."""
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, key = str(dotted).split(".")
        target = nested
        for section in sections:
            target[section] = inner = dict(target[section]) if isinstance(target.get(section), Mapping) else {}
            target = inner
        inside = _nested(value) if isinstance(value, Mapping) else value
        before = target.get(key)
        target[key] = before | inside if isinstance(before, dict) and isinstance(inside, dict) else inside
    return nested


def _paths(content: Mapping[str, Any], location: str, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    for key, value in content.items():
        yield (*at, key), location
        if isinstance(value, Mapping):
            yield from _paths(value, location, (*at, key))


def _merge_with_bases(
    content: dict[str, Any], locations: Mapping[KeyPath, str], draft: Draft, files: tuple[Path, ...]
) -> None:
    """Merge the content of a recipe on top of its bases. ``files``: those whose bases led to it, itself the last."""
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        rule = "must be a recipe file or a list of them; write base: [FILE, FILE]"
        draft.mistakes.append(f"{locations[('base',)]}: base = {bases!r}: {rule}")
        bases = []
    for base in bases:
        read_file(base, draft, requested_by=locations[("base",)], parents=files)
    published = content.pop("published", {})
    if not isinstance(published, dict):
        rule = "must be a mapping of keys to values, merged with protocol: published; write published: {KEY: VALUE}"
        draft.mistakes.append(f"{locations[('published',)]}: published = {published!r}: {rule}")
        published = {}
    for key in ("base", "published", "protocol"):
        if key in published:
            rule = "is a key of the file itself, not of its section published; leave it out"
            draft.mistakes.append(f"{locations[('published', key)]}: published.{key} = {published.pop(key)!r}: {rule}")
    draft.merge(content, locations)
    if draft.protocol == "published":
        draft.merge(published, {path[1:]: place for path, place in locations.items() if path[0] == "published"})


def read_override(text: str, draft: Draft) -> None:
    """Merge ``a.b=c``, c being YAML, or text where it begins with ``#`` or the key takes nothing but text."""
    dotted, _, raw = text.partition("=")
    keys = dotted.split(".")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that this process could not decode
        rule = "not text in UTF-8; rename the file, or set LC_ALL=C.UTF-8"
        draft.mistakes.append(f"{COMMAND_LINE}: {printable(text)}: {rule}")
        return
    if keys[0] in ("base", "published"):
        fix = f"give {raw} as an argument of its own" if dotted == "base" else "leave published out, and set the key"
        rule = f"{keys[0]} is a key of recipe files only; {fix}"
        draft.mistakes.append(f"{COMMAND_LINE}: {text}: {rule}")
        return
    plain = raw.strip()
    as_typed = raw.startswith("#")  # a color: YAML would read a comment
    # YAML would make a number of the folder 2024, and cut "set #2".
    as_typed = as_typed or (_takes_text(keys) and plain not in NULLS and plain[:1] not in ("'", '"'))
    try:
        value = plain if as_typed else yaml.load(raw, Loader)
    except NOT_YAML:
        draft.mistakes.append(f"{COMMAND_LINE}: {text}: the value is not valid YAML; quote it")
        return
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    draft.merge(nested, {tuple(keys[: i + 1]): COMMAND_LINE for i in range(len(keys))})


def _takes_text(keys: list[str]) -> bool:
    """Whether a key of the recipe takes text, such as a path, and nothing else but null."""
    model, path = model_at(tuple(keys))
    field = model.model_fields.get(keys[-1]) if model is not None and len(path) == len(keys) else None
    return field is not None and field.annotation in (str, str | None)


def read_content(file: Path) -> dict[str, Any]:
    """The content of one file as it is, without the files that it inherits from. Raises RecipeError."""
    return _parse(_read_text(file), file)[0]


def _read_text(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{file}: is no recipe: it has more than {MAX_BYTES:,} bytes")
        return content.decode("utf-8")
    except FileNotFoundError:
        siblings = [str(path) for path in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        hint = nearest(str(file), siblings)
        if not hint.startswith("did you mean"):  # YAML files that need not be recipes
            hint = "correct the path"
        if file.stem in {recipe.name for recipe in shipped_recipes()}:
            hint = nearest_names(file.stem)
        raise RecipeError(f"{file}: no such recipe file; {hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: cannot be read: byte {error.start} is not UTF-8; save it as UTF-8 text") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error}") from error


def _parse(text: str, file: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """The content of a file, and its YAML nodes, which know their lines."""
    try:
        node = yaml.compose(text, Loader)
        _refuse_expansion(node, file)
        content = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error)
        fix = "" if ";" in problem else "; correct the syntax"
        raise RecipeError(f"{file}{line}: not valid YAML: {problem}{fix}") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: not valid YAML: nested too deeply; correct the syntax") from error
    except NOT_YAML as error:
        raise RecipeError(f"{file}: not valid YAML: {error}; correct the syntax") from error
    if content is None:
        return {}, node
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys to values, not a {kind}; write key: value")
    return content, node


def _refuse_expansion(node: yaml.Node | None, file: Path) -> None:
    """Raises RecipeError for aliases that contain themselves, or that stand for too many values."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_VALUES  # until it is known: a node that is reached again contains itself
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if node is not None and size(node) > MAX_VALUES:
        raise RecipeError(f"{file}: its aliases stand for more than {MAX_VALUES:,} values; write out what is meant")


def _locations(node: yaml.Node | None, file: Path, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*at, key.value)
            yield path, f"{file}:{key.start_mark.line + 1}"
            yield from _locations(value, file, path)
