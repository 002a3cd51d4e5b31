"""``dist-vpt sweep``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command, add_recipe


def add_parser(commands: Any) -> None:
    help = "try a grid of settings on val, then test the best one with several seeds"
    example = "dist-vpt sweep vqt dtd sup_b16_in21k data.root=/data"
    add_recipe(add_command(commands, "sweep", sweep, help, rest="recipe", example=example))


def sweep(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    recipe = load_recipe(*split_arguments(arguments.recipe), protocol="published")
    from dist_vpt.experiments.early_checks import check_early

    check_early(recipe.changed("run", resume="auto"), "sweep")  # a sweep always resumes
    from dist_vpt.experiments.sweep import sweep

    sweep(recipe)
