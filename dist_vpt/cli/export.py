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
    from dist_vpt.inference.export_call import export

    export(
        arguments.run,
        arguments.out,
        format=arguments.format,
        merge=arguments.merge,
        dynamic_batch=arguments.dynamic_batch,
        preprocessing=arguments.preprocessing,
        quantize=arguments.quantize,
        adapters=arguments.adapters,
        weights=arguments.weights,
    )
