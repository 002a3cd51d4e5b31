"""The plan: bytes counted on fake tensors against bytes that were really held, shares by hand, and what is advised."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dist_vpt import plan as plan_module
from dist_vpt.errors import RunFailed, UserError
from dist_vpt.footprint import LIVE_WEIGHTS, REDUCE_BUCKET, Footprint
from dist_vpt.plan import CONTEXT, GIB, ROOM, check_memory, choices, micro_batch, parse_memory, recommendation
from dist_vpt.recipe import Recipe, load_recipe
from tests.running import ROOT, train, words

# Methods, policies, kernels, optimisers and precisions that differ; one process, some with accumulated micro-batches.
RECIPES: dict[str, list[str]] = {
    "vpt": ["method.prompts=20"],
    "vpt checkpointed": ["method.prompts=20", "runtime.checkpointing=block", "optim.name=adamw", "optim.lr=0.01"],
    "vpt accumulated": ["method.prompts=20", "train.accumulate=2", "runtime.attention=eager"],
    "full": ["method.name=full", "optim.name=adamw", "optim.lr=1e-4"],
    "full in bf16": ["method.name=full", "runtime.precision=bf16", "optim.lr=1e-4"],
    "vqt": ["method.name=vqt", "method.queries=4", "optim.name=adam", "optim.lr=0.01"],
    "linear": ["method.name=linear"],
}
if find_spec("torchao") is not None:
    RECIPES["int8"] = ["method.prompts=20", "runtime.frozen_weights=int8", "runtime.precision=bf16"]
# Backward on fake tensors starts threads of autograd's, after which this process could not fork: so in another one.
COUNT = """
import json, sys
from dataclasses import asdict
from dist_vpt.footprint import footprint
from dist_vpt.recipe import load_recipe
from dist_vpt.plan import measured_bytes
told = {}
for name, options in json.loads(sys.argv[1]).items():
    recipe = load_recipe([], options)
    told[name] = [asdict(footprint(recipe, 10)), measured_bytes(recipe, 10)]
print(json.dumps(told))
"""


def recipe(*overrides: str) -> Recipe:
    return load_recipe([], words(Path("nowhere"), "data.image_size=24", "train.batch_size=16", *overrides))


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[Footprint, int]]:
    asked = {
        name: words(Path("nowhere"), "data.image_size=24", "train.batch_size=16", *o) for name, o in RECIPES.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(asked)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (Footprint(**told), held) for name, (told, held) in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", RECIPES)
def test_counted_bytes_are_those_that_the_engine_s_step_holds(name: str, counted: Any) -> None:
    """float32: but for what kernels take for themselves, which in bf16 is some."""
    found, held = counted[name]
    share = found.on("ddp", 1)
    assert share.held + share.working == pytest.approx(held, rel=0.05 if "bf16" in name else 0.01)


def test_what_stays_between_steps_is_known_by_hand(counted: Any) -> None:
    trained = (6 * 20 * 128 + 128 * 10 + 10) * 4  # prompts of six blocks, head
    vpt, adamw = counted["vpt"][0], counted["vpt checkpointed"][0]
    assert vpt.trained == vpt.gradients == vpt.optimizer == trained  # sgd: a momentum
    assert adamw.optimizer == pytest.approx(2 * trained, abs=64)  # and a step count
    assert vpt.parameters == vpt.trained_parameters + (vpt.frozen - 6 * 4) // 4  # mean and std: three numbers each
    full, half = counted["full"][0], counted["full in bf16"][0]
    assert full.trained == half.trained  # its weights stay float32
    assert full.frozen == 6 * 4


def test_policies_hold_less(counted: Any) -> None:
    assert counted["vpt checkpointed"][0].working < counted["vpt"][0].working / 2
    assert counted["vqt"][0].working < counted["vpt"][0].working / 2
    assert counted["vpt"][0].scoring == counted["vpt checkpointed"][0].scoring  # nothing is kept there anyway


FOOTPRINT = Footprint(
    frozen=1000, trained=400, gradients=400, optimizer=800, working=5000, height=5100, scoring=700,
    parameters=350, trained_parameters=100,
)  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "processes", "held", "beyond"),
    [
        ("ddp", 1, 1400 + 800, 5100),
        ("ddp", 4, 1400 + 800 + 400, 5000),
        ("zero1", 4, 1400 + (800 + 400) // 4 + 400, 5000 + 400),  # the bucket: no more than all gradients
        ("zero2", 4, 1400 + (800 + 400) // 4 + 100, 5000 + 400),
        ("zero3", 4, 350 + (800 + 400) // 4 + 100, 5000 + 400 + 1400),  # all weights are fewer than may be gathered
        ("zero3_offload", 4, 100, 5000 + 400 + 1400),
    ],
)
def test_shares_by_hand(strategy: str, processes: int, held: int, beyond: int) -> None:
    share = FOOTPRINT.on(strategy, processes)
    assert (share.held, share.peak) == (held, held + beyond)


def test_zero3_never_gathers_more_than_its_file_says() -> None:
    numbers = 10 * LIVE_WEIGHTS
    large = Footprint(2 * numbers, 0, 0, 0, 0, 0, 0, parameters=numbers, trained_parameters=0)
    assert large.on("zero3", 2).peak == numbers + 2 * LIVE_WEIGHTS


def test_the_sizes_are_those_of_the_files() -> None:
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        zero = json.loads((ROOT / "launch" / "accelerate" / f"{name}.json").read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == REDUCE_BUCKET
        if zero["stage"] == 3:
            assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == LIVE_WEIGHTS


@pytest.fixture
def by_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 1 GiB and 0.1 GiB an image, 0.02 where blocks are checkpointed; scoring takes 0.01 GiB an image."""

    def footprint(recipe: Recipe, classes: int, images: int) -> Footprint:
        each = {"none": 0.1, "block": 0.02}.get(recipe.runtime.checkpointing, 0.1)
        step, scoring = int((1 + each * images) * GIB), int(0.01 * recipe.train.eval_batch_size * GIB)
        return Footprint(GIB, 0, 0, 0, step, step, scoring, parameters=1, trained_parameters=0)

    monkeypatch.setattr(plan_module, "footprint", footprint)


