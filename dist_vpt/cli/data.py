"""``dist-vpt data prepare`` and ``data check``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command, add_group


def add_parser(commands: Any) -> None:
    group = add_group(commands, "data", "prepare the datasets of known tasks, or check those that are there")
    help = "download and prepare datasets with TensorFlow Datasets"
    parser = add_command(
        group, "prepare", prepare, help, rest="tasks", example="dist-vpt data prepare dtd --root /data"
    )
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="such as dtd or svhn")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the datasets")
    parser.add_argument(
        "--format", choices=("array_record", "tfrecord"), default="array_record", help="of the files (array_record)"
    )
    help = "compare datasets with the published protocol"
    parser = add_command(group, "check", check, help, rest="tasks", example="dist-vpt data check --root /data")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all that are there")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the datasets")


def prepare(arguments: argparse.Namespace) -> None:
    from dist_vpt.data.prepare import prepare

    prepare(arguments.root, arguments.tasks, arguments.format)


def check(arguments: argparse.Namespace) -> None:
    from dist_vpt.data.check import check

    check(arguments.root, arguments.tasks)
