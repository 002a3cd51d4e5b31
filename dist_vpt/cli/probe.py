"""``dist-vpt probe`` and ``features``: what frozen backbones compute for one's images, and how good it is."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import RECIPE, add_command, add_recipe


def add_parser(commands: Any) -> None:
    help = "rank backbones by knn, logistic and linear on their frozen features"
    example = "dist-vpt probe vtab_folder data.root=FOLDER data.task=NAME --backbones demo,dinov2_s14"
    parser = add_command(commands, "probe", probe, help, rest="recipe", example=example)
    parser.add_argument("recipe", nargs="*", metavar=RECIPE, help="recipes of the data, and overrides a.b=c")
    parser.add_argument(
        "--backbones",
        metavar="A,B",
        default="",
        help="recipes of backbones by name, demo, or recipe files of your own; default: demo and all shipped ones",
    )
    parser.add_argument("--out", metavar="DIR", default="runs/probe", help="folder of the probe (runs/probe)")
    _add_features(commands)


def _add_features(commands: Any) -> None:
    help = "write a frozen backbone's features of a dataset, for other programs"
    example = "dist-vpt features dinov2_s14 vtab_folder data.root=FOLDER data.task=NAME --out features"
    parser = add_command(commands, "features", features, help, rest="recipe", example=example)
    add_recipe(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--split", choices=("train", "val", "trainval", "test"), help="default: train, val and test, those there are"
    )
    parser.add_argument(
        "--what",
        choices=("pooled", "blocks", "tokens"),
        default="pooled",
        help="pooled (default): what heads read; blocks: the same after every block; tokens: all of the last block",
    )
    parser.add_argument(
        "--format", choices=("safetensors", "parquet"), default="safetensors", help="of the files (safetensors)"
    )


def probe(arguments: argparse.Namespace) -> None:
    backbones = [name for name in arguments.backbones.split(",") if name]
    from dist_vpt.experiments.probe_plan import plan_probe

    plan_probe(arguments.recipe, backbones, arguments.out)  # before torch is imported
    from dist_vpt.experiments.probe import probe

    probe(arguments.recipe, backbones, arguments.out)


def features(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    recipe = load_recipe(*split_arguments([*arguments.recipe]))
    from dist_vpt.inference.features import write_features

    write_features(recipe, arguments.out, arguments.split, arguments.what, arguments.format)
