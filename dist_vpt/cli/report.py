"""``dist-vpt report``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command


def add_parser(commands: Any) -> None:
    help = "tables of results, next to published numbers"
    example = "dist-vpt report runs/vtab --out tables"
    parser = add_command(commands, "report", report, help, rest="folders", example=example)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders with a results.jsonl in or below them")
    parser.add_argument("--out", metavar="FOLDER", help="also write report.md, .csv and .html there")
    parser.add_argument(
        "--published", action=argparse.BooleanOptionalAction, default=True, help="rows of published numbers"
    )


def report(arguments: argparse.Namespace) -> None:
    from dist_vpt.report.tables import report

    report(arguments.folders, arguments.out, with_published=arguments.published)
