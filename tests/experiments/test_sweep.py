"""`dist-vpt sweep`: the grid is chosen on val, the seeds are scored on test, and a kill loses nothing."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dist_vpt.cli.main import main
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import RecipeError, RunFailed, UserError
from dist_vpt.experiments import sweep as sweep_module
from dist_vpt.experiments import sweep_worker
from dist_vpt.experiments.sweep_grid import SweepJob, grid_jobs, rank
from dist_vpt.files import read_json
from dist_vpt.methods.config_readers import ComboConfig, LinearConfig
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs import state
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training import trials as trials_module
from tests.forks import ROOT, Forks
from tests.forks import command as forked
from tests.running import SMALLEST, few_images, pictures, wait_for, words

GRID = ["sweep.grid.optim.lr=[0.5, 0.1, 0.02]", "sweep.grid.optim.weight_decay=[0.01, 0.0]", "sweep.seeds=[42, 44]"]
READER = ["method.name=linear", "train.epochs=2", *GRID]

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def command(folder: Path, *overrides: str) -> list[str]:
    return ["sweep", *words(folder, *overrides)]


def swept(folder: Path, *overrides: str) -> dict[str, Any]:
    assert main(command(folder, *overrides)) == 0
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a reader's sweep, its table and what was shown."""
    folder, shown = tmp_path_factory.mktemp("reader") / "sweep", io.StringIO()
    with contextlib.redirect_stdout(shown):
        content = swept(folder, *READER)
    return folder, content, shown.getvalue()


def without_times(content: dict[str, Any]) -> dict[str, Any]:
    content = json.loads(json.dumps(content))
    content.pop("seconds")
    for trial in content["trials"]:
        trial.pop("seconds")
    return content


def test_a_reader_is_swept_in_one_pass(reader: tuple[Path, dict[str, Any], str]) -> None:
    folder, content, shown = reader
    assert "6 trials in one pass" in shown
    assert "2 trials in one pass" in shown
    assert len(content["trials"]) == 6
    best = max(trial["last"]["val"]["top1"] for trial in content["trials"])
    chosen = next(t for t in content["trials"] if t["setting"] == content["chosen"])
    assert chosen["last"]["val"]["top1"] == best
    assert all("test" not in trial["last"] for trial in content["trials"])  # the test split never chooses
    tests = [content["seeds"][seed]["top1"] for seed in ("42", "44")]
    assert content["test"]["top1"]["values"] == tests
    assert content["test"]["top1"]["mean"] == pytest.approx(sum(tests) / 2)
    assert content["test"]["top1"]["std"] == pytest.approx(abs(tests[0] - tests[1]) / 2**0.5)
    assert (folder / "heatmap.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tb").glob("events*"))
    assert not list(folder.glob(".pass-*"))