def room(gib: float) -> int:
    """Memory of a device in which so many GiB fit."""
    return int(gib * GIB * (1 + ROOM) + CONTEXT) + 1


@pytest.mark.usefixtures("by_the_image")
@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        (3.7, "the recipe as it is"),  # 1 + 1 + 16 * 0.1
        (3.5, "runtime.checkpointing=block"),
        (2.2, "train.accumulate=2 "),  # 8 images take 0.16
        (2.05, "train.accumulate=8 "),
        (1.0, None),
    ],
)
def test_what_is_recommended(gib: float, advice: str | None) -> None:
    some = recipe("train.eval_batch_size=50")
    found = [c for c in choices(some, 10, 1, room(gib)) if c.policy in ("none", "block")]
    if advice is None:
        with pytest.raises(RunFailed, match="nothing fits"):
            recommendation(some, found, 1, room(gib))
        return
    assert advice.strip() in recommendation(some, found, 1, room(gib))


@pytest.mark.usefixtures("by_the_image")
def test_the_largest_batch_fits_and_one_more_image_does_not() -> None:
    some = recipe()
    for choice in choices(some, 10, 1, room(5)):
        each = 0.02 if choice.policy == "block" else 0.1
        if choice.policy in ("none", "block"):
            assert 2 + each * choice.largest <= 5 < 2 + each * (choice.largest + 1) + 1e-6


@pytest.mark.usefixtures("by_the_image")
def test_scoring_that_does_not_fit_is_made_smaller() -> None:
    some = recipe("train.eval_batch_size=500")
    found = choices(some, 10, 1, room(4))
    assert "train.eval_batch_size=300" in recommendation(some, found, 1, room(4))


@pytest.mark.usefixtures("by_the_image")
def test_a_run_that_cannot_fit_is_refused_or_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(
        device=torch.device("cuda"), num_processes=1, state=SimpleNamespace(deepspeed_plugin=None)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(3.5 * (1 + ROOM) * GIB), 0))
    with pytest.raises(UserError, match=r"estimated to hold 3.6 GiB .* recommended: runtime.checkpointing=block"):
        check_memory(recipe("train.eval_batch_size=50"), gpu, 10)
    assert "recommended" in check_memory(recipe("train.eval_batch_size=50", "runtime.memory_check=warn"), gpu, 10)
    assert check_memory(recipe("runtime.memory_check=ignore"), gpu, 10) == ""
    assert check_memory(recipe("train.batch_size=4", "train.eval_batch_size=50"), gpu, 10) == ""
    assert check_memory(recipe("train.batch_size=200"), Accelerator(cpu=True), 10) == ""  # of GPUs alone


def test_an_out_of_memory_error_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("dist_vpt.engine.fit", fails)
    monkeypatch.setattr(plan_module, "way_out", lambda *_: "recommended: less")
    with pytest.raises(RunFailed, match="out of memory on cpu; recommended: less"):
        train(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("512mib", 2**29), ("0.5", GIB // 2)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "24 bytes", "0GiB", "-1"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--gpu-memory .*: must be a size such as 24GiB"):
        parse_memory(text)


def test_a_batch_that_devices_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"train.batch_size = 16: must be a multiple of 3"):
        micro_batch(recipe(), 3)


def test_the_command(tmp_path: Path) -> None:
    def command(*more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "dist_vpt", "plan", *words(tmp_path / "run", "data.image_size=24"), *more]
        return subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = command("--gpus", "2", "--gpu-memory", "4GiB", "--measure", "train.accumulate=2")
    assert done.returncode == 0, done.stderr
    for said in (
        "micro-batches of 50 images on 2 devices with 4.0 GiB",
        "zero3_offload",
        "measured: ",
        "recommended: ",
    ):
        assert said in " ".join(done.stdout.split())
    assert not list(tmp_path.iterdir())
    done = command("--gpu-memory", "600MiB")
    assert done.returncode == 3
    assert "error: nothing fits" in done.stderr
    assert command("--gpus", "0").returncode == 2
    assert command("data.task=dtd", "--gpu-memory", "4GiB").returncode == 0  # without its data
    done = command("data.task=mine", "data.format=vtab_folder", "--gpu-memory", "4GiB")
    assert done.returncode == 2
    assert "error: " in done.stderr
