"""What a probe sweeps: a recipe for each backbone and method. No torch is imported: mistakes show at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_vpt.data.formats import check_root
from dist_vpt.errors import UserError, nearest
from dist_vpt.recipe.backbones import DEMO
from dist_vpt.recipe.loading import load_recipe, sets_method, split_overrides
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.shipped import find_recipe, merge_order, shipped_recipes

METHODS = ("knn", "logistic", "linear")


@dataclass(frozen=True)
class Probed:
    """A backbone, and the recipe of each method's sweep on it."""

    backbone: str
    recipes: dict[str, Recipe]


def plan_probe(arguments: Sequence[str], backbones: Sequence[str], out: str) -> list[Probed]:
    """The sweeps of a probe. ``arguments``: recipes of the data, and overrides; no ``backbones``: demo and all shipped.

    Raises RecipeError for mistakes in recipes, and UserError for backbones that do not exist and for arguments that a
    probe sets itself.
    """
    names, overrides = split_overrides(arguments)
    kinds = {recipe.file.resolve(): recipe.kind for recipe in shipped_recipes()}
    for name in names:
        if kinds.get(find_recipe(name).resolve()) == "backbone":
            raise UserError(f"probe: {name} is a backbone; name it in --backbones")
        if sets_method(name):
            raise UserError(f"probe: {name} sets a method, and a probe runs {', '.join(METHODS)}; leave it out")
    for override in overrides:
        if override.startswith(("method.", "backbone.name=", "backbone.weights=", "run.dir=")):
            raise UserError(f"probe: {override}: differs between its runs and is set by it; leave it out")
    shipped = [recipe.name for recipe in shipped_recipes() if recipe.kind == "backbone"]
    chosen = list(backbones) or [DEMO, *shipped]
    labels = [_label(backbone, shipped) for backbone in chosen]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"--backbones: {twice} is the name of two of them; give each once")
    settings = ["protocol=default", "data.augment=none", "sweep.seeds=[0]", "run.trackers=[]"]  # a table, no curves
    settings += ["stream.cache=disk", f"stream.dir={Path(out) / 'streams'}"]
    found = load_recipe(merge_order([*names, "linear"]), list(overrides))
    if found.data.labels == "multiple":
        raise UserError(
            "probe: data.labels = multiple: knn and logistic are fitted to one label an image; compare backbones with "
            "`dist-vpt sweep linear BACKBONE` and the same data"
        )
    plan = []
    for label, backbone in zip(labels, chosen, strict=True):
        files, more = (names, ["backbone.name=demo"]) if backbone == DEMO else ([*names, backbone], [])
        recipes = {
            method: load_recipe(
                merge_order([*files, method]),
                [*more, *settings, f"run.dir={Path(out) / label / method}", *overrides],
            )
            for method in METHODS
        }
        if any(recipe.backbones for recipe in recipes.values()):
            raise UserError("probe: backbones: each is probed alone; leave this key out, and name them in --backbones")
        plan.append(Probed(label, recipes))
    check_root(plan[0].recipes[METHODS[0]].data, test=True)  # weights that are missing fail alone
    return plan


def _label(backbone: str, shipped: Sequence[str]) -> str:
    """The name of a backbone's folder and row. Raises UserError where there is none such."""
    if backbone in (DEMO, *shipped):
        return backbone
    file = Path(backbone)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--backbones {backbone}: neither the name of a backbone's recipe nor a .yaml file; "
            f"{nearest(backbone, [DEMO, *shipped])}"
        )
    if not file.is_file():
        raise UserError(
            f"--backbones {backbone}: there is no such file; name a recipe of your own, or one of {shipped}"
        )
    return file.stem