def test_a_seed_is_a_run_that_eval_and_predict_know(
    reader: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, content, _ = reader
    run = folder / "seeds" / "42"
    assert main(["eval", str(run)]) == 0
    found = next(line for line in capsys.readouterr().out.splitlines() if "top1" in line)
    numbers = [float(word) for word in found.replace("│", " ").split() if word.replace(".", "").isdigit()]
    assert numbers == [pytest.approx(content["seeds"]["42"]["top1"], abs=1e-3)] * 2
    recipe = load_recipe([run / "recipe.yaml"])
    assert (recipe.seed, recipe.data.train_on) == (42, "trainval")
    assert recipe.optim.lr == content["chosen"]["optim.lr"]


def test_the_same_command_again_shows_the_same_table(
    reader: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first, _ = reader
    again = swept(folder, *READER)
    assert again == first
    shown = capsys.readouterr().out
    assert "in one pass" not in shown
    assert "over 2 seeds on trainval" in shown


def test_another_grid_in_the_folder_is_refused(
    reader: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(reader[0], *READER, "optim.clip_norm=1")) == 2
    assert "holds the run of another recipe" in capsys.readouterr().err


def test_a_trial_alone_is_the_trial_of_the_sweep(reader: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, content, _ = reader
    stored = json.loads((folder / "trials" / "002.json").read_text())
    file = tmp_path / "trial.yaml"
    file.write_text(json.dumps(stored["recipe"]))
    assert main(["train", str(file), f"run.dir={tmp_path / 'alone'}"]) == 0
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert alone["last"]["val"]["loss"] == pytest.approx(content["trials"][2]["last"]["val"]["loss"], rel=1e-5)


def test_writers_are_swept_one_after_the_other(data: tuple[str, ...], tmp_path: Path) -> None:
    grid = ["sweep.grid.optim.lr=[0.5, 0.1]", "sweep.seeds=[42]"]
    content = swept(tmp_path / "sweep", *data, "train.epochs=1", *grid)
    assert len(content["trials"]) == 2
    assert content["test"]["top1"]["std"] == 0
    for run in ("trials/000", "trials/001", "seeds/42"):
        assert json.loads((tmp_path / "sweep" / run / "run.json").read_text())["status"] == "done"
    assert "test" not in json.loads((tmp_path / "sweep" / "trials" / "000" / "result.json").read_text())["last"]


def test_grids_over_other_keys_are_passes_of_their_own(
    data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["sweep.grid.optim.name=[sgd, adam]", "sweep.grid.method.queries=[1, 2]", "sweep.seeds=[42]"]
    content = swept(tmp_path / "sweep", *data, "method.name=vqt", *grid)
    assert capsys.readouterr().out.count("2 trials in one pass") == 2
    assert {(t["setting"]["optim.name"], t["setting"]["method.queries"]) for t in content["trials"]} == {
        (name, queries) for name in ("sgd", "adam") for queries in (1, 2)
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.grid.optim.lrr=[1]", "optim.lrr: there is no such key"),
        ("sweep.grid.optim.lr=[0.1, -1]", "optim.lr=-1"),
        ("sweep.grid.optim.lr=[]", "grid.optim.lr = []: must be a list with at least one value"),
        ("sweep.grid.optim.lr=0.1", "grid.optim.lr = 0.1: must be a list"),
        ("sweep.grid.optim.lr=[0.1, 0.1]", "each given once"),
        ("sweep.grid.seed=[1, 2]", "grid.seed: is set by the sweep"),
        ("sweep.grid.method.name=[linear, cls]", "cls and the recipe's linear cannot share a sweep"),
        ("sweep.grid.train.test=[true, false]", "grid.train.test: is set by the sweep"),
        ("backbone.weights=missing.safetensors", "missing.safetensors: no such weights file"),
        ("sweep.seeds=[1, 1]", "seeds = [1, 1]: must differ; give each once"),
    ],
)
def test_bad_grids_are_refused(override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "sweep", "method.name=linear", override)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def jobs(tmp_path: Path, *overrides: str) -> tuple[Recipe, list[SweepJob]]:
    recipe = load_recipe([], words(tmp_path, *READER, *overrides))
    return recipe, grid_jobs(recipe, tmp_path)


def outcomes(top1: Sequence[float | None]) -> list[dict[str, Any]]:
    return [
        {"diverged": "the loss was nan"} if v is None else {"diverged": None, "last": {"val": {"top1": v}}}
        for v in top1
    ]


def test_ties_go_to_the_smaller_learning_rate(tmp_path: Path) -> None:
    _, six = jobs(tmp_path)
    assert [job.setting["optim.lr"] for job in six] == [0.5, 0.5, 0.1, 0.1, 0.02, 0.02]
    assert rank(six, outcomes([80, 70, 80, 80, 79, None])) == [six[n] for n in (2, 3, 0, 4, 1)]
    with pytest.raises(RunFailed, match="every trial of the grid diverged"):
        rank(six, outcomes([None] * 6))


def test_another_method_of_a_grid_has_its_own_defaults(tmp_path: Path) -> None:
    """And the recipe's settings that are no defaults."""
    default = ("protocol=default", "sweep.grid={method: {name: [vqt, linear, combo]}}")
    recipe = load_recipe([], words(tmp_path, "method.name=vqt", *default, "method.head=published"))
    vqt, linear, combo = (job.recipe.method for job in grid_jobs(recipe, tmp_path))
    assert vqt == recipe.method
    assert linear == LinearConfig(head="published")
    assert combo == ComboConfig(head="published")
    given = load_recipe([], words(tmp_path, "method.name=vqt", *default, "method.queries=3"))
    with pytest.raises(RecipeError, match=r"method.name=linear: method.queries: there is no such key; leave it out"):
        grid_jobs(given, tmp_path)


def test_a_grid_that_breaks_a_rule_names_the_trial(tmp_path: Path) -> None:
    recipe = load_recipe([], words(tmp_path, "sweep.grid.optim.warmup_epochs=[0, 5]"))
    with pytest.raises(RecipeError, match=r"optim.warmup_epochs=5: .*must be below train.epochs"):
        grid_jobs(recipe, tmp_path)


def start(
    folder: Path, *overrides: str, strategy: str = "single", before: Callable[[int], None] = lambda rank: None
) -> Forks:
    return forked(command(folder, *overrides), Path(f"{folder}.txt"), strategy, before)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["method.name=vqt", "method.name=vpt"])
def test_killed_and_started_again_it_gives_the_same_table(method: str, data: tuple[str, ...], tmp_path: Path) -> None:
    grid = [*data, "train.epochs=2", "sweep.grid.optim.lr=[5, 1]", "sweep.seeds=[42, 44]", "run.trackers=[]", method]
    whole = swept(tmp_path / "whole", *grid)
    moments = ("trials/000.json",) if method.endswith("vpt") else ("run.json", "seeds/44.json")
    for moment in moments:
        forks = start(tmp_path / "killed", *grid)
        wait_for(lambda moment=moment: (tmp_path / "killed" / moment).exists())
        forks.send(signal.SIGKILL)
        assert forks.finish() == [-signal.SIGKILL], forks.output
    outcomes = [p for part in ("trials", "seeds") for p in (tmp_path / "killed" / part).glob("*.json")]
    before = {p: p.stat().st_mtime_ns for p in outcomes}
    assert before
    again = start(tmp_path / "killed", *grid)
    assert again.finish() == [0], again.output
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing was trained twice
    killed = json.loads((tmp_path / "killed" / "sweep.json").read_text())
    assert without_times(killed)["trials"] == without_times(whole)["trials"]
    assert killed["seeds"] == whole["seeds"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_pass_that_is_interrupted_resumes(number: signal.Signals, data: tuple[str, ...], tmp_path: Path) -> None:
    grid = [*data, "method.name=vqt", "train.epochs=4", "train.batch_size=10", "run.trackers=[]", *GRID]
    whole, folder = swept(tmp_path / "whole", *grid), tmp_path / "ended"

    def before(_: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are deaf to it
        step = trials_module.step_trials
        trials_module.SAVE_SECONDS = -1.0  # a state an epoch

        def struck(p: trials_module.TrialGroup, fetched: Any) -> None:
            if (p.epoch, p.progress.step) == (2, 4):
                os.kill(os.getpid(), number)
            step(p, fetched)

        trials_module.step_trials = struck

    ended = start(folder, *grid, before=before)
    codes = {signal.SIGTERM: 75, signal.SIGINT: 130}
    assert ended.finish() == [codes.get(number, -number)], ended.output
    assert read_json(folder / "run.json")["status"] == ("interrupted" if number in codes else "running")
    assert not (folder / "trials").exists()
    again = forked(command(folder, *grid, "data.workers=1"), tmp_path / "again.txt")  # as may be changed
    assert again.finish() == [0], again.output
    assert "pt at epoch 3" in again.output
    assert "epoch 2/4" not in again.output.partition("trials in one pass: seed=")[0]
    assert without_times(read_json(folder / "sweep.json"))["trials"] == without_times(whole)["trials"]
    assert read_json(folder / "sweep.json")["seeds"] == whole["seeds"]


@pytest.mark.parametrize("method", ["linear", "vpt"])
@pytest.mark.parametrize("missing", ["val", "test"])
def test_a_split_that_is_missing_is_reported_before_the_grid(
    missing: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few_images(tmp_path)
    (tmp_path / {"val": "val200.txt", "test": "test.txt"}[missing]).unlink()
    options = [word for word in SMALLEST if not word.startswith("method.")]
    options += [f"data.root={tmp_path}", f"method.name={method}", f"run.dir={tmp_path / 'run'}"]
    assert main(["sweep", *options, "sweep.grid.optim.lr=[0.1]"]) == 2
    assert f"split '{missing}' is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_images_that_are_skipped_are_reported(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pictures(tmp_path / "data", broken=lambda i: i % 7 == 3)
    options = [f"method.name={method}", *data, "data.on_decode_error=skip", "run.trackers=[]", "sweep.seeds=[1]"]
    content = swept(tmp_path / "sweep", *options, "sweep.grid.optim.lr=[0.5, 0.1]")
    named = {Path(file).name for file in content["skipped_images"]}
    assert named == {f"{i}.png" for i in range(60) if i % 7 == 3}  # those of test come with the seeds
    assert "without 9 images that cannot be read" in capsys.readouterr().out
    seed = read_json(tmp_path / "sweep" / "seeds" / "1" / "result.json")
    assert set(seed["skipped_images"]) == set(content["skipped_images"])
    assert {"strategy", "runtime", "device"} < set(seed)


@pytest.mark.distributed
def test_a_reader_s_sweep_has_nothing_for_deepspeed(tmp_path: Path) -> None:
    file = str(ROOT / "launch" / "accelerate" / "zero2.json")
    forks = start(tmp_path / "sweep", *READER, "sweep.parallelize=batch", strategy=file)
    assert forks.finish() == [2, 2], forks.output
    assert forks.output.count("error: a reader's sweep shares one small model: start it with the ddp") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("split", ["trials", "batch"])
def test_two_processes_give_the_table_of_one(split: str, data: tuple[str, ...], tmp_path: Path) -> None:
    grid = [*data, "method.name=vqt", "train.epochs=2", "method.dropout=0", "run.trackers=[]", *GRID]
    one = swept(tmp_path / "one", *grid)
    words = command(tmp_path / "two", *grid, f"sweep.parallelize={split}")
    if split == "trials":  # below a launcher, as the README says
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"]
        done = subprocess.run(
            [*launch, "--num_processes", "2", "--main_process_port", "0", "-m", "dist_vpt", *words],
            cwd=ROOT,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        forks = forked(words, tmp_path / "two.txt", "ddp")
        assert forks.finish() == [0, 0], forks.output
    two = json.loads((tmp_path / "two" / "sweep.json").read_text())
    assert two["chosen"] == one["chosen"]
    for a, b in zip(one["trials"], two["trials"], strict=True):
        assert a["setting"] == b["setting"]
        assert a["last"]["train"]["loss"] == pytest.approx(b["last"]["train"]["loss"], rel=1e-4)
        assert a["last"]["val"]["loss"] == pytest.approx(b["last"]["val"]["loss"], rel=1e-4)
    assert two["test"]["loss"]["mean"] == pytest.approx(one["test"]["loss"]["mean"], rel=1e-4)


@pytest.mark.distributed
def test_writers_that_share_the_batches_are_swept_one_after_the_other(data: tuple[str, ...], tmp_path: Path) -> None:
    grid = [*data, "train.batch_size=50", "run.trackers=[]", "sweep.grid.optim.lr=[5, 1]", "sweep.seeds=[42]"]
    one = swept(tmp_path / "one", *grid)
    forks = forked(command(tmp_path / "two", *grid, "sweep.parallelize=batch"), tmp_path / "two.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output
    two = json.loads((tmp_path / "two" / "sweep.json").read_text())
    assert json.loads((tmp_path / "two" / "seeds" / "42" / "result.json").read_text())["processes"] == 2
    for a, b in zip([*one["trials"], one], [*two["trials"], two], strict=True):
        found, wanted = (c["last"]["val"]["loss"] if "last" in c else c["test"]["loss"]["mean"] for c in (b, a))
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_starts_late_finds_its_share(late: int, tmp_path: Path) -> None:
    """Neither takes what the other has done for a change of its share, nor a folder that nobody has claimed."""
    folder = tmp_path / "sweep"

    def before(rank: int) -> None:
        if rank == late == 1:
            wait_for((folder / "trials" / "004.json").exists)
        elif rank == late:
            time.sleep(3)

    forks = start(folder, *READER, "run.trackers=[]", strategy="ddp", before=before)
    assert forks.finish(120) == [0, 0], forks.output
    assert len(json.loads((folder / "sweep.json").read_text())["trials"]) == 6


def test_a_folder_is_seen_to_be_held_where_locks_reach_no_other_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By new heartbeats of the first process: the last one of a killed attempt is there, too."""
    recipe = load_recipe([], [*words(tmp_path / "sweep", *READER), "run.resume=auto"])
    folder, beats = RunFolder(tmp_path / "sweep"), iter([7, 7, None, 1])
    monkeypatch.setattr("dist_vpt.runs.folder.is_locked", lambda _: False)
    monkeypatch.setattr(sweep_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(
        sweep_module, "read_rank_status", lambda *_: {} if (beat := next(beats)) is None else {"beat": beat}
    )
    with folder.acquire(recipe, "sweep"):
        stop = StopSignal()
        with pytest.raises(StopIteration):  # none of these is a sign of the next attempt
            sweep_module._wait_for_first_process(folder, recipe, stop)
        beats = iter([7, 1])
        sweep_module._wait_for_first_process(folder, recipe, stop)
        assert next(beats, None) is None


@pytest.mark.slow
def test_killed_while_outcomes_are_written(tmp_path: Path) -> None:
    def before(_: int) -> None:
        write, written = sweep_worker.Worker.write_outcome, []

        def counted(*args: Any) -> None:
            write(*args)
            written.append(1)
            if len(written) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        sweep_worker.Worker.write_outcome = counted  # type: ignore[method-assign]

    killed = start(tmp_path / "sweep", *READER, "run.trackers=[]", before=before)
    assert killed.finish() == [-signal.SIGKILL], killed.output
    assert len(list((tmp_path / "sweep" / "trials").iterdir())) == 2
    again = forked(command(tmp_path / "sweep", *READER, "run.trackers=[]"), tmp_path / "again.txt")
    assert again.finish() == [0], again.output
    assert "resumed from" in again.output
    assert "epoch 1/2" not in again.output.split("trials in one pass: seed=")[0]  # none trained twice
    assert not list((tmp_path / "sweep").glob(".pass-*"))


def test_every_trial_diverges_within_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(tmp_path / "sweep", "method.name=linear", "train.epochs=2", "sweep.grid.optim.lr=[1e38, 1e37]")
    words += ["train.batch_size=50", "optim.name=sgd"]
    for _ in range(2):  # the second time from the outcomes
        assert main(words) == 3
        message = capsys.readouterr().err
        assert "every trial of the grid diverged; choose another run.dir" in message


def test_a_full_disk_is_no_divergence(data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No outcome is written of a trial whose states could not be saved, and the same command trains it."""
    options = [*data, "train.batch_size=25", "run.save_every=1", "run.trackers=[]", "sweep.grid.optim.lr=[1e38, 0.1]"]
    recipe = load_recipe([], words(tmp_path, "sweep.seeds=[1]", "optim.name=sgd", *options))
    save = state.save_file

    def full(tensors: Any, path: Path) -> None:
        if "001" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(RunFailed, match="001: 3 states in a row could not be saved"):
        sweep_module.sweep(recipe)
    assert [p.name for p in (tmp_path / "trials").glob("*.json")] == ["000.json"]
    assert "the loss is" in read_json(tmp_path / "trials" / "000.json")["diverged"]
    monkeypatch.undo()
    assert sweep_module.sweep(recipe)["chosen"] == {"optim.lr": 0.1}


@pytest.mark.parametrize(
    ("struck", "what"), [("000.json", "outcomes"), ("adapters", "outcomes"), ("sweep.json", "the table")]
)
def test_a_full_disk_ends_a_sweep_in_words(
    struck: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if struck in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    line = command(tmp_path, *READER, "train.epochs=1", "train.batch_size=500", "run.trackers=[]", "sweep.seeds=[1]")
    monkeypatch.setattr(os, "replace", full)
    assert main(line) == RunFailed.exit_code
    message = (
        f"{tmp_path}: {what} cannot be written ([Errno 28] No space left on device); free space there, then the same"
    )
    assert message in capsys.readouterr().err
    monkeypatch.undo()
    assert main(line) == 0


@pytest.mark.filterwarnings("error:Encountered `nan` values")  # torchmetrics'
def test_what_is_not_finite_on_val_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = trials_module.read

    def spoiled(*args: Any) -> list[torch.Tensor]:
        logits = read(*args)
        return [logits[0] * float("nan"), *logits[1:]]

    monkeypatch.setattr(trials_module, "read", spoiled)
    monkeypatch.setattr(sweep_worker.Worker, "wait_for", lambda self, jobs: [read_json(job.outcome) for job in jobs])
    with pytest.raises(RunFailed, match=r"all seeds of the chosen setting diverged .*loss on test was nan"):
        sweep_module.sweep(load_recipe([], words(tmp_path, *READER, "train.epochs=1", "sweep.seeds=[42]")))
    first, *others = (read_json(tmp_path / "trials" / f"{n:03d}.json") for n in range(6))
    assert first["diverged"].startswith("the loss on val is nan")
    assert all(other["diverged"] is None for other in others)


def test_a_diverged_seed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    score = sweep_worker.score_trials_at_end

    def spoiled(group: Any, trials: Any) -> list[Any]:
        found = score(group, trials)
        if trials:
            trials[0].progress.last["test"]["loss"] = float("inf")
        return found

    monkeypatch.setattr(sweep_worker, "score_trials_at_end", spoiled)
    content = swept(tmp_path / "sweep", *READER)
    assert content["diverged_seeds"] == {"42": "the loss on test was inf"}
    assert content["seeds"]["42"] is None
    assert len(content["test"]["top1"]["values"]) == 1
    assert "left out of that mean: seed 42 diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "where", "advice"),
    [
        (READER, "dist_vpt.training.trials.step_trials", "with 6 trials in one pass; set stream.cache=memory"),
        (GRID, "dist_vpt.training.engine.train_step", "recommended: less"),  # of writers, no divergence
    ],
    ids=["reader", "writer"],
)
def test_an_out_of_memory_error_ends_with_advice(  # noqa: PLR0917 (what pytest gives)
    options: list[str], where: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(where, fails)
    monkeypatch.setattr("dist_vpt.planning.planner.suggestion", lambda *_: "recommended: less")
    assert main(command(tmp_path, *options)) == RunFailed.exit_code
    assert f"out of memory on cpu{'; ' if options is GRID else ' '}{advice}" in capsys.readouterr().err


def test_a_reader_s_sweep_that_cannot_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(recipe: Recipe, accelerator: Any, classes: int) -> str:
        raise UserError(f"{recipe.method.name} with {classes} classes needs more")

    monkeypatch.setattr(sweep_worker, "check_memory", too_much)
    assert main(command(tmp_path, *READER)) == 2
    assert "linear with 10 classes needs more" in capsys.readouterr().err


def test_a_run_and_a_sweep_do_not_share_a_folder(
    reader: tuple[Path, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = str(reader[0])
    assert main(["train", *words(reader[0], *READER, "run.resume=auto")]) == 2
    assert "holds a sweep, not a run; choose another run.dir" in capsys.readouterr().err
    assert main(["train", *words(tmp_path / "run", *READER)]) == 0
    assert main(command(tmp_path / "run", *READER)) == 2
    assert "holds a run, not a sweep" in capsys.readouterr().err
    for asked in (["compress", sweep, "--keep", "0.5"], ["eval", sweep], ["predict", sweep, "x.png"]):
        assert main(asked) == 2
        assert "is a sweep; name one of its runs" in capsys.readouterr().err


def test_unknown_keys_of_the_grid_are_reported_once(tmp_path: Path) -> None:
    recipe = load_recipe([], words(tmp_path, "sweep.grid.optim.lrr=[1.0, 2.0]", "sweep.grid.seeed=[1, 2]"))
    with pytest.raises(RecipeError) as caught:
        grid_jobs(recipe, tmp_path)
    lines = str(caught.value).splitlines()
    assert [line for line in lines if "lrr" in line] == [
        "sweep.grid.optim.lrr: there is no such key; did you mean 'lr'?"
    ]
    assert "sweep.grid.seeed: there is no such key; did you mean 'seed'?" in lines


@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_a_chosen_setting_that_learns_nothing_is_warned_of(
    method: str, tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = (f"method.name={method}", "sweep.grid.optim.lr=[1e-9]", "sweep.grid.optim.weight_decay=[0.0]")
    swept(tmp_path / "run", *data, *options, "sweep.seeds=[42]", "train.epochs=3")
    outcome = json.loads((tmp_path / "run/seeds/42/result.json").read_text())
    [warning] = outcome["warnings"]
    shown = capsys.readouterr().out
    assert len(re.findall(r"^warning: .*42.*: " + re.escape(warning), shown, re.MULTILINE)) == 1


@pytest.mark.parametrize("options", [READER, ["method.name=bias", *GRID, "sweep.grid.optim.lr=[0.1]"]])
def test_extra_tests_and_tables_of_the_seeds(options: list[str], tmp_path: Path, capsys: Any) -> None:
    """A writer's seeds are runs of their own, and a reader's share their passes."""
    for label in (3, 5):
        image = tmp_path / "few" / str(label) / "0.png"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (40 * label, 0, 0)).save(image)
    content = swept(tmp_path / "sweep", *options, f"data.extra_tests.few={tmp_path / 'few'}")
    shown = capsys.readouterr().out
    runs = [read_json(tmp_path / "sweep" / "seeds" / str(seed) / "result.json")["last"] for seed in (42, 44)]
    for name in ("ece", "f1_macro"):
        assert content["test"][name]["values"] == [run["test"][name] for run in runs]
    assert "ece_scaled" not in content["test"]  # trained on trainval
    assert all(run["temperature"]["value"] is None for run in runs)
    found = content["extra_tests"]["few"]["top1"]
    assert found["values"] == [run["extra_tests"]["few"]["top1"] for run in runs]
    assert f"few top1 {found['mean']:.2f}" in shown
    folders = [str(tmp_path / "sweep" / "seeds" / str(seed)) for seed in (42, 44)]
    assert main(["compare", *folders]) == 0
    assert main(["compare", *folders, "--split", "few"]) == 0
