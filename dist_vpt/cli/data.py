"""``dist-vpt data prepare`` and ``data check``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command, add_group
from dist_vpt.errors import UserError


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
    help = "compare datasets with the published protocol, or with --storage look for mistakes in your own"
    parser = add_command(group, "check", check, help, rest="tasks", example="dist-vpt data check --root /data")
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK|a.b=c",
        help="default: all that are there; with --storage keys of data instead, such as data.table.image=path",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the datasets, or the file of a table; not for digits and shapes"
    )
    parser.add_argument(
        "--storage",
        choices=("image_folder", "vtab_folder", "fgvc_json", "hf", "table", "webdataset"),
        help="how your own dataset is stored",
    )


def prepare(arguments: argparse.Namespace) -> None:
    from dist_vpt.data.prepare import prepare

    prepare(arguments.root, arguments.tasks, arguments.format)


def check(arguments: argparse.Namespace) -> None:
    if arguments.storage is not None:
        tasks = [word for word in arguments.tasks if not word.startswith("data.") or "=" not in word]
        if tasks:
            raise UserError(
                f"{tasks[0]}: --storage is for your own data, which is no known task; leave one out, or give keys of "
                "data, such as data.table.image=path"
            )
        if arguments.root is None:
            raise UserError("--root DIR is missing: the folder of your dataset")
        from dist_vpt.data.check_own import check_own
        from dist_vpt.recipe.loading import load_recipe

        own = ["data.task=yours", f"data.format={arguments.storage}", "data.absent_classes=allow", "data.root=."]
        data = load_recipe([], [*own, *arguments.tasks]).data
        check_own(data.model_copy(update={"root": arguments.root}))
        return
    from dist_vpt.data.check import check

    check(arguments.root, arguments.tasks)
