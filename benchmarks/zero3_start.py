"""Memory that two ZeRO-3 processes take to build a backbone from its file, on the CPU.

    python benchmarks/zero3_start.py                                # ViT-H/14, 632 million parameters
    python benchmarks/zero3_start.py --backbone vit_base_patch16_224

Makes a file of random weights below ``--folder``, starts two processes that build the backbone from it as a run does,
and prints a line of JSON for each: bytes of the whole backbone, the most that the process held beyond what it held
before (anonymous memory: pages of the mapped file are the system's, which takes them back when it needs them), its
shards at the end, and whether all gathered tensors are bit-equal to the file's.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.zero import gathered
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.accelerator import frozen_bytes, make_accelerator
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs
from dist_vpt.training.load_backbone import load_backbone

ROOT = Path(__file__).parents[1]
CLASSES = 10


class AnonymousPeak:
    """The most anonymous memory of this process within a ``with`` block, in bytes beyond what it held before."""

    def __enter__(self) -> "AnonymousPeak":
        self.before = self.most = anonymous_bytes()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, anonymous_bytes())

    @property
    def bytes(self) -> int:
        return self.most - self.before


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measure(backbone: str, file: Path) -> dict[str, Any]:
    """Build a backbone in one of the processes that a launcher has started."""
    options = ["method.name=vpt", "data.task=digits", f"backbone.name={backbone}", f"backbone.weights={file}"]
    recipe = load_recipe([], [*options, "runtime.precision=fp32", "data.image_size=224"])
    accelerator = make_accelerator(recipe, LaunchEnv.current())
    with AnonymousPeak() as peak:
        method, _ = build_method(recipe, resolve_inputs(recipe), CLASSES, defer=True)
        load_backbone(accelerator, method)
    held, whole = frozen_bytes(method)
    stored, equal = load_file(file), []
    for name, parameter in method.backbone.named_parameters():
        with gathered([parameter]):
            equal.append(torch.equal(parameter, stored[method.backbone.timm_name(name)]))
    facts = {"rank": accelerator.process_index, "whole": whole, "peak": peak.bytes, "held": held}
    return facts | {"peak_share": round(peak.bytes / whole, 3), "bit_equal": all(equal), "tensors": len(equal)}


def save_random(backbone: str, file: Path) -> None:
    """A file of random weights of a timm model without its head."""
    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # timm's are all ones and zeros
                parameter.normal_()
    save_file(model.state_dict(), file)


def start(backbone: str, file: Path) -> list[dict[str, Any]]:
    """The lines of two processes, which share nothing but the file."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    variables = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}",
        "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "launch" / "accelerate" / "zero3.json"),
    }  # fmt: skip
    command = [sys.executable, __file__, "--backbone", backbone, "--worker", str(file)]
    processes = [
        subprocess.Popen(command, env=variables | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"}, stdout=subprocess.PIPE)
        for r in range(2)
    ]
    outputs = [process.communicate()[0].decode() for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_huge_patch14_224", help="a timm model")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for the file of weights")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(measure(options.backbone, options.worker)), flush=True)
        return
    file = options.folder / f"{options.backbone}.safetensors"
    if not file.exists():
        save_random(options.backbone, file)
    for line in start(options.backbone, file):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
