"""``dist-vpt push`` and ``import-peft``: a run to the Hugging Face hub, and one made of PEFT's files."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import RECIPE, RECIPE_HELP, add_adapters, add_command


def add_parser(commands: Any) -> None:
    _add_push(commands)
    _add_import(commands)


def _add_push(commands: Any) -> None:
    help = "share a run on the Hugging Face hub, with a model card"
    example = "dist-vpt push runs/vpt_deep hub:me/flowers-vpt --dry-run"
    parser = add_command(commands, "push", push, help, example=example)
    parser.add_argument("run", metavar="RUN", help="a run folder; of a sweep, one of its seeds")
    parser.add_argument("to", metavar="hub:USER/NAME", help="the repository, which is created if it does not exist")
    add_adapters(parser)
    parser.add_argument("--private", action="store_true", help="create a repository that only its owner sees")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch, made if it does not exist (main)")
    parser.add_argument("--message", metavar="TEXT", default="", help="of the commit")
    parser.add_argument(
        "--license", metavar="ID", help="in the card, such as apache-2.0; default: that of the backbone's weights"
    )
    parser.add_argument("--dry-run", action="store_true", help="send nothing; print the model card and list the files")
    parser.add_argument("--out", metavar="DIR", help="with --dry-run: write the files to this new folder")


def _add_import(commands: Any) -> None:
    help = "make a run of a LoRA adapter that PEFT has saved for a timm model"
    example = "dist-vpt import-peft adapter/ dinov2_s14 data.image_size=224 --out runs/peft"
    parser = add_command(commands, "import-peft", import_peft, help, rest="recipe", example=example)
    parser.add_argument("folder", metavar="DIR", help="a folder with adapter_config.json, or hub:USER/NAME")
    parser.add_argument("recipe", nargs="*", metavar=RECIPE, help=RECIPE_HELP)
    parser.add_argument("--out", required=True, metavar="RUN", help="the new run folder")
    parser.add_argument(
        "--classes", metavar="FILE", help="names of the head's classes, JSON or one a line; default: their numbers"
    )


def push(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.push import push

    push(
        arguments.run,
        arguments.to,
        private=arguments.private,
        dry_run=arguments.dry_run,
        message=arguments.message,
        adapters=arguments.adapters,
        revision=arguments.revision,
        license=arguments.license,
        out=arguments.out,
    )


def import_peft(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.peft_import import import_peft

    import_peft(arguments.folder, arguments.out, arguments.recipe, arguments.classes)
