"""``dist-vpt eval``, ``predict``, ``attention`` and ``merge``: uses of a run's adapters."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_adapters, add_command


def add_parser(commands: Any) -> None:
    _add_evaluate(commands)
    _add_predict(commands)
    _add_attention(commands)
    _add_merge(commands)


def _add_evaluate(commands: Any) -> None:
    example = "dist-vpt eval runs/vpt_deep --split val"
    parser = add_command(commands, "eval", evaluate, "evaluate a run's adapters", rest="overrides", example=example)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--split", choices=("train", "val", "trainval", "test"), default="test", help="default: test")
    add_adapters(parser)
    parser.add_argument("--out", metavar="DIR", help="folder for confusion.csv, per_class.csv and predictions.csv")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="such as data.root=... or runtime.device=cpu")


def _add_predict(commands: Any) -> None:
    example = "dist-vpt predict runs/vpt_deep photos/ --top 3 --out labels.csv"
    parser = add_command(
        commands, "predict", predict, "classify images with a run's adapters", rest="images", example=example
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add_adapters(parser)
    parser.add_argument("--calibrated", action="store_true", help="divide logits by the temperature fitted on val")
    parser.add_argument(
        "--top", type=int, metavar="N", help="classes per image (5; of several labels all that reach their thresholds)"
    )
    parser.add_argument("--out", metavar="FILE", help="a .csv or .json file; default: CSV on the terminal")


def _add_attention(commands: Any) -> None:
    help = "draw what a run's class token, prompts or queries attend to"
    example = "dist-vpt attention runs/vpt_deep photos/ --block 11"
    parser = add_command(commands, "attention", attention, help, rest="images", example=example)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add_adapters(parser)
    parser.add_argument("--block", type=int, metavar="N", help="only this block, its heads beside their mean")
    parser.add_argument("--head", type=int, metavar="N", help="only this head; default: the mean over heads")
    parser.add_argument("--out", metavar="DIR", help="folder of the PNG files; default: RUN/attention")


def _add_merge(commands: Any) -> None:
    help = "merge a run's adapters into plain timm weights"
    example = "dist-vpt merge runs/lora --out lora.safetensors"
    parser = add_command(commands, "merge", merge, help, example=example)
    parser.add_argument("run", metavar="RUN", help="a run folder of linear, full, partial, bias, cls, lora or ssf")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    add_adapters(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.evaluate import evaluate_run

    evaluate_run(arguments.run, arguments.split, arguments.adapters, arguments.overrides, arguments.out)


def predict(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.predict import predict

    given = (arguments.run, arguments.images, arguments.adapters, arguments.top, arguments.out)
    predict(*given, calibrated=arguments.calibrated)


def attention(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.attention import show

    show(arguments.run, arguments.images, arguments.adapters, arguments.block, arguments.head, arguments.out)


def merge(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.merge import merge

    merge(arguments.run, arguments.out, arguments.adapters)
