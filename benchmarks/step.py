"""Speed, memory and utilization of one training step, on synthetic images.

    python benchmarks/step.py [RECIPE...] a.b=c ... [--repeats N] [--classes K] [--out DIR]

Method, backbone, batch, precision, memory policy and device are the recipe's; the step is the engine's own, on a
single process. The last line of the output is one JSON object, which also goes to a file in ``--out``:

- ``step_ms``: median wall-clock time of a whole optimizer step (images to the device, forward, loss, backward,
  update), the device synchronized before and after; the warm-up steps before it are not counted.
- ``images_per_s``: ``train.batch_size`` / ``step_ms``.
- ``saved_for_backward_mib``: what autograd holds between forward and backward of one micro-batch, as seen by
  ``torch.autograd.graph.saved_tensors_hooks``. A storage counts once and whole, however many views of it are saved;
  the storages of parameters and buffers do not count (casts that autocast makes of them do). The same on every run.
  Torch 2.10 shows those hooks nothing of what ``runtime.activation_checkpointing=budget-F`` keeps.
- ``peak_mib``: on a GPU the most memory allocated during the timed steps; on a CPU the largest resident set of the
  process, libraries and the building of the model included.
- ``model_flops``: floating-point operations per image of one training step: 2 x m x n x k for every matrix product
  (convolution and attention included) that forward and backward need, the backward counted as autograd runs it, so
  without the weight gradients of what is frozen. ``torch.utils.flop_counter.FlopCounterMode`` counts one micro-batch
  on fake tensors, with attention written out as its products (two forward, four backward). Element-wise work,
  softmax, norms and the optimizer count nothing, and neither does anything that is computed a second time: by
  checkpointed blocks, or by the backward of fused attention.
- ``utilization``: ``model_flops`` x ``images_per_s`` / the measured matrix rate (``matmul_tflops``: one large product
  in the recipe's precision on the same device, the fastest of several).
- ``machine.load``: runnable processes, averaged over the minute before the run: near 0 on a quiet machine.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dist_vpt.backbones.products import ONEDNN_LINEAR, apply_linear
from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.data.loaders import Batch
from dist_vpt.errors import UserError
from dist_vpt.files import write_atomically
from dist_vpt.methods.base import Method
from dist_vpt.planning.measure import make_training, synthetic_batches
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.runtime.peak_memory import MIB, peak_memory_mib
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.components import DTYPES, build_method
from dist_vpt.training.engine import TrainState, train_step
from dist_vpt.training.inputs import Inputs, resolve_inputs

RESULTS = Path(__file__).parent / "results"
MATMUL_SIDE = {"cpu": 2048}  # elsewhere 8192
FLOPS = {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}  # of operations in which torch counts none
if ONEDNN_LINEAR is not None:
    FLOPS[ONEDNN_LINEAR] = lambda x_XI, weight_OI, *_, **__: 2 * math.prod(x_XI) * weight_OI[0]  # of shapes
LR = 1e-8  # so small that no number of steps on random labels diverges; it costs as much as any other


def main(words: list[str] | None = None) -> int:
    """Benchmark one recipe, print its JSON and write its file; returns the exit code."""
    arguments = _parser().parse_intermixed_args(words)

    def call() -> None:
        recipe, _ = resolve_precision(load_recipe(*split_arguments(arguments.recipe)))
        result = benchmark(recipe, repeats=arguments.repeats, classes=arguments.classes)
        conclude(result, Path(arguments.out) / file_name(result))

    return run_with_exit_code(call, debug=arguments.debug)


def benchmark(recipe: Recipe, *, repeats: int, classes: int) -> dict[str, Any]:
    """All numbers of one recipe."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("benchmarks/step.py measures one process; start it with `python`, not with a launcher")
    load = round(os.getloadavg()[0], 1)
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": LR, "scale_lr": False})})
    inputs = resolve_inputs(recipe)
    training = make_training(recipe, inputs, classes)
    device = training.accelerator.device
    batches = synthetic_batches(recipe, inputs, classes)
    on_device = {name: value.to(device) for name, value in batches[0].items()}  # type: ignore[attr-defined]
    saved = saved_for_backward(training.method, lambda: micro_batch_loss(training.model, recipe, cast(Any, on_device)))
    seconds = time_steps(training, batches, repeats)
    peak = peak_memory_mib()  # before the matrix product asks for memory of its own
    flops = model_flops(recipe, inputs, classes)
    rate = matmul_rate(device, DTYPES[recipe.runtime.precision])
    images_per_s = recipe.train.batch_size / seconds
    return {
        "step_ms": rounded(seconds * 1e3),
        "images_per_s": rounded(images_per_s),
        "saved_for_backward_mib": round(saved / MIB, 3),
        "peak_mib": round(peak, 1),
        "model_flops": flops,
        "matmul_tflops": rounded(rate / 1e12),
        "utilization": rounded(flops * images_per_s / rate),
        "method": recipe.method.name,
        "method_settings": recipe.method.model_dump(mode="json", exclude={"name"}),
        "backbone": recipe.backbone.name,
        "image_size": batches[0]["images"].shape[-1],
        "classes": classes,
        "batch": recipe.train.batch_size,
        "micro_batch": recipe.train.batch_size // recipe.train.grad_accum_steps,
        "precision": recipe.runtime.precision,
        "checkpointing": recipe.runtime.activation_checkpointing,
        "offload": recipe.runtime.offload,
        "attention": training.method.backbone.chosen["attention"],
        "compile": training.method.backbone.chosen.get("compile"),
        "optimizer": recipe.optim.name,
        "repeats": repeats,
        "parameters": training.parameters,
        "device": device_name(device),
        "device_type": device.type,
        "machine": machine(load),
        "versions": versions(),
    }


