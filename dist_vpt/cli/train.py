"""``dist-vpt train``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command, add_recipe


def add_parser(commands: Any) -> None:
    help = "train in this process (in several: accelerate launch -m dist_vpt.train)"
    example = "dist-vpt train vpt_deep dtd sup_b16_in21k data.root=/data"
    add_recipe(add_command(commands, "train", train, help, rest="recipe", example=example))


def train(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    recipe = load_recipe(*split_arguments(arguments.recipe))  # before torch is imported: mistakes show at once
    from dist_vpt.experiments.early_checks import check_early

    check_early(recipe)
    from dist_vpt.experiments.run import run

    run(recipe)
