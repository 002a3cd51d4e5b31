"""``dist-vpt push``: a run to the Hugging Face hub."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_adapters, add_command


def add_parser(commands: Any) -> None:
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
