"""Bytes and time of one training step under each checkpointing policy, on synthetic images.

    python benchmarks/policies.py [RECIPE...] a.b=c ... [--policies P ...] [--repeats N] [--classes K] [--out DIR]

One process measures all policies on the same weights, images and threads, in turns; the recipe says all else. The
last line of the output is one JSON object, which also goes to a file in ``--out``; numbers are by policy:

- ``saved_for_backward_mib``: counted as in step.py; the same on every run.
- ``of_none``: that, over the bytes of ``none``.
- ``step_ms``: median wall-clock time of forward, loss and backward of one batch.
- ``time_of_none``: median over the turns of the time over that of ``none`` in the same turn: on a machine that is
  shared, much steadier than the times themselves.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

from step import (
    conclude,
    machine,
    micro_batch_loss,
    name_on_device,
    parser_of,
    rounded,
    saved_for_backward,
    synchronize,
    synthetic_batches,
)

from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.distributed.launch_env import ALONE
from dist_vpt.errors import UserError
from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.peak_memory import MIB
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs

POLICIES = ["none", "budget-0.75", "mlp", "every-2", "budget-0.5", "budget-0.25", "block"]


def main(words: list[str] | None = None) -> int:
    """Benchmark one recipe, print its JSON and write its file; returns the exit code."""
    arguments = _parser().parse_intermixed_args(words)

    def call() -> None:
        recipe, _ = resolve_precision(load_recipe(*split_arguments(arguments.recipe)))
        result = benchmark(recipe, arguments.policies, repeats=arguments.repeats, classes=arguments.classes)
        conclude(result, Path(arguments.out) / file_name(result))

    return run_with_exit_code(call, debug=arguments.debug)


def benchmark(recipe: Recipe, policies: list[str], *, repeats: int, classes: int) -> dict[str, Any]:
    """All numbers of one recipe under each of the policies; the first must be ``none``."""
    if policies[0] != "none" or recipe.runtime.activation_checkpointing != "none":
        raise UserError(
            "--policies: all are compared with none; begin with it, and leave runtime.activation_checkpointing out"
        )
    load = round(os.getloadavg()[0], 1)
    device = make_accelerator(recipe, ALONE).device
    inputs = resolve_inputs(recipe)
    plain = build_method(recipe, inputs, classes)[0].to(device).train()
    batch = cast(Any, {n: t.to(device) for n, t in synthetic_batches(recipe, inputs, classes)[0].items()})  # type: ignore[attr-defined]
    methods = {policy: under(policy, plain, recipe) for policy in policies}
    saved = {p: saved_for_backward(m, partial(micro_batch_loss, m, recipe, batch)) for p, m in methods.items()}
    seconds: dict[str, list[float]] = {policy: [] for policy in policies}
    for turn in range(1 + repeats):
        for policy, method in methods.items():
            synchronize(device)
            began = time.perf_counter()
            micro_batch_loss(method, recipe, batch).backward()
            synchronize(device)
            if turn:  # the first is warm-up
                seconds[policy].append(time.perf_counter() - began)
            method.zero_grad()
    none = seconds["none"]
    return {
        "saved_for_backward_mib": {p: round(n / MIB, 3) for p, n in saved.items()},
        "of_none": {p: rounded(n / saved["none"]) for p, n in saved.items()},
        "step_ms": {p: rounded(statistics.median(each) * 1e3) for p, each in seconds.items()},
        "time_of_none": {
            p: rounded(statistics.median(a / b for a, b in zip(each, none, strict=True))) for p, each in seconds.items()
        },
        "method": recipe.method.name,
        "method_settings": recipe.method.model_dump(mode="json", exclude={"name"}),
        "backbone": recipe.backbone.name,
        "image_size": batch["images"].shape[-1],
        "classes": classes,
        "batch": len(batch["images"]),
        "precision": recipe.runtime.precision,
        "attention": plain.backbone.chosen["attention"],
        "repeats": repeats,
        "device": device_name(device),
        "device_type": device.type,
        "machine": machine(load),
        "versions": versions(),
    }


def under(policy: str, plain: Method, recipe: Recipe) -> Method:
    """The method under a policy, on the same weights."""
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    method = copy.deepcopy(plain, memo=cast(Any, shared))
    checked = Recipe.model_validate(recipe.model_dump() | {"runtime": {"activation_checkpointing": policy}})
    apply_checkpointing(method.backbone, checked.runtime.activation_checkpointing)
    return method


def file_name(result: dict[str, Any]) -> str:
    """``policies-METHOD-BACKBONE-bBATCH-PRECISION-DEVICE.json``."""
    words = ["policies", result["method"], result["backbone"], f"b{result['batch']}", result["precision"]]
    return name_on_device(words, result)


def _parser() -> argparse.ArgumentParser:
    about = "Bytes and time of a training step under each checkpointing policy."
    parser = parser_of("policies.py", about, repeats=5, of="timed turns")
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="P", help="the first is none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
