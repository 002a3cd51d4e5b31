"""``dist-vpt plan``."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from dist_vpt.cli.arguments import add_command, add_recipe
from dist_vpt.errors import RecipeError, UserError


def add_parser(commands: Any) -> None:
    help = "estimate the memory of a run under each checkpointing policy and strategy"
    example = "dist-vpt plan vpt_deep dtd sup_b16_in21k --gpus 4 --gpu-memory 24GiB"
    parser = add_command(commands, "plan", plan, help, rest="recipe", example=example)
    add_recipe(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices per node (1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (1)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of each device, such as 24GiB; default: this machine's")
    parser.add_argument("--measure", action="store_true", help="run two steps here, and compare with the estimate")


def plan(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # keeps torch's profiler from writing to the terminal
    from dist_vpt.planning.machines import parse_memory
    from dist_vpt.planning.planner import plan
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    if arguments.gpus < 1 or arguments.nodes < 1:
        raise UserError(f"--gpus {arguments.gpus} --nodes {arguments.nodes}: each must be at least 1")
    memory = None if arguments.gpu_memory is None else parse_memory(arguments.gpu_memory)
    files, overrides = split_arguments(arguments.recipe)
    try:
        recipe = load_recipe(files, overrides)
    except RecipeError as error:
        recipe = _load_without_data(files, overrides, error)
    plan(recipe, arguments.gpus, arguments.nodes, memory, measured=arguments.measure)


def _load_without_data(files: Sequence[str], overrides: Sequence[str], error: RecipeError) -> Any:
    """The recipe of a known task whose only mistake is the missing data.root; its number of classes is known."""
    from dist_vpt.data.tasks import TASKS
    from dist_vpt.recipe.loading import load_recipe

    try:
        recipe = load_recipe(files, [*overrides, "data.root=."])
    except RecipeError:
        raise error from None
    if recipe.data.task not in TASKS:
        raise error
    return recipe
