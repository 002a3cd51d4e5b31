"""Mistakes of a search that show in a moment: before torch and Optuna are imported."""

from importlib.util import find_spec

from dist_vpt.errors import RecipeError, UserError
from dist_vpt.experiments.sweep_grid import unknown_key, with_values
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.search_space import Range, drawn_from


def check_search(recipe: Recipe) -> None:
    """Raise UserError for a search that cannot be made: by its method, its protocol, its keys and values."""
    sweep, method = recipe.sweep, recipe.method
    if sweep.search != "optuna":
        return
    if recipe.protocol == "published":
        raise RecipeError(
            "sweep.search = optuna: protocol = published is a grid, so that numbers compare with the paper's; add "
            "protocol=default, or use search=grid"
        )
    if method.reader:
        raise RecipeError(
            f"sweep.search = optuna: method.name = {method.name} is a reader, which trains a whole grid in one pass "
            "over the frozen stream; settings that are drawn one after the other cannot share one; use search=grid"
        )
    if sweep.parallelize == "batch":
        raise RecipeError("sweep.search = optuna: each process trains trials of its own; set sweep.parallelize=trials")
    _check_values(recipe)
    if find_spec("optuna") is None:
        raise UserError("sweep.search = optuna: Optuna is not installed; pip install 'dist-vpt[optuna]'")


def _check_values(recipe: Recipe) -> None:
    """Raise RecipeError for keys that do not exist and for ends of ranges that the recipe does not take."""
    mistakes, data, key = [], recipe.model_dump(mode="json"), "grid" if recipe.sweep.space is None else "space"
    for name, drawn in drawn_from(recipe.sweep.space, recipe.sweep.grid).items():
        if mistake := unknown_key(data, name):
            mistakes.append(f"sweep.{key}.{mistake}")
            continue
        for value in (drawn.low, drawn.high) if isinstance(drawn, Range) else drawn:
            try:
                trial = with_values(recipe, {name: value})
            except RecipeError as error:
                mistakes.append(f"sweep.{key}.{name} = {value!r}: {error}")
                continue
            if trial.method.reader:
                mistakes.append(f"sweep.{key}.{name} = {value!r}: reads the frozen stream; leave it out")
    if mistakes:
        raise RecipeError("\n".join(mistakes))