def micro_batch_loss(model: nn.Module, recipe: Recipe, batch: Batch) -> Tensor:
    """Forward and the engine's loss of one micro-batch."""
    losses_B = F.cross_entropy(
        model(batch["images"]), batch["labels"], reduction="none", label_smoothing=recipe.train.label_smoothing
    )
    return (losses_B * batch["weight"]).sum() / len(losses_B)


def saved_for_backward(method: nn.Module, loss: Callable[[], Any]) -> int:
    """Bytes that autograd holds after ``loss()``, without parameters and buffers of ``method``."""
    with saved_storages(method) as saved:
        loss()
    return sum(storage.nbytes() for storage in saved.values())


@contextmanager
def saved_storages(method: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Address -> storage of every tensor that autograd saves inside the context, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def model_flops(recipe: Recipe, inputs: Inputs, classes: int) -> int:
    """Operations per image of one training step; see the head of this file."""
    plain = recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"weights": "random"}),  # no file is read for a count
            "runtime": recipe.runtime.model_copy(
                update={"activation_checkpointing": "none", "attention": "sdpa", "compile": False, "offload": False}
            ),
        }
    )
    with torch.device("meta"):
        method: Method = build_method(plain, inputs, classes)[0].train()
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        method.to_empty(device="cpu")  # fake tensors: shapes of a real device (autocast wants one), and no numbers
        batch = synthetic_batches(plain, inputs, classes)[0]
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            micro_batch_loss(method, plain, batch).backward()
    return round(counter.get_total_flops() / len(batch["labels"]))


def time_steps(training: TrainState, batches: list[Batch], repeats: int) -> float:
    """Median seconds of the engine's step over ``repeats`` of them, after warm-up."""
    device = training.accelerator.device

    def step() -> float:
        synchronize(device)
        began = time.perf_counter()
        train_step(training, batches, norms=False)
        synchronize(device)
        training.progress.step += 1
        return time.perf_counter() - began

    for _ in range(max(2, repeats // 4)):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return statistics.median(step() for _ in range(repeats))


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of one large matrix product, the fastest of ``repeats``."""
    side = MATMUL_SIDE.get(device.type, 8192)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(1 + repeats):
        synchronize(device)
        began = time.perf_counter()
        apply_linear(left, right)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def file_name(result: dict[str, Any]) -> str:
    """``step-METHOD-BACKBONE-bBATCH-PRECISION-POLICY-DEVICE.json``, offload and compiled named after the policy."""
    words = ["step", result["method"], result["backbone"], f"b{result['batch']}", result["precision"]]
    words += [result["checkpointing"], *(["offload"] if result["offload"] else [])]
    words += ["compiled"] if result["compile"] == "each block" else []
    return name_on_device(words, result)


def name_on_device(words: list[str], result: dict[str, Any]) -> str:
    """``WORDS-DEVICE.json``."""
    device = "cpu" if result["device_type"] == "cpu" else result["device"].lower()
    return re.sub(r"[^\w.-]+", "-", "-".join([*words, device])) + ".json"


def machine(load: float) -> dict[str, Any]:
    """What a time depends on besides the device."""
    return {
        "cpu": device_name(torch.device("cpu")).rpartition(", ")[0],
        "threads": torch.get_num_threads(),
        "load": load,
    }


def rounded(value: float) -> float:
    """Five digits: more are noise."""
    return float(f"{value:.5g}")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count(text: str) -> int:
    """An option's whole number."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def conclude(result: dict[str, Any], file: Path) -> None:
    """Write a result's file, and print its JSON as the last line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")
    print(json.dumps(result), flush=True)


def parser_of(name: str, description: str, *, repeats: int, of: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of a step share; ``repeats``: how often ``of`` is timed unless said otherwise."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}", description=description)
    add = parser.add_argument
    add("recipe", nargs="*", metavar="RECIPE|a.b=c", help="recipe files, and a.b=c overrides")
    add("--repeats", type=count, default=repeats, metavar="N", help=f"{of} (default {repeats})")
    add("--classes", type=count, default=100, metavar="K", help="classes of the head (default 100)")
    add("--out", default=str(RESULTS), metavar="DIR", help="where the JSON file goes")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _parser() -> argparse.ArgumentParser:
    about = "Speed, memory and utilization of one training step."
    return parser_of("step.py", about, repeats=20, of="timed steps")


if __name__ == "__main__":
    sys.exit(main())
