"""``dist-vpt recipe list``, ``copy``, ``show`` and ``schema``."""

import argparse
import json
from typing import Any

from dist_vpt.cli.arguments import add_command, add_group, add_recipe


def add_parser(commands: Any) -> None:
    group = add_group(commands, "recipe", "list, copy and show recipes")
    add_command(group, "list", list_recipes, "list the recipes that come with the package")
    help = "copy a recipe, to change it"
    parser = add_command(group, "copy", copy, help, example="dist-vpt recipe copy digits/vqt mine.yaml")
    parser.add_argument("name", metavar="NAME", help="a name that `dist-vpt recipe list` shows")
    parser.add_argument("file", nargs="?", metavar="FILE", help="a new file; default: NAME.yaml in this folder")
    help = "print the resolved recipe, with every key"
    parser = add_command(group, "show", show, help, rest="recipe", example="dist-vpt recipe show vpt_deep optim.lr=2")
    add_recipe(parser, nargs="*")
    add_command(group, "schema", schema, "print the JSON Schema of recipe files, for editors")


def list_recipes(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.shipped import shipped_recipes

    recipes = shipped_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    print(f"{'name':{width}}  kind      what")
    for recipe in recipes:
        print(f"{recipe.name:{width}}  {recipe.kind:8}  {recipe.summary}")


def copy(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.shipped import copy_recipe

    print(copy_recipe(arguments.name, arguments.file))


def show(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    print(load_recipe(*split_arguments(arguments.recipe)).to_yaml(), end="")


def schema(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1))
