"""``dist-vpt compare``: whether runs differ on the same test images."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_adapters, add_command
from dist_vpt.errors import UserError


def add_parser(commands: Any) -> None:
    help = "compare runs on the same test images: McNemar's test and a bootstrap interval"
    example = "dist-vpt compare runs/linear runs/vpt_deep"
    parser = add_command(commands, "compare", compare, help, example=example)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="two or more run folders, or folders of `eval --out`; all are compared to the first",
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="a split, or an extra test; default: test")
    add_adapters(parser)
    parser.add_argument("--json", action="store_true", help="for programs: JSON on standard output")


def compare(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.hub import is_hub_id, parse_id
    from dist_vpt.report.paired import compare_runs

    for run in filter(is_hub_id, arguments.runs):
        raise UserError(
            f"{parse_id(run)}: predictions are not shared with a run, since they name its images; `dist-vpt eval {run} "
            "--out FOLDER` writes them here, and compare takes FOLDER"
        )
    compare_runs(arguments.runs, arguments.split, arguments.adapters, as_json=arguments.json)
