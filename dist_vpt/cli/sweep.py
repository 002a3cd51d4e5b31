"""``dist-vpt sweep``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command, add_recipe


def add_parser(commands: Any) -> None:
    help = "try a grid of settings on val, then test the best one with several seeds"
    example = "dist-vpt sweep vqt dtd sup_b16_in21k data.root=/data"
    example += "\n  dist-vpt sweep vpt_deep dtd sup_b16_in21k data.root=/data --sampler optuna"
    parser = add_command(commands, "sweep", sweep, help, rest="recipe", example=example)
    add_recipe(parser)
    parser.add_argument(
        "--sampler",
        choices=("grid", "halving", "optuna"),
        help="the same as sweep.search=...; optuna also takes this package's settings (protocol=default) unless a "
        "protocol is given",
    )


def sweep(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    names, overrides = split_arguments(arguments.recipe)
    if arguments.sampler is not None:
        overrides = [*overrides, f"sweep.search={arguments.sampler}"]
    recipe = load_recipe(names, overrides, protocol="default" if arguments.sampler == "optuna" else "published")
    from dist_vpt.experiments.early_checks import check_early

    check_early(recipe.changed("run", resume="auto"), "sweep")  # a sweep always resumes
    from dist_vpt.experiments.sweep import sweep

    sweep(recipe)
