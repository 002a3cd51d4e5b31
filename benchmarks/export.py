"""Sizes and speed of exported runs: each method on each backbone, in torch.export's and ONNX's formats.

B images of a batch, K classes.

    python benchmarks/export.py a.b=c ... [--methods NAME...] [--backbones NAME...] [--batch B] [--repeats N]
        [--out DIR]

Weights are random, and the trained numbers too: neither size nor speed depends on them. Every file is read again and
its logits are compared with the method's before anything is timed, as `dist-vpt export` does. One process then computes
the same batch in turns, with the method itself (eager), with onnxruntime in float32 and with onnxruntime in int8, all
on the CPU with as many threads as torch has. A row has:

- ``mib``: of the files: ``pt2``, ``onnx``, ``int8`` (of ONNX), and ``adapters``, what a run itself keeps.
- ``images_per_s``: median over the turns, of each.
- ``speed_up``: median over the turns of eager's time over onnxruntime's in the same turn: on a machine that is shared,
  much steadier than the times themselves.
- ``difference``: of a logit in float32, at most, and ``difference_int8``.

Each backbone has one JSON file in ``--out``, which grows row by row: what it has already is not measured again. The
last lines of the output are a table of all rows that the file has.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from step import RESULTS, count, machine, rounded

from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.errors import UserError
from dist_vpt.files import write_atomically
from dist_vpt.inference import export_onnx, export_torch
from dist_vpt.inference.export_check import make_check
from dist_vpt.inference.export_preprocessing import ExportedModel
from dist_vpt.inference.tuned import Tuned
from dist_vpt.methods.base import Method
from dist_vpt.methods.fitted import FittedReader, Observed
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.provenance import versions
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs

METHODS = (
    *("linear", "knn", "logistic", "mlp", "side", "combo", "ladder", "vqt", "vpt_deep", "vpt_shallow"),
    *("bias", "cls", "lora", "adapter", "adaptformer", "ssf", "partial", "full"),
)
ON_SWIN = ("linear", "knn", "logistic", "mlp", "side", "vpt_deep", "vpt_shallow", "full")
BACKBONES = ("vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224")
TRAIN = 1000  # training images that knn and logistic are fitted to
MIB = 2**20


def main(words: list[str] | None = None) -> int:
    """Measure what is missing of each backbone's file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/export.py", description="Sizes and speed of exported runs.")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="a.b=c", help="overrides of every recipe, such as data.image_size=98")
    add("--methods", nargs="+", default=METHODS, metavar="NAME", help="recipes of methods; default: all")
    add("--backbones", nargs="+", default=BACKBONES, metavar="NAME", help="a ViT-S, a DINOv2 with registers, a Swin-T")
    add("--batch", type=count, default=8, metavar="B", help="images at once (default 8)")
    add("--classes", type=count, default=100, metavar="K", help="classes of the head (default 100)")
    add("--repeats", type=count, default=10, metavar="N", help="turns (default 10)")
    add("--out", default=str(RESULTS), metavar="DIR", help="where the JSON files go")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(words)
    return run_with_exit_code(lambda: _measure_all(arguments), debug=arguments.debug)


def _measure_all(arguments: argparse.Namespace) -> None:
    for name in (*arguments.methods, *arguments.backbones):
        if "=" in name:
            raise UserError(f"{name}: an override, after an option that takes several names; put it first")
    for backbone in arguments.backbones:
        file = Path(arguments.out) / f"export-{backbone}-b{arguments.batch}-cpu.json"
        content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
        for method in arguments.methods:
            if method in content["rows"] or ("swin" in backbone and method not in ON_SWIN):
                continue
            load = round(os.getloadavg()[0], 1)
            row = measure(method, backbone, arguments)
            content["rows"][method] = row | {"load": load}
            found = versions() | {name: metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
            about = {"batch": arguments.batch, "classes": arguments.classes, "repeats": arguments.repeats}
            content |= about | {"backbone": backbone, "machine": machine(load), "versions": found}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(content, indent=1) + "\n")
            print(f"{backbone} {method}: {json.dumps(row)}", flush=True)
        print("\n".join(table(backbone, content["rows"])), flush=True)


