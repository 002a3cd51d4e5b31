"""``dist-vpt backbones`` and ``backbones check``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "backbones", show, "list published weights, or check a weight file")
    checks = parser.add_subparsers(metavar="COMMAND")
    help = "report the architecture of a weight file, and whether it loads"
    example = "dist-vpt backbones check ViT-B_16.npz"
    check_parser = add_command(checks, "check", check, help, example=example)
    check_parser.add_argument("file", metavar="FILE", help="a .safetensors, .pth, .pth.tar or .npz file")
    check_parser.add_argument("--entry", metavar="NAME", help="which model of a file that holds several")


def show(arguments: argparse.Namespace) -> None:
    from dist_vpt.backbones.weights.zoo import show

    show()


def check(arguments: argparse.Namespace) -> None:
    from dist_vpt.backbones.weights.inspect import check

    check(arguments.file, arguments.entry)
