"""Helpers shared by the parsers of the sub-commands."""

import argparse
from collections.abc import Callable
from typing import Any

RECIPE = "RECIPE|a.b=c"
RECIPE_HELP = (
    "names of recipes (dist-vpt recipe list), merged by kind whatever their order; your own files, merged after them "
    "in the order given; overrides a.b=c"
)


def add_command(
    commands: Any,
    name: str,
    call: Callable[[argparse.Namespace], None],
    help: str,
    *,
    rest: str = "",
    example: str = "",
) -> argparse.ArgumentParser:
    """A sub-command. ``rest``: the argument that takes several values; they may stand between options, too."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(call=call, **({"rest": rest} if rest else {}))
    return parser


def add_group(commands: Any, name: str, help: str) -> Any:
    """A command that has sub-commands of its own."""
    return commands.add_parser(name, help=help).add_subparsers(required=True, metavar="COMMAND")


def add_recipe(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """The recipes and overrides of a command."""
    parser.add_argument("recipe", nargs=nargs, metavar=RECIPE, help=RECIPE_HELP)


RUN_HELP = "a run folder, or hub:USER/NAME"


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The file of the backbone's weights, for runs of another machine."""
    parser.add_argument(
        "--weights", metavar="FILE", help="the backbone's weights, where they are not where the recipe has them"
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Which of a run's two adapter files."""
    parser.add_argument(
        "--adapters", choices=("last", "best"), default="last", help="of the last epoch (default), or the best on val"
    )