def measure(name: str, backbone: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    words = [f"backbone.name={backbone}", "backbone.weights=random", "data.task=digits", "runtime.device=cpu"]
    recipe = load_recipe([name], [*words, "runtime.attention=sdpa", *arguments.overrides])
    inputs = resolve_inputs(recipe)
    method, _ = build_method(recipe, inputs, arguments.classes)
    _randomize(method.eval(), arguments.classes)
    classes = [f"class {k}" for k in range(arguments.classes)]
    loaded = Tuned(recipe, method, classes, inputs)
    check = make_check(loaded, "normalize", (1, arguments.batch))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {
            part: Path(folder) / f"{part}.{'pt2' if part == 'pt2' else 'onnx'}" for part in ("pt2", "onnx", "int8")
        }
        recorded = export_torch.record(ExportedModel(method), check.example, ["images"], dynamic_batch=True)
        export_torch.write(files["pt2"], recorded, {}, check, quantize=False)
        export_onnx.write(files["onnx"], recorded, {}, check, quantize=False)
        shutil.copy(files["onnx"], files["int8"])
        export_onnx.quantize_onnx(files["int8"], {})
        images = check.inputs[-1][0]
        sessions = {part: _session(files[part]) for part in ("onnx", "int8")}
        runs: dict[str, Callable[[], Any]] = {
            "eager": lambda: method(torch.from_numpy(images)).numpy(),
            "onnx": lambda: sessions["onnx"].run(None, {"images": images})[0],
            "int8": lambda: sessions["int8"].run(None, {"images": images})[0],
        }
        logits = {part: run() for part, run in runs.items()}
        seconds = time_in_turns(runs, arguments.repeats)
        mib = {part: round(file.stat().st_size / MIB, 2) for part, file in files.items()}
    adapters = sum(tensor.nbytes for _, tensor in method.adapter_tensors())
    return {
        "mib": mib | {"adapters": round(adapters / MIB, 3)},
        "images_per_s": {part: rounded(len(images) / statistics.median(each)) for part, each in seconds.items()},
        "speed_up": {part: _ratio(seconds["eager"], seconds[part]) for part in ("onnx", "int8")},
        "difference": float(np.abs(logits["onnx"] - logits["eager"]).max()),
        "difference_int8": float(np.abs(logits["int8"] - logits["eager"]).max()),
        "largest_logit": float(np.abs(logits["eager"]).max()),
        "image_size": images.shape[-1],
    }


@torch.no_grad()
def _randomize(method: Method, classes: int) -> None:
    """Trained numbers as if they had been trained: a head of zeros would hide that something is wrong."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(method, FittedReader):
        features = torch.randn(TRAIN, method.backbone.width, generator=draw)
        labels = torch.arange(TRAIN) % classes
        type(method).fit([method], Observed(features, labels, torch.ones(TRAIN)))
        return
    for _, parameter in method.trainable():
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)


def _session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def time_in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, again and again."""
    seconds: dict[str, list[float]] = {part: [] for part in runs}
    for _ in range(repeats):
        for part, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[part].append(time.perf_counter() - started)
    return seconds


def _ratio(eager: Sequence[float], other: Sequence[float]) -> float:
    return rounded(statistics.median(a / b for a, b in zip(eager, other, strict=True)))


def table(backbone: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    if not rows:
        raise UserError(f"{backbone}: no method was measured; name one of {', '.join(ON_SWIN)}")
    size = next(iter(rows.values()))["image_size"]
    lines = [
        f"| `{backbone}`, {size} px | adapters, MiB | .pt2 | .onnx | int8 | ONNX / eager | int8 / eager |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        mib, faster = row["mib"], row["speed_up"]
        sizes = " | ".join(f"{mib[part]:.1f}" for part in ("pt2", "onnx", "int8"))
        lines.append(f"| `{name}` | {mib['adapters']:.2f} | {sizes} | {faster['onnx']:.2f} | {faster['int8']:.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
