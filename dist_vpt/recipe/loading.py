"""A recipe from shipped recipes, YAML files and ``a.b=c`` overrides."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.weights.zoo import has_learned_positions
from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import RecipeError
from dist_vpt.recipe.backbones import expand_backbones
from dist_vpt.recipe.merging import COMMAND_LINE, Draft
from dist_vpt.recipe.messages import explain, model_at
from dist_vpt.recipe.reading import read_file, read_mapping, read_override
from dist_vpt.recipe.schema import Protocol, Recipe, TrainConfig
from dist_vpt.recipe.shipped import is_shipped, merge_order

Source = str | Path | Mapping[str, Any]  # a recipe: its path or name, or what its file would hold


def load_recipe(
    files: Sequence[Source],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    protocol: Protocol = "default",
) -> Recipe:
    """Merge recipes in order (each on top of its own ``base:`` files), then ``a.b=c`` overrides or a mapping of them.

    ``protocol``: that of a recipe which gives none.

    Raises RecipeError with all mistakes, each with its file and line, key, value, rule and fix.
    """
    draft = _merged(files, overrides, "default")
    draft.data.setdefault("protocol", protocol)
    if draft.data["protocol"] == "published":  # known now, whichever file or override gives it
        draft = _merged(files, overrides, "published")
        draft.data.setdefault("protocol", protocol)
    expand_backbones(draft)
    _fill_in(draft.data)
    try:
        recipe = _validated(draft.data)
    except ValidationError as error:
        draft.mistakes += [mistake for e in error.errors() for mistake in explain(e, draft)]
        draft.mistakes += _broken_rules(draft, error)
    if draft.mistakes:
        unique = list(dict.fromkeys(draft.mistakes))
        count = "1 mistake" if len(unique) == 1 else f"{len(unique)} mistakes"
        raise RecipeError("\n".join([f"{count} in the recipe:", *(f"  {m}" for m in unique)]))
    names = [recipe.method.name if isinstance(file, Mapping) else Path(file).stem for file in files]
    name = "-".join(names) or "default"
    folder = os.path.expanduser(recipe.run.dir or f"runs/{name}")  # shells leave the ~ of run.dir=~/runs as it is
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": folder})})


def recipe_of(
    recipes: "Recipe | Source | Sequence[Recipe | Source]",
    overrides: Mapping[str, Any],
    *,
    protocol: Protocol = "default",
) -> Recipe:
    """What a Python program calls a recipe: names, files, dictionaries, recipes or a sequence of them, and overrides.

    Shipped recipes are merged first, by kind, then all others in the order given. Raises RecipeError.
    """
    given = list(recipes) if isinstance(recipes, Sequence) and not isinstance(recipes, str) else [recipes]
    for wrong in (each for each in given if not isinstance(each, Recipe | str | Path | Mapping)):
        raise RecipeError(
            f"recipe = {wrong!r}: a recipe is a name, a file, a dictionary or a Recipe, and no {type(wrong).__name__}"
        )
    shipped = [each for each in given if isinstance(each, str | Path) and is_shipped(str(each))]
    others = [each.model_dump(mode="json") if isinstance(each, Recipe) else each for each in given]
    sources = [*merge_order([str(each) for each in shipped]), *(each for each in others if each not in shipped)]
    return load_recipe(sources, overrides, protocol=protocol)


def _merged(files: Sequence[Source], overrides: Sequence[str] | Mapping[str, Any], protocol: Protocol) -> Draft:
    draft = Draft(data={"method": {"name": "vpt"}}, protocol=protocol)  # a method without a name is the default one
    for file in files:
        if isinstance(file, Mapping):
            read_mapping(file, draft, "recipe")
        else:
            read_file(str(file), draft, requested_by="recipe" if isinstance(overrides, Mapping) else COMMAND_LINE)
    if isinstance(overrides, Mapping):
        read_mapping(overrides, draft, "arguments")
    else:
        for override in overrides:
            read_override(override, draft)
    return draft


def load_recipe_from(data: dict[str, Any]) -> Recipe:
    """A recipe from the plain data of another one (``model_dump``). Raises RecipeError."""
    try:
        return _validated(data)
    except ValidationError as error:
        found = []
        for e in error.errors():
            _, path = model_at(e["loc"])
            rule = "there is no such key; leave it out" if e["type"] == "extra_forbidden" else e["msg"]
            found.append(f"{'.'.join(map(str, path)) or 'recipe'}: {rule}")
        raise RecipeError("; ".join(found)) from error


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments -> recipes in the order in which they are merged, and ``a.b=c`` overrides.

    Shipped recipes come first, by kind; then the user's files in the order given. Raises RecipeError for a lone ``=``
    and for two recipes of a kind that a run has one of.
    """
    names, overrides = split_overrides(arguments)
    return merge_order(names), overrides


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments -> others, and ``a.b=c`` overrides. Raises RecipeError for a lone ``=``."""
    if "=" in arguments:
        at = arguments.index("=")
        key, value = (" ".join(arguments[part]) for part in (slice(max(at - 1, 0), at), slice(at + 1, at + 2)))
        rule = f"an override has no spaces around =; write {key or 'KEY'}={value or 'VALUE'}"
        raise RecipeError(f"command line: {key} = {value}: {rule}")
    for argument in arguments:
        if spaced := re.match(r"\s*([A-Za-z_][\w.]*)\s*=\s*", argument):
            key, value = spaced[1], argument[spaced.end() :]
            if not argument.startswith(f"{key}="):
                raise RecipeError(f"command line: {argument}: an override has no spaces around =; write {key}={value}")
    overrides = [argument for argument in arguments if re.match(r"[A-Za-z_][\w.]*=", argument)]
    return [argument for argument in arguments if argument not in overrides], overrides


def sets_method(file: str) -> bool:
    """Whether a recipe, or one that it inherits from, has a section ``method``."""
    draft = Draft()
    read_file(file, draft)
    return "method" in draft.data


def _fill_in(data: dict[str, Any]) -> None:
    """Set keys that are not given and depend on others: on the protocol, on the number of epochs, on the task."""
    optim, train = data.get("optim"), data.get("train")
    if data["protocol"] == "published":
        _take_published_settings(data)
    if isinstance(optim, dict) and optim.get("warmup_epochs", 0) is None:
        epochs = train.get("epochs") if isinstance(train, dict) else None
        epochs = TrainConfig().epochs if epochs is None else epochs
        optim["warmup_epochs"] = epochs / 10 if isinstance(epochs, int) else 0.0  # else it is reported
    _take_published_counts(data)


def _take_published_settings(data: dict[str, Any]) -> None:
    """Keys that are the same in the published code of all methods, where they are not given."""
    method, several = data.get("method"), data.get("backbones")
    backbones = several if isinstance(several, list) else [data.setdefault("backbone", {})]
    if isinstance(method, dict):
        method.setdefault("head", "published")
        if method.get("name") in ("vpt", "vqt"):
            method.setdefault("init", "random")
    for backbone in backbones:
        name = backbone.get("name", BackboneConfig().name) if isinstance(backbone, dict) else None
        if isinstance(name, str) and has_learned_positions(name):
            backbone.setdefault("position_resize", "vpt")


def _take_published_counts(data: dict[str, Any]) -> None:
    """Where neither prompts nor queries are given, take the paper's number for this task, if it has one."""
    task = data.get("data", {}).get("task") if isinstance(data.get("data"), dict) else None
    row, method = TASKS.get(task) if isinstance(task, str) else None, data.get("method")
    if row is None or not isinstance(method, dict):
        return
    prepended = method.get("location", "prepend") == "prepend"
    if method.get("name") == "vpt" and method.get("deep", True) and prepended and row.prompts:
        method.setdefault("prompts", row.prompts)
    if method.get("name") == "vqt" and row.queries:
        method.setdefault("queries", row.queries)


def _validated(data: dict[str, Any]) -> Recipe:
    # Through JSON, where strict types (no "3" and no true for a number) still let a list be a tuple.
    return Recipe.model_validate_json(json.dumps(data, default=str), strict=True)


def _broken_rules(draft: Draft, error: ValidationError) -> list[str]:
    """Rules over several sections that are broken beside wrong keys, which keep pydantic from checking them."""
    data, wrong = copy.deepcopy(draft.data), []
    for e in error.errors():
        _, path = model_at(e["loc"])
        section: Any = data
        for key in path[:-1]:
            section = section.get(key, {}) if isinstance(section, dict) else {}
        if path and isinstance(section, dict) and section.pop(path[-1], None) is not None:
            wrong.append(".".join(map(str, path)))
    try:
        _validated(data)
    except ValidationError as rules_error:
        rules = [mistake for e in rules_error.errors() if not e["loc"] for mistake in explain(e, draft)]
        return [rule for rule in rules if not any(key in rule for key in wrong)]  # of a default that nobody chose
    return []
