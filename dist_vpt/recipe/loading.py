"""The recipe: one typed description of a whole run, from YAML files and ``a.b=c`` overrides."""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import RecipeError, nearest
from dist_vpt.recipe.merging import COMMAND_LINE, Draft, KeyPath
from dist_vpt.recipe.messages import explain, model_at
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.yaml import Loader


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Merge recipe files in order (each on top of its own ``base:`` files), then ``a.b=c`` overrides.

    Raises RecipeError with all mistakes, each with its file and line, key, value, rule and fix.
    """
    draft = Draft(data={"method": {"name": "vpt"}})  # a method without a name is the default one
    for file in files:
        _read(Path(file), draft, asked_by=COMMAND_LINE, open_files=())
    for override in overrides:
        _override(override, draft)
    _take_published_counts(draft.data)
    try:
        recipe = _validated(draft.data)
    except ValidationError as error:
        draft.mistakes += [mistake for e in error.errors() for mistake in explain(e, draft)]
        draft.mistakes += _broken_rules(draft, error)
    if draft.mistakes:
        unique = list(dict.fromkeys(draft.mistakes))
        count = "1 mistake" if len(unique) == 1 else f"{len(unique)} mistakes"
        raise RecipeError("\n".join([f"{count} in the recipe:", *(f"  {m}" for m in unique)]))
    if recipe.run.dir is None:
        name = "-".join(Path(file).stem for file in files) or "default"
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": f"runs/{name}"})})
    return recipe


def _take_published_counts(data: dict[str, Any]) -> None:
    """Prompts and queries that nobody said: the paper's for this task, where it has them."""
    task = data.get("data", {}).get("task") if isinstance(data.get("data"), dict) else None
    row, method = TASKS.get(task) if isinstance(task, str) else None, data.get("method")
    if row is None or not isinstance(method, dict):
        return
    prepended = method.get("location", "prepend") == "prepend"
    if method.get("name") == "vpt" and method.get("deep", True) and prepended and row.prompts:
        method.setdefault("prompts", row.prompts)
    if method.get("name") == "vqt" and row.queries:
        method.setdefault("queries", row.queries)


def load_recipe_from(data: dict[str, Any]) -> Recipe:
    """A recipe from the plain data of another one (``model_dump``). Raises RecipeError."""
    try:
        return _validated(data)
    except ValidationError as error:
        found = [f"{'.'.join(str(k) for k in e['loc']) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise RecipeError("; ".join(found)) from error


def _validated(data: dict[str, Any]) -> Recipe:
    # Through JSON, where strict types (no "3" and no true for a number) still let a list be a tuple.
    return Recipe.model_validate_json(json.dumps(data, default=str), strict=True)


def _broken_rules(draft: Draft, error: ValidationError) -> list[str]:
    """Rules over several sections that are broken beside wrong keys, which keep pydantic from looking at them."""
    data, wrong = copy.deepcopy(draft.data), []
    for e in error.errors():
        _, path = model_at(e["loc"])
        into: Any = data
        for key in path[:-1]:
            into = into.get(key, {}) if isinstance(into, dict) else {}
        if path and isinstance(into, dict) and into.pop(path[-1], None) is not None:
            wrong.append(".".join(map(str, path)))
    try:
        _validated(data)
    except ValidationError as again:
        rules = [mistake for e in again.errors() if not e["loc"] for mistake in explain(e, draft)]
        return [rule for rule in rules if not any(key in rule for key in wrong)]  # of a default that nobody chose
    return []


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words -> recipe files and ``a.b=c`` overrides. Raises RecipeError for a lone ``=``."""
    if "=" in arguments:
        at = arguments.index("=")
        key, value = (" ".join(arguments[part]) for part in (slice(max(at - 1, 0), at), slice(at + 1, at + 2)))
        raise RecipeError(f"command line: {key} = {value}: a key and its value are one word; write {key}={value}")
    overrides = [word for word in arguments if re.match(r"[A-Za-z_][\w.]*=", word)]
    return [word for word in arguments if word not in overrides], overrides


def says_method(file: str) -> bool:
    """Whether a recipe file, or one that it inherits from, says anything of the method."""
    draft = Draft(data={})
    _read(Path(file), draft, asked_by=COMMAND_LINE, open_files=())
    return "method" in draft.data


def _read(file: Path, draft: Draft, asked_by: str, open_files: tuple[Path, ...]) -> None:
    if file.resolve() in open_files:
        draft.mistakes.append(f"{asked_by}: base: {file} inherits from itself; remove one of the two")
        return
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader)
        content = yaml.load(text, Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such recipe file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        siblings = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        hint = f"; {nearest(str(file), siblings)}" if siblings else ""
        draft.mistakes.append(f"{asked_by}: {file}: {reason}{hint}")
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        draft.mistakes.append(f"{file}{line}: not valid YAML: {getattr(error, 'problem', error)}; mend the syntax")
        return
    except ValueError as error:  # a tag that its value contradicts: !!int x
        draft.mistakes.append(f"{file}: not valid YAML: {error}; mend the syntax")
        return
    if content is None:
        return
    if not isinstance(content, dict):
        draft.mistakes.append(
            f"{file}:1: a recipe is a mapping of keys to values, not a {type(content).__name__}; write key: value"
        )
        return
    places = dict(_places(node, file))
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        draft.mistakes.append(
            f"{places[('base',)]}: base = {bases!r}: must be a recipe file or a list of them; mend it"
        )
        bases = []
    for base in bases:
        _read(file.parent / base, draft, asked_by=places[("base",)], open_files=(*open_files, file.resolve()))
    draft.put(content, places)


def _places(node: yaml.Node | None, file: Path, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*at, key.value)
            yield path, f"{file}:{key.start_mark.line + 1}"
            yield from _places(value, file, path)


def _override(text: str, draft: Draft) -> None:
    dotted, _, raw = text.partition("=")
    keys = dotted.split(".")
    if dotted == "base":
        draft.mistakes.append(
            f"{COMMAND_LINE}: {text}: base belongs into a recipe file; give {raw} as a word of its own"
        )
        return
    try:
        value = yaml.load(raw, Loader)
    except (yaml.YAMLError, ValueError):
        draft.mistakes.append(f"{COMMAND_LINE}: {text}: the value is not valid YAML; quote it")
        return
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    places: dict[KeyPath, str] = {tuple(keys[: i + 1]): COMMAND_LINE for i in range(len(keys))}
    draft.put(nested, places)
