"""Mistakes that show in a moment: found before torch, timm and DeepSpeed are imported."""

from dist_vpt.backbones.config import naming_member, require_file
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import check_root
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.limits import check_open_files
from dist_vpt.errors import RecipeError
from dist_vpt.experiments.search_checks import check_search
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sharing import require_dataset
from dist_vpt.recipe.trackers import require_trackers
from dist_vpt.runs.folder import RunFolder


def check_early(recipe: Recipe, kind: str = "run") -> None:
    """Raise UserError for a run folder, data folder or weights' file that cannot be used; writes nothing.

    Several processes find the same later, and raise it together.
    """
    if LaunchEnv.current().world_size > 1:
        return
    if kind == "run":
        refuse_tries(recipe.data)
    elif kind == "sweep":
        check_search(recipe)
    require_trackers(recipe.run.trackers)
    RunFolder(str(recipe.run.dir)).refuse_other(recipe, kind)
    for number, member in enumerate(recipe.members):
        if member.file is not None:
            with naming_member(recipe.members, number):
                require_file(member.file)
    check_open_files(recipe.data.workers)
    require_dataset(recipe, "this recipe")
    check_root(recipe.data, test=recipe.train.test or kind == "sweep")


def refuse_tries(data: DataConfig) -> None:
    """Raise RecipeError where one run is to have several draws of its images."""
    if data.tries > 1:
        raise RecipeError(
            f"data.tries = {data.tries}: a run trains one draw, and `dist-vpt sweep` or `dist-vpt suite` all of them; "
            "use these, or data.tries=1 with data.try_index"
        )


def check_ranking(recipe: Recipe, best: int) -> None:
    """Raise RecipeError where there are no backbones to rank, or not more of them than ``best``."""
    if recipe.backbones is None:
        raise RecipeError("rank-backbones: the recipe has one backbone; name several: backbones=[dinov2_s14, demo]")
    if recipe.method.name != "combo":
        raise RecipeError(
            f"rank-backbones: method.name = {recipe.method.name}: backbones are ranked by combo's projection; name no "
            "other method"
        )
    if not 1 <= best < len(recipe.backbones):
        raise RecipeError(
            f"--best {best}: must be at least 1 and below the number of backbones, {len(recipe.backbones)}"
        )
