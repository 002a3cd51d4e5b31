"""``dist-vpt compress``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_adapters, add_command, add_weights


def add_parser(commands: Any) -> None:
    help = "remove the least useful features of a vqt run's head"
    example = "dist-vpt compress runs/vqt --keep 0.7 0.5"
    parser = add_command(commands, "compress", compress, help, rest="overrides", example=example)
    parser.add_argument("run", metavar="RUN", help="a run folder of method vqt, or hub:USER/NAME")
    parser.add_argument(
        "--keep",
        nargs="+",
        required=True,
        metavar="FRACTION",
        help="fractions of the features to keep, such as 0.7 0.5",
    )
    parser.add_argument(
        "--mode",
        choices=("compress", "featselect", "finetune"),
        default="featselect",
        help="compress: keep the group lasso's head; featselect (default): train a new head on the kept features; "
        "finetune: then train the queries, too",
    )
    add_adapters(parser)
    add_weights(parser)
    parser.add_argument("--lasso", type=float, default=1e-4, metavar="C", help="weight of the group lasso (1e-4)")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the smaller runs; default: RUN/compressed, of hub:... compressed"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="such as optim.lr=... or train.epochs=...")


def compress(arguments: argparse.Namespace) -> None:
    from dist_vpt.experiments.compress import compress
    from dist_vpt.recipe.loading import split_overrides

    # argparse gives all arguments that follow --keep to it, overrides too.
    fractions, overrides = split_overrides(arguments.keep)
    overrides += arguments.overrides
    compress(
        arguments.run,
        fractions,
        arguments.mode,
        arguments.adapters,
        arguments.lasso,
        arguments.out,
        overrides,
        arguments.weights,
    )
