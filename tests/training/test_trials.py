"""Trials in one pass: each is what it would be alone, whatever the others do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.launch_env import ALONE, LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RunFailed, RunFolderError
from dist_vpt.frozen_stream import placement as stream_placement
from dist_vpt.frozen_stream.cache import nbytes
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.frozen_stream.placement import BUDGET
from dist_vpt.methods import logistic
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import EarlyStopConfig, Recipe
from dist_vpt.runs.adapters import collect, restore
from dist_vpt.runs.progress import Progress
from dist_vpt.training import build_trials, trial_state, trials
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.build_trials import build_trial_group
from dist_vpt.training.trials import TrialGroup, fit_trials, score_trials
from tests.running import metrics, pictures, train, words

# 50 steps: 5 epochs of 10 steps.
COMMON = ["train.batch_size=100", "train.epochs=5", "train.data_seed=11", "optim.warmup_epochs=1"]
QUIET = ["run.log_every=50", "run.trackers=[]"]


def settings(reader: str, optimizer: str, trials: int) -> list[list[str]]:
    """Trials that differ in all that trials may differ in."""
    method, each = reader.removesuffix("_sum"), []
    for t in range(trials):
        some = [
            f"method.name={method}",
            f"optim.name={optimizer}",
            f"optim.lr={(0.5, 0.1, 0.02, 0.01)[t % 4]}",
            f"optim.weight_decay={(0.0, 0.01)[t % 2]}",
            f"optim.clip_norm={1.0 if optimizer == 'sgd' else 'null'}",
            f"seed={t}",
        ]
        if method == "vqt":
            some += ["method.blocks=[1, 4]", f"method.queries={1 + t % 3}", f"method.dropout={(0.0, 0.2)[t % 5 == 1]}"]
        if method in ("combo", "ladder"):
            some += [f"optim.lr={(0.003, 0.001, 0.0003)[t % 3]}"]
        if method in ("combo", "ladder"):
            some += [f"method.dropout={(0.0, 0.2)[t % 2]}"]
        if method == "combo":
            some += ["method.width=16", "method.depth=2", f"method.sum_blocks={reader != method}"]
        each.append([*COMMON, *some])
    return each


def few(each: list[list[str]], data: tuple[str, ...]) -> list[list[str]]:
    """The same trials, by as many and as large steps, on a tenth of the images."""
    steps = [[f"optim.lr={10 * float(w[9:])}" if w.startswith("optim.lr=") else w for w in some] for some in each]
    return [[*some, *data, "train.batch_size=10"] for some in steps]


def recipes(tmp_path: Path, each: Sequence[Sequence[str]]) -> list[Recipe]:
    return [load_recipe([], words(tmp_path / f"alone-{t}", *some)) for t, some in enumerate(each)]


def make(
    tmp_path: Path, each: Sequence[Sequence[str]], show: Callable[[str], None] = lambda _: None, **more: bool
) -> TrialGroup:
    tmp_path.mkdir(exist_ok=True)
    some = recipes(tmp_path, each)
    return build_trial_group(some, make_accelerator(some[0], ALONE), StopSignal(), tmp_path / "pass.pt", show, **more)


def fitted(tmp_path: Path, each: Sequence[Sequence[str]], **more: bool) -> TrialGroup:
    made = make(tmp_path, each, **more)
    fit_trials(made)
    made.close()
    return made


def losses(folder: Path, split: str) -> list[float]:
    return [line["loss"] for line in metrics(folder) if line["split"] == split]


@pytest.mark.parametrize(
    ("method", "optimizer", "trials"),
    [
        pytest.param("vqt", "adam", 20, marks=pytest.mark.slow),
        ("vqt", "sgd", 4),
        ("vqt", "adamw", 4),
        ("linear", "sgd", 4),
        ("mlp", "adam", 3),
        ("side", "adam", 2),
        ("combo", "adamw", 3),
        pytest.param("combo", "adamw", 20, marks=pytest.mark.slow),
        ("combo_sum", "adamw", 2),
        ("ladder", "adamw", 3),
    ],
)
def test_trials_together_are_what_they_are_alone(
    method: str, optimizer: str, trials: int, data: tuple[str, ...], tmp_path: Path
) -> None:
    together = assert_as_alone(tmp_path, few(settings(method, optimizer, trials), data))
    assert all(trial.progress.images == 500 for trial in together.trials)


def test_smaller_batches_and_weights_are_those_of_a_run_alone(data: tuple[str, ...], tmp_path: Path) -> None:
    more = ["train.batch_size=13", "train.epochs=2", "train.label_smoothing=0.1", "train.class_weights=inv"]
    assert_as_alone(tmp_path, [[*some, *more] for some in few(settings("linear", "adam", 2), data)])


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_balanced_draws_are_those_of_a_run_alone(cache: str, data: tuple[str, ...], tmp_path: Path) -> None:
    more = ["train.batch_size=13", "train.epochs=2", "train.sampling=balanced", f"stream.cache={cache}"]
    assert_as_alone(tmp_path, [[*some, *more] for some in few(settings("linear", "adam", 2), data)])


def test_a_stop_while_readers_are_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = [[*COMMON, "method.name=logistic", f"method.c={c}"] for c in (0.1, 10.0)]
    made, solve = make(tmp_path, each), logistic.solve_path

    def solve_and_stop(*problem: Any) -> Any:
        made.stop.requested = True
        with pytest.raises(Interrupted) as caught:
            solve(*problem)
        raise caught.value

    monkeypatch.setattr(logistic, "solve_path", solve_and_stop)
    with pytest.raises(Interrupted, match="while it was fitted or val was scored, to be fitted again; the same"):
        fit_trials(made)
    made.close()
    assert made.stop.agreed


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_images_that_cannot_be_read_weigh_nothing(cache: str, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", broken=lambda i: i % 3 == 1)
    more = [*data, "data.on_decode_error=skip", f"stream.cache={cache}", "train.class_weights=inv", "train.epochs=2"]
    together = assert_as_alone(tmp_path, [[*some, *more] for some in settings("linear", "adam", 2)])
    assert len(together.skipped) == 20


def assert_as_alone(tmp_path: Path, each: Sequence[Sequence[str]]) -> TrialGroup:
    """Trains trials in one pass and each as a run, and compares them."""
    together = fitted(tmp_path, each)
    tests = [scores.compute() for scores in score_trials(together, together.trials, "test")]
    for t, some in enumerate(each):
        folder = tmp_path / f"alone-{t}"
        result = train(folder, *some, *QUIET)
        trial = together.trials[t]
        of_train = next(line for line in reversed(metrics(folder)) if line["split"] == "train")
        assert trial.progress.last["train"]["loss"] == pytest.approx(of_train["loss"], rel=1e-5)
        assert trial.progress.last["train"]["top1"] == pytest.approx(of_train["top1"], abs=1e-4)
        assert trial.progress.last["val"]["loss"] == pytest.approx(losses(folder, "val")[-1], rel=1e-5)
        assert trial.progress.last["val"]["top1"] == pytest.approx(result["last"]["val"]["top1"], abs=1e-4)
        assert tests[t]["loss"] == pytest.approx(result["last"]["test"]["loss"], rel=1e-5)
        assert tests[t]["top1"] == pytest.approx(result["last"]["test"]["top1"], abs=1e-4)
    return together


def test_live_equals_cached(tmp_path: Path) -> None:
    each = settings("vqt", "adam", 3)
    cached = fitted(tmp_path / "a", [[*some, "stream.cache=memory"] for some in each])
    live = fitted(tmp_path / "b", [[*some, "stream.cache=none"] for some in each])
    for a, b in zip(cached.trials, live.trials, strict=True):
        assert a.progress.last["val"]["loss"] == pytest.approx(b.progress.last["val"]["loss"], rel=1e-5)


def test_keys_and_values_are_kept_for_several_trials_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They make another order of additions, and nothing else."""
    each = settings("vqt", "adam", 3)

    def kept(made: TrialGroup) -> StreamOutput:
        return next(made.train.epoch(0))[0]["images"]

    roomy, one = make(tmp_path / "a", each), make(tmp_path / "b", each[:1])
    assert not kept(roomy).normed
    assert kept(roomy).keys
    assert not kept(one).keys  # alone, a trial would hold twice the bytes of its batch for backward
    method = roomy.trials[0].reader
    room = nbytes(method.backbone, method.shared_spec, 1200) / BUDGET - 1
    monkeypatch.setattr(stream_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    narrow = make(tmp_path / "c", each)
    assert not kept(narrow).keys
    for made in (roomy, narrow):
        fit_trials(made)
    for a, b in zip(roomy.trials, narrow.trials, strict=True):
        assert a.progress.last["val"]["loss"] == pytest.approx(b.progress.last["val"]["loss"], rel=1e-5)
    for made in (roomy, one, narrow):
        made.close()


def test_accumulated_micro_batches_equal_whole_batches(tmp_path: Path) -> None:
    each = [[w for w in some if "dropout" not in w] for some in settings("vqt", "adam", 3)]
    whole = fitted(tmp_path / "a", each)
    parts = fitted(tmp_path / "b", [[*some, "train.grad_accum_steps=4"] for some in each])
    for a, b in zip(whole.trials, parts.trials, strict=True):
        assert a.progress.last["val"]["loss"] == pytest.approx(b.progress.last["val"]["loss"], rel=1e-4)


def test_a_diverging_trial_is_marked_and_affects_no_other(tmp_path: Path) -> None:
    each = settings("vqt", "sgd", 3)
    each = [[w for w in some if "clip_norm" not in w] for some in each]
    wild = [*each[1], "optim.lr=1e30", "optim.scale_lr=false", "optim.warmup_epochs=0"]
    wild = [w for w in wild if w != "optim.warmup_epochs=1"]
    calm = [[*some[:-1], some[-1]] for some in (each[0], each[2])]
    for some in calm:
        some += ["optim.scale_lr=false", "optim.warmup_epochs=0"]
    mixed = fitted(tmp_path / "a", [calm[0], wild, calm[1]])
    alone = fitted(tmp_path / "b", calm)
    assert "at step" in mixed.trials[1].diverged
    assert not mixed.trials[1].running
    for a, b in zip((mixed.trials[0], mixed.trials[2]), alone.trials, strict=True):
        assert not a.diverged
        assert a.progress.last["val"]["loss"] == pytest.approx(b.progress.last["val"]["loss"], rel=1e-5)
        for name, tensor in collect(a.reader).items():
            assert torch.allclose(tensor, collect(b.reader)[name], atol=1e-5)


def test_trials_stop_early_each_on_its_own(tmp_path: Path) -> None:
    slow = [*settings("linear", "sgd", 1)[0], "train.early_stop.patience=1", "train.early_stop.min_delta=5"]
    slow = [word for word in slow if not word.startswith("optim.lr")]
    stopped = fitted(tmp_path, [[*slow, "optim.lr=1e-9"], [*slow, "optim.lr=0.05"]])
    first, second = stopped.trials
    assert first.progress.ended
    assert first.progress.last["epoch"] == 2  # the first evaluation always rises, the second did not
    assert second.progress.last["epoch"] > first.progress.last["epoch"]
    assert not first.best  # nobody asked for it


def test_the_best_epoch_is_kept_beside_the_last(tmp_path: Path) -> None:
    """Large steps that never shrink go up and down on val."""
    common = [word for word in settings("linear", "sgd", 1)[0] if not word.startswith(("optim.lr", "optim.clip"))]
    common += ["method.head=published", "optim.scale_lr=true", "optim.schedule=constant"]
    done = fitted(tmp_path, [[*common, f"optim.lr={lr}"] for lr in (0.5, 3, 1000)], keeps_best=True)
    epochs = [(trial.progress.best["epoch"], trial.progress.last["epoch"]) for trial in done.trials]
    assert any(best < last for best, last in epochs)
    for trial in done.trials:
        restore(trial.reader, trial.best, tmp_path)
    for trial, scores in zip(done.trials, score_trials(done, done.trials, "val"), strict=True):
        assert scores.compute()["top1"] == pytest.approx(trial.progress.best["val"]["top1"], abs=1e-4)


def test_a_rise_is_the_same_in_float32_and_float64() -> None:
    """A run alone and a pass of trials compute their scores in different types."""
    for dtype in (np.float32, np.float64):
        progress = Progress()
        for right in (181, 182):
            progress.scored({"top1": 100 * float(dtype(right) / dtype(200))}, EarlyStopConfig(min_delta=0.5))
        assert progress.without_rise == 1


def test_a_pass_that_was_stopped_after_its_end_computes_no_stream(tmp_path: Path) -> None:
    each = settings("linear", "sgd", 2)
    fitted(tmp_path, each)
    lines: list[str] = []
    again = make(tmp_path, each, lines.append)
    fit_trials(again)
    again.close()
    assert not any("frozen stream" in line for line in lines)


def ask_to_stop(group: TrialGroup) -> None:
    """Let a stop be asked for with the fifth step of the third epoch."""
    next_batches = group.train.epoch

    def epoch_of(epoch: int, step: int = 0) -> Any:
        for number, batches in enumerate(next_batches(epoch, step)):
            group.stop.requested = epoch == 2 and number == 4
            yield batches

    group.train.epoch = epoch_of  # type: ignore[method-assign]


def test_a_stopped_pass_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    each = settings("vqt", "adam", 3)
    whole = fitted(tmp_path / "a", each)

    interrupted = make(tmp_path / "b", each)
    ask_to_stop(interrupted)
    with pytest.raises(Interrupted, match="stopped at step 25 with its state saved; the same command resumes it"):
        fit_trials(interrupted)
    interrupted.close()
    lines: list[str] = []
    resumed = make(tmp_path / "b", each, lines.append)
    assert any("resumed from" in line and "epoch 3" in line for line in lines)
    assert (resumed.epoch, resumed.progress.step) == (2, 5)
    fit_trials(resumed)
    resumed.close()
    for a, b in zip(whole.trials, resumed.trials, strict=True):
        assert a.progress.last == b.progress.last
        for name, tensor in collect(a.reader).items():
            assert torch.equal(tensor, collect(b.reader)[name])


def test_a_full_disk_costs_saves_and_then_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = settings("linear", "sgd", 2)
    whole = fitted(tmp_path / "whole", each)
    write, attempts = trial_state.write_atomically, count(1)
    monkeypatch.setattr(trials, "SAVE_SECONDS", -1.0)  # a save an epoch

    def full_at(*numbers: int) -> None:
        def full(path: Path, content: bytes) -> None:
            if next(attempts) in numbers:
                raise OSError(28, "No space left on device")
            write(path, content)

        monkeypatch.setattr(trial_state, "write_atomically", full)

    full_at(1, 3, 4)
    lines: list[str] = []
    spared = make(tmp_path / "spared", each, lines.append)
    fit_trials(spared)
    spared.close()
    warnings = [line for line in lines if line.startswith("warning: the state of step ")]
    assert [line.split()[5] for line in warnings] == ["10", "30", "40"]
    assert "training continues, and would resume from the beginning of these trials" in warnings[0]
    assert "training continues, and would resume from the state before" in warnings[1]

    attempts = count(1)
    full_at(2, 3, 4)
    struck = make(tmp_path / "struck", each)
    with pytest.raises(RunFailed, match=r"3 states in a row could not be saved, .* resumes from the state before"):
        fit_trials(struck)
    struck.close()
    resumed = make(tmp_path / "struck", each, lines.append)
    assert resumed.epoch == 1
    fit_trials(resumed)
    resumed.close()
    for a, b, c in zip(whole.trials, spared.trials, resumed.trials, strict=True):
        assert a.progress.last == b.progress.last == c.progress.last


def test_a_pass_that_is_stopped_while_val_is_scored_scores_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = settings("linear", "sgd", 2)
    whole = fitted(tmp_path / "a", each, keeps_best=True)
    interrupted = make(tmp_path / "b", each, keeps_best=True)
    score, scored = trials.quick_scores, []

    def asks_to_stop(p: TrialGroup, *args: Any) -> Any:
        p.stop.requested = len(scored) == 1
        scored.append(p.epoch)
        return score(p, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "quick_scores", asks_to_stop)
        with pytest.raises(Interrupted, match=r"stopped at step [0-9]+, while val was scored, with its state saved"):
            fit_trials(interrupted)
    interrupted.close()
    assert len(scored) == 2
    resumed = make(tmp_path / "b", each, keeps_best=True)
    assert (resumed.epoch, resumed.progress.step) == (scored[1], resumed.train.steps_per_epoch)
    fit_trials(resumed)
    resumed.close()
    for a, b in zip(whole.trials, resumed.trials, strict=True):
        assert a.progress == b.progress
        assert all(torch.equal(tensor, b.best[name]) for name, tensor in a.best.items())


def test_a_damaged_state_and_one_of_other_trials_are_refused(tmp_path: Path) -> None:
    each = settings("linear", "sgd", 2)
    fitted(tmp_path, each)
    with pytest.raises(RunFolderError, match=r"pass.pt: damaged state \(it is of other trials\)"):
        make(tmp_path, list(reversed(each)))
    (tmp_path / "pass.pt").write_bytes(b"PK\x03\x04 not a state")
    lines: list[str] = []
    with pytest.raises(RunFolderError, match=r"damaged state .* remove it to train its trials anew"):
        make(tmp_path, each, lines.append)
    assert not any("frozen stream" in line for line in lines)  # raised before that is computed


def test_states_are_saved_within_an_epoch_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill then costs the steps since, also in an epoch that takes hours."""
    each = [[*some, "run.save_every=4"] for some in settings("vqt", "adam", 2)]
    whole = fitted(tmp_path / "whole", settings("vqt", "adam", 2))
    step, write, saved = trials.step_trials, trials.write_trials, []

    def killed(p: TrialGroup, fetched: Any) -> None:
        if (p.epoch, p.progress.step) == (2, 6):
            raise KeyboardInterrupt
        step(p, fetched)

    def noted(file: Path, some: Any, shared: dict[str, Any]) -> None:
        saved.append(shared["epoch"] * 10 + shared["step"])
        write(file, some, shared)

    monkeypatch.setattr(trials, "write_trials", noted)
    monkeypatch.setattr(trials, "SAVE_SECONDS", math.inf)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "step_trials", killed)
        struck = make(tmp_path / "struck", each)
        with pytest.raises(KeyboardInterrupt):
            fit_trials(struck)
        struck.close()
    assert saved == [4, 8, 12, 16, 24]  # 20 is the end of an epoch
    moved = [[*some, "data.workers=1", "run.save_every=null"] for some in each]  # what may change in a run
    resumed = make(tmp_path / "struck", moved)
    assert (resumed.epoch, resumed.progress.step) == (2, 4)
    fit_trials(resumed)
    resumed.close()
    for a, b in zip(whole.trials, resumed.trials, strict=True):
        assert a.progress.last == b.progress.last


def test_without_val_trials_are_trained_and_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build_trials.build_components

    def without_val(recipe: Recipe, launch: LaunchEnv) -> Any:
        parts = made(recipe, launch)
        return replace(parts, splits=replace(parts.splits, val=None))

    monkeypatch.setattr(build_trials, "build_components", without_val)
    done = fitted(tmp_path, settings("linear", "sgd", 2))
    assert [set(trial.progress.last) for trial in done.trials] == [{"epoch", "train"}] * 2


def test_unreadable_images_are_known_after_a_resumption(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", broken=lambda i: i % 3 == 1)
    each = [["method.name=linear", *data, "data.on_decode_error=skip", "train.epochs=1", "stream.cache=none"]]
    done = fitted(tmp_path / "run", each)
    assert 0 < len(done.skipped) < 20
    known = set(done.skipped)
    again = make(tmp_path / "run", each)
    assert again.skipped == known
    score_trials(again, again.trials, "test")
    assert len(again.skipped) == 20
    again.close()


def test_trials_in_fp16_have_a_gradient_scale_each(tmp_path: Path) -> None:
    """On a CPU, where a recipe cannot ask for it: `train` and `sweep` want a GPU for fp16."""

    def made(name: str, precision: str) -> TrialGroup:
        each = [["train.epochs=2", *some, f"runtime.precision={precision}"] for some in settings("vqt", "adam", 3)]
        (tmp_path / name).mkdir()
        some = recipes(tmp_path / name, each)
        return build_trial_group(
            some, RankAccelerator(cpu=True), StopSignal(), tmp_path / name / "pass.pt", lambda _: None
        )

    wanted, found = made("fp32", "fp32"), made("fp16", "fp16")
    overflowing = made("overflow", "fp16")
    overflowing.trials[1].state["scale"].fill_(2.0**127)
    for one in (wanted, found, overflowing):
        fit_trials(one)
        one.close()
    assert {p.dtype for p in found.trials[0].reader.backbone.parameters()} == {torch.float16}
    for a, b in zip(found.trials, wanted.trials, strict=True):
        assert not a.diverged
        assert a.progress.last["train"]["loss"] == pytest.approx(b.progress.last["train"]["loss"], rel=0.01)
    for t, (a, b) in enumerate(zip(overflowing.trials, found.trials, strict=True)):
        assert not a.diverged
        assert float(a.state["scale"]) < 2.0**100
        same = all(torch.equal(x, collect(b.reader)[name]) for name, x in collect(a.reader).items())
        assert same == (t != 1)  # its first steps were skipped
    again = made_again(overflowing, tmp_path / "overflow" / "pass.pt")
    assert [float(t.state["scale"]) for t in again.trials] == [float(t.state["scale"]) for t in overflowing.trials]


def made_again(p: TrialGroup, state: Path) -> TrialGroup:
    """From its saved state."""
    return build_trial_group(
        [t.recipe for t in p.trials], RankAccelerator(cpu=True), StopSignal(), state, lambda _: None
    )
