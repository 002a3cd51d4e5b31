"""The recipes that come with the package: each has a name, and a kind that decides when it is merged."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dist_vpt.errors import RecipeError, UserError
from dist_vpt.files import shipped_folder
from dist_vpt.recipe.values_as_names import overrides_for
from dist_vpt.recipe.yaml import Loader

KINDS = ("base", "complete", "backbone", "data", "task", "method")  # in the order in which they are merged
KIND_OF_FOLDER = {"backbone": "backbone", "data": "data", "vtab": "task", "fgvc": "task", "method": "method"}


@dataclass(frozen=True)
class ShippedRecipe:
    """A file of configs/. Complete recipes in a folder are named with it (digits/vqt), as is what they share.

    All others are named by their stem.
    """

    path: str  # in configs/, without .yaml
    kind: str
    file: Path

    @property
    def name(self) -> str:
        stem = Path(self.path).name
        return self.path if self.kind == "complete" or stem == "common" else stem

    @property
    def summary(self) -> str:
        """The first sentence of the comment that the file begins with."""
        lines = [line for line in self.file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        text = " ".join(line[2:] for line in lines if not line.startswith(("# yaml-language-server", "#   ")))
        return re.split(r"(?<=[.])\s", text, maxsplit=1)[0].rstrip(".")


@cache
def shipped_recipes() -> tuple[ShippedRecipe, ...]:
    """All of them, in the order in which they are merged."""
    folder, recipes = shipped_folder("configs"), []
    for file in sorted(folder.rglob("*.yaml")):
        path = file.relative_to(folder).with_suffix("").as_posix()
        kind = "base" if file.stem in ("base", "common") else KIND_OF_FOLDER.get(path.split("/")[0], "complete")
        recipes.append(ShippedRecipe(path, kind, file))
    return tuple(sorted(recipes, key=lambda recipe: KINDS.index(recipe.kind)))


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """Find a recipe file by path (relative to ``folder``) or by the name of a shipped recipe.

    A path that ends in .yaml is returned though there is no such file. Raises RecipeError for an unknown name.
    """
    file = folder / name
    if file.is_file():
        return file
    matches = [recipe for recipe in shipped_recipes() if name in (recipe.name, recipe.path)]
    if len(matches) > 1:
        paths = ", ".join(recipe.path for recipe in matches)
        raise RecipeError(f"{name}: the name of several recipes; write one of {paths}")
    if matches:
        return matches[0].file
    if file.exists() or file.suffix in (".yaml", ".yml"):
        return file
    raise RecipeError(f"{name}: neither a file nor the name of a recipe; {_meant(name)}")


def is_shipped(name: str) -> bool:
    """Whether a name or a path is that of a shipped recipe."""
    try:
        file = find_recipe(name).resolve()
    except RecipeError:
        return False
    return any(file == recipe.file.resolve() for recipe in shipped_recipes())


def nearest_names(name: str) -> str:
    """A hint that ends a message about an unknown name."""
    close = _close_names(name)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "`dist-vpt recipe list` shows all names"


def _close_names(name: str) -> list[str]:
    return difflib.get_close_matches(name, [recipe.name for recipe in shipped_recipes()], n=3, cutoff=0.6)


def _meant(name: str) -> str:
    """A hint for what is neither: the overrides that it may stand for, and the nearest names of recipes."""
    overrides, close = " or ".join(overrides_for(name)), _close_names(name)
    if not overrides:
        return nearest_names(name)
    return f"write {overrides}" + (f", or name {' or '.join(map(repr, close))}" if close else "")


def merge_order(names: Sequence[str]) -> list[str]:
    """Shipped recipes by kind, whether named or given by path; then files of the user, in the order given.

    Raises RecipeError for two recipes of a kind that a run has one of: which one wins would depend on their order.
    """
    kinds = {recipe.file.resolve(): KINDS.index(recipe.kind) for recipe in shipped_recipes()}

    def order(name: str) -> int:
        try:
            return kinds.get(find_recipe(name).resolve(), len(KINDS))
        except RecipeError:  # loading the recipe reports it
            return len(KINDS)

    ordered = sorted(names, key=order)
    for kind in ("backbone", "data", "task", "method"):
        same = [name for name in ordered if order(name) == KINDS.index(kind)]
        if len(same) > 1:
            raise RecipeError(
                f"{' '.join(same)}: {len(same)} recipes of the kind {kind}, and a run has one; remove the others"
            )
    return ordered


def copy_recipe(name: str, target: str | None = None) -> Path:
    """Write a copy of a shipped recipe that can be loaded from anywhere: its bases are given by name."""
    file = find_recipe(name)
    recipe = next((recipe for recipe in shipped_recipes() if recipe.file.resolve() == file.resolve()), None)
    if recipe is None:
        raise UserError(f"{name}: not a recipe that comes with the package; copy your own files with cp")
    path = Path(target or f"{file.stem}.yaml")
    try:
        with open(path, "x", encoding="utf-8") as copy:
            copy.write(_with_named_bases(recipe.file))
    except FileExistsError:
        raise UserError(f"{path}: exists already; name another file: dist-vpt recipe copy {name} FILE") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    return path


def _with_named_bases(file: Path) -> str:
    lines = [
        line
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
        if not line.startswith("# yaml-language-server")  # points at the schema by a relative path
    ]
    text = "".join(lines)
    bases = (yaml.load(text, Loader) or {}).get("base", [])
    names = {recipe.file.resolve(): recipe.name for recipe in shipped_recipes()}
    named = [names[(file.parent / base).resolve()] for base in ([bases] if isinstance(bases, str) else bases)]
    return re.sub(r"^base:.*$", f"base: [{', '.join(named)}]", text, flags=re.MULTILINE)
