"""``dist-vpt export``."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import RUN_HELP, add_adapters, add_command, add_weights


def add_parser(commands: Any) -> None:
    help = "write a run as one file for other programs"
    example = "dist-vpt export runs/vpt_deep --out digits.onnx --dynamic-batch"
    parser = add_command(commands, "export", export, help, example=example)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="a .onnx, .pt2 or .safetensors file; peft: a new folder"
    )
    parser.add_argument(
        "--format",
        choices=("torch", "onnx", "safetensors", "peft"),
        help="torch: a torch.export program; safetensors: weights alone; peft: a run of lora as PEFT's files; default: "
        "by the ending of --out",
    )
    parser.add_argument("--merge", action="store_true", help="fold the adapters into plain weights first")
    parser.add_argument("--dynamic-batch", action="store_true", help="any number of images at once; default: one")
    parser.add_argument(
        "--preprocessing",
        choices=("none", "normalize", "resize"),
        default="normalize",
        help="what of it is in the file: none: it takes float32 images, resized and normalized; normalize (default): "
        "uint8 images, resized; resize: uint8 pictures of any size",
    )
    parser.add_argument("--quantize", choices=("none", "int8"), default="none", help="int8: hold matrices in 8 bits")
    add_adapters(parser)
    add_weights(parser)


def export(arguments: argparse.Namespace) -> None:
    if arguments.format == "peft":
        _export_peft(arguments)
        return
    from dist_vpt.inference.export import ExportOptions, export, format_of

    options = ExportOptions(
        format_of(arguments.out, arguments.format),
        merge=arguments.merge,
        dynamic_batch=arguments.dynamic_batch,
        quantize=arguments.quantize,
        preprocessing=arguments.preprocessing,
    )
    export(arguments.run, arguments.out, options, arguments.adapters, arguments.weights)


def _export_peft(arguments: argparse.Namespace) -> None:
    """Raises UserError for options of programs and plain weights."""
    from dist_vpt.errors import UserError

    given = {
        "--merge": arguments.merge,
        "--dynamic-batch": arguments.dynamic_batch,
        f"--preprocessing {arguments.preprocessing}": arguments.preprocessing != "normalize",
        "--quantize int8": arguments.quantize != "none",
        "--weights": arguments.weights is not None,
    }
    for option in (name for name, is_given in given.items() if is_given):
        raise UserError(f"{option}: PEFT's files hold the adapters alone; leave it out")
    from dist_vpt.inference.peft_layout import write_peft

    print(write_peft(arguments.run, arguments.out, arguments.adapters))
