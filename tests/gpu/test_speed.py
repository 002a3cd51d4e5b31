"""Part speed of the acceptance on a GPU: what a step takes, and what keeps the GPU waiting.

Figures go as JSON to benchmarks/results (run dry, to a temporary folder). Times are recorded, not judged: they depend
on the card and on who shares the machine. Judged is what does not: how often a step waits for the GPU.
"""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.files import write_atomically
from dist_vpt.planning.measure import make_training, synthetic_batches
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.training.engine import train_step
from dist_vpt.training.inputs import resolve_inputs
from tests.gpu.device import BACKBONE, BATCH, DEVICE, DRY, KEY, accepts, command
from tests.running import ROOT, TINY

pytestmark = accepts
VPT = ("vpt_deep", *BACKBONE, "method.prompts=10", "runtime.precision=bf16", f"train.batch_size={BATCH}", KEY)
LARGE = VPT if DRY else (*VPT, "backbone.name=vit_large_patch16_224")
REPEATS = "1" if DRY else "20"
SYNCHRONIZATIONS = 5  # of a step that is not read: none is needed


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path if DRY else ROOT / "benchmarks" / "results"


def benchmark(script: str, results: Path, *words: str) -> dict[str, Any]:
    """The JSON that a benchmark prints last, which it also writes."""
    done = command(f"benchmarks/{script}.py", *words, "--out", str(results))
    assert done.returncode == 0, done.stdout[-3000:]
    lines = done.stdout.splitlines()
    written = next(line for line in lines if line.startswith("written to ")).removeprefix("written to ")
    found = json.loads(lines[-1])
    assert json.loads(Path(written).read_text()) == found
    return found


@pytest.mark.parametrize("recipe", [VPT, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step(recipe: tuple[str, ...], compiled: bool, results: Path) -> None:
    found = benchmark("step", results, *recipe, f"runtime.compile={str(compiled).lower()}", "--repeats", REPEATS)
    assert found["device_type"] == DEVICE.type
    assert found["images_per_s"] > 0
    assert found["compile"] == ("each block" if compiled else None)


def test_policies(results: Path) -> None:
    found = benchmark("policies", results, *LARGE, "--policies", "none", "mlp", "block", "--repeats", "3")
    assert found["saved_for_backward_mib"]["block"] < found["saved_for_backward_mib"]["none"]


@pytest.mark.parametrize("queries", [1, 10])
def test_a_sweeps_step(queries: int, results: Path) -> None:
    size = ("--images", "8", "--trials", "2", "--published-batch", "2") if DRY else ("--images", "500")
    keys = (*BACKBONE, f"method.queries={queries}", f"train.batch_size={BATCH}", KEY)
    found = benchmark("sweep", results, *keys, *size, "--repeats", "1" if DRY else "5")
    assert found["device_type"] == DEVICE.type


def step_of(*overrides: str) -> Callable[[], None]:
    recipe = load_recipe(["vpt_deep"], ["data.task=digits", "optim.lr=1e-8", *VPT[1:], *overrides])
    inputs = resolve_inputs(recipe)
    training, batches = make_training(recipe, inputs, 100), synthetic_batches(recipe, inputs, 100)

    def step() -> None:
        train_step(training, batches, norms=False)
        training.progress.step += 1

    for _ in range(3):
        step()
    return step


def test_what_a_step_waits_for(results: Path) -> None:
    """Synchronizing calls as torch counts them, kernels, and the share of the time in which the GPU computes."""
    step, found = step_of(), dict[str, Any]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not DRY:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
    found["synchronizations"] = sum("synchroniz" in str(warning.message).lower() for warning in caught)

    from torch.profiler import ProfilerActivity, profile

    count, activities = 3 if DRY else 10, [ProfilerActivity.CPU] if DRY else [ProfilerActivity.CUDA]
    synchronize = torch.cpu.synchronize if DRY else torch.cuda.synchronize
    synchronize()
    started = time.perf_counter()
    with profile(activities=activities) as profiled:
        for _ in range(count):
            step()
        synchronize()
    wall = time.perf_counter() - started
    kernels = [event for event in profiled.events() if event.device_type.name == DEVICE.type.upper()]
    seconds = sum(event.cpu_time_total if DRY else event.device_time_total for event in kernels) / 1e6
    found |= {
        "kernels": round(len(kernels) / count),
        "busy": round(seconds / wall, 3),  # under the profiler, which slows the host
        "step_ms": round(1000 * wall / count, 2),
        "recipe": list(VPT),
        "device": device_name(DEVICE),
        "versions": versions(),
    }
    write_atomically(results / f"waiting-vpt-{BACKBONE[0].split('=')[1]}-{DEVICE.type}.json", json.dumps(found) + "\n")
    assert found["kernels"] > 10
    assert found["synchronizations"] <= SYNCHRONIZATIONS
    assert DRY or found["busy"] > 0.2


def test_two_workers_share_a_gpu(tmp_path: Path) -> None:
    """Both sweep on one card, beside the same caches' budget."""
    keys = [key for key in TINY if "protocol" not in key]
    grid = "sweep.grid={optim: {lr: [0.01, 0.1]}}"
    words = ["--tasks", "configs/digits/common.yaml", "--method", "linear", "vqt", "--workers", "2"]
    done = command("-m", "dist_vpt", "suite", *words, "--out", str(tmp_path / "suite"), *keys, grid, "sweep.seeds=[0]")
    assert done.returncode == 0, done.stdout[-3000:]
    found = [json.loads(line) for line in (tmp_path / "suite" / "results.jsonl").read_text().splitlines()]
    assert {result["method"] for result in found} == {"linear", "vqt"}
