"""The key ``backbones``: names of recipes, where they stand for a backbone, replaced by what these recipes say."""

from pathlib import Path
from typing import Any

from dist_vpt.recipe.merging import COMMAND_LINE, Draft
from dist_vpt.recipe.reading import read_file

DEMO = "demo"  # the backbone in this package, which has no recipe


def expand_backbones(draft: Draft) -> None:
    """Replace each name, or mapping with a ``base``, by a mapping alone. Mistakes are collected in the draft."""
    listed = draft.data.get("backbones")
    if isinstance(listed, str):
        listed = [listed]  # which is too few, as the recipe's rules say
    if not isinstance(listed, list):
        return
    draft.data["backbones"] = [_expanded(each, f"backbones[{n}]", draft) for n, each in enumerate(listed)]


def _expanded(given: Any, key: str, draft: Draft) -> Any:
    if isinstance(given, str):
        given = {"base": given}
    where = draft.location(("backbones",))
    if not isinstance(given, dict):
        return given
    if not given.keys() & {"base", "name"}:  # the default would be the demo, which nobody asked for
        draft.mistakes.append(f"{where}: {key} = {given!r}: names no backbone; add name: MODEL or base: RECIPE")
        return {"name": key, **given}  # whatever else is wrong is reported beside it
    if "base" not in given:
        return given
    own = {name: value for name, value in given.items() if name != "base"}
    base = given["base"]
    if base == DEMO:
        return {"name": DEMO, **own}
    if not isinstance(base, str):
        draft.mistakes.append(f"{where}: {key}.base = {base!r}: must be the name of one recipe; write base: NAME")
        return {"name": key, **own}
    return _of_recipe(base, own, key, draft)


def _of_recipe(base: str, own: dict[str, Any], key: str, draft: Draft) -> dict[str, Any]:
    """The backbone of a recipe, changed by ``own``."""
    where, read = draft.location(("backbones",)), Draft(protocol=draft.protocol)
    # A file in a recipe file's list is relative to that file, as its bases are.
    listed_in = () if where == COMMAND_LINE else (Path(where.rpartition(":")[0]),)
    read_file(base, read, requested_by=f"{where}: {key}", parents=listed_in)
    draft.mistakes += read.mistakes
    if not read.mistakes and not isinstance(read.data.get("backbone"), dict):
        draft.mistakes.append(
            f"{where}: {key} = {base!r}: a recipe without a backbone; name one of `dist-vpt recipe list` that has one, "
            "or write {name: MODEL} for a model of timm"
        )
    if read.mistakes or not isinstance(read.data.get("backbone"), dict):
        return {"name": base, **own}  # whatever else is wrong is reported beside it
    theirs, given_size = _image_size(read), _image_size(draft)  # what is given for all counts more than a recipe's
    size = {"image_size": theirs} if theirs and not given_size else {}
    return {**size, **read.data["backbone"], **own}


def _image_size(draft: Draft) -> Any:
    data = draft.data.get("data")
    return data.get("image_size") if isinstance(data, dict) else None
