"""Part trials of the acceptance on a GPU: steps that are replayed from a CUDA graph are those that are not.

Run dry, a tape plays the graph.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_vpt.errors import Interrupted
from dist_vpt.runs.adapters import collect
from dist_vpt.training import trials
from dist_vpt.training.step_graph import WARM_UP, StepGraph
from dist_vpt.training.trials import TrialGroup, fit_trials
from tests.gpu.device import DRY, KEY, accepts, cuda_only
from tests.running import few_digits
from tests.training.tape import TapeRecorder
from tests.training.test_trials import ask_to_stop, few, make, settings

pytestmark = accepts
SAME = ("runtime.deterministic=true", "runtime.tf32=false", "runtime.precision=fp32", KEY)
TRIALS = 4 if DRY else 20


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY:
        monkeypatch.setattr(trials, "recorder_of", lambda _: TapeRecorder())


@pytest.fixture(autouse=True)
def not_deterministic_afterwards() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


def each_of(method: str, optimizer: str, tmp_path: Path, *more: str, number: int = TRIALS) -> list[list[str]]:
    """Trials on 100 images: 5 epochs of 10 batches."""
    cache = "memory" if DRY else "device"
    data = few_digits(tmp_path / "data")
    return [[*some, *SAME, f"stream.cache={cache}", *more] for some in few(settings(method, optimizer, number), data)]


def fitted(folder: Path, each: Sequence[Sequence[str]], *, captured: bool) -> TrialGroup:
    lines: list[str] = []
    group = make(folder, each, lines.append)
    if not captured:
        group.graph = StepGraph(None, lines.append)
    fit_trials(group)
    group.close()
    assert not [line for line in lines if "captured" in line]
    used = group.trials[0].reader.backbone.chosen.get("training step")
    assert used == ("captured in a CUDA graph" if captured else None)
    return group


def assert_near(found: TrialGroup, wanted: TrialGroup, rel: float = 1e-6) -> None:
    for one, other in zip(found.trials, wanted.trials, strict=True):
        assert one.diverged == other.diverged
        for split, scores in other.progress.last.items():
            if isinstance(scores, dict):
                assert one.progress.last[split]["loss"] == pytest.approx(scores["loss"], rel=rel)
        if one.diverged:  # what it holds was lost before
            continue
        tensors = collect(other.reader)
        for name, tensor in collect(one.reader).items():
            assert (tensor - tensors[name]).norm() <= rel * tensors[name].norm(), name


@pytest.mark.parametrize(
    ("method", "optimizer", "more"),
    [
        ("linear", "sgd", ()),
        ("vqt", "adam", ()),
        ("vqt", "adamw", ("train.batch_size=30", "train.grad_accum_steps=2")),
        ("vqt", "sgd", ("stream.cache=memory",)),
        ("combo", "adamw", ()),
        ("ladder", "adamw", ()),
        ("side", "adam", ()),
    ],
)
def test_replayed_steps_are_the_plain_ones(method: str, optimizer: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """Over 50 steps (of 30 images: 20, the last of an epoch smaller), with a schedule and dropout."""
    each = each_of(method, optimizer, tmp_path, *more)
    assert_near(fitted(tmp_path / "replayed", each, captured=True), fitted(tmp_path / "plain", each, captured=False))


@cuda_only
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_too(precision: str, tmp_path: Path) -> None:
    each = each_of("vqt", "adam", tmp_path, f"runtime.precision={precision}")
    assert_near(fitted(tmp_path / "replayed", each, captured=True), fitted(tmp_path / "plain", each, captured=False))


def test_a_trial_that_diverges_touches_no_other(tmp_path: Path) -> None:
    each = each_of("linear", "sgd", tmp_path)
    each[1] += ["optim.lr=1e30", "optim.clip_norm=null"]
    each = [[*some, "optim.clip_norm=null"] for some in each]
    found = fitted(tmp_path / "replayed", each, captured=True)
    assert found.trials[1].diverged
    assert not any(trial.diverged for trial in (found.trials[0], *found.trials[2:]))
    assert_near(found, fitted(tmp_path / "plain", each, captured=False))


def test_a_resumed_pass_is_the_undisturbed_one(tmp_path: Path) -> None:
    each = each_of("vqt", "adam", tmp_path)
    interrupted = make(tmp_path / "b", each)
    ask_to_stop(interrupted)
    with pytest.raises(Interrupted, match="stopped at step 25"):
        fit_trials(interrupted)
    interrupted.close()
    resumed = fitted(tmp_path / "b", each, captured=True)
    assert_near(resumed, fitted(tmp_path / "whole", each, captured=True))


@contextmanager
def launches() -> Any:
    """How often the host launched kernels and graphs, and what waited for the GPU, within."""
    found = {"cudaLaunchKernel": 0, "cudaGraphLaunch": 0, "waits": 0}
    with (
        warnings.catch_warnings(record=True) as caught,
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled,
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for event in profiled.events():
        for name in ("cudaLaunchKernel", "cudaGraphLaunch"):  # and cudaLaunchKernelExC
            found[name] += event.name.startswith(name)
    found["waits"] = sum("called a synchronizing" in str(warning.message) for warning in caught)


@cuda_only
def test_a_replayed_step_is_one_launch(tmp_path: Path) -> None:
    """Beside those that take the rows of a cache and copy inputs: two for each of a batch's tensors."""
    counted: dict[bool, dict[str, int]] = {}
    for captured in (True, False):
        group = make(tmp_path / str(captured), each_of("vqt", "adam", tmp_path, "method.dropout=0"))
        group.start_epoch()
        if not captured:
            group.graph = StepGraph(None, lambda _: None)
        batches = group.train.epoch(0)
        for _ in range(WARM_UP + 2):
            group.take_step(next(batches))
            group.read_steps(but=1)
        torch.cuda.synchronize()
        with launches() as found:
            group.take_step(next(batches))
        counted[captured] = found
        group.read_steps()
        group.close()
    print(counted)
    assert counted[False]["cudaGraphLaunch"] == 0
    assert counted[True]["cudaGraphLaunch"] == 1
    assert counted[True]["cudaLaunchKernel"] < 40
    assert counted[False]["cudaLaunchKernel"] > 200
    assert counted[True]["waits"] == counted[False]["waits"] == 0


@cuda_only
def test_a_step_that_cannot_be_captured_is_taken_as_it_is() -> None:
    """An operator that a capture refuses, and one that the GPU's memory does not suffice for; the GPU stays usable."""
    lines: list[str] = []
    x = torch.ones(4, device="cuda")

    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()

    rehearsals = []

    def too_large(x: torch.Tensor) -> torch.Tensor:
        rehearsals.append(1)
        if len(rehearsals) == WARM_UP + 1:
            torch.empty(2**50, device=x.device)
        return x * 4

    steps: list[Callable[[torch.Tensor], torch.Tensor]] = [waits, too_large]
    for step in steps:
        recorder = trials.recorder_of(torch.device("cuda", 0))
        graph = StepGraph(recorder, lines.append)
        for _ in range(WARM_UP + 3):
            assert graph(step, x, []).tolist() == [4.0] * 4
    assert lines[0] == "it waits for the GPU"
    assert len(lines) == 2
    torch.cuda.synchronize()
    assert torch.randn(3, device="cuda").isfinite().all()
