"""``dist-vpt rank-backbones``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command, add_recipe

PENALTY = 0.01  # that of ComBo's paper


def add_parser(commands: Any) -> None:
    help = "rank several backbones for a task by one training on all of them"
    example = "dist-vpt rank-backbones image_folder data.root=FOLDER 'backbones=[dinov2_s14, dinov3_s16]'"
    parser = add_command(commands, "rank-backbones", rank, help, rest="recipe", example=example)
    add_recipe(parser)
    parser.add_argument("--best", type=int, default=1, metavar="K", help="how many of them to name (1)")


def rank(arguments: argparse.Namespace) -> None:
    from dist_vpt.errors import RecipeError
    from dist_vpt.recipe.loading import load_recipe, sets_method, split_arguments

    names, overrides = split_arguments(arguments.recipe)
    if not any(map(sets_method, names)) and not any(given.startswith("method.name=") for given in overrides):
        names, overrides = split_arguments([*arguments.recipe, "combo"])
    from dist_vpt.experiments.early_checks import check_early, check_ranking

    check_ranking(load_recipe(names, overrides), arguments.best)
    # Whatever is given comes last. Test is not for choosing.
    defaults = [f"method.group_penalty={PENALTY}", "train.test=false", "run.dir=runs/rank-backbones", "run.resume=auto"]
    recipe = load_recipe(names, [*defaults, *overrides])
    if not recipe.method.model_dump()["group_penalty"]:
        raise RecipeError("method.group_penalty = 0: is what ranks them; leave it out, or give a number above 0")
    check_early(recipe)
    from dist_vpt.experiments.rank_backbones import rank_backbones

    rank_backbones(recipe, arguments.best)
