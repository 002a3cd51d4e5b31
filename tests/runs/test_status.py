"""`dist-vpt status`: what runs, sweeps and suites leave behind, as it is shown on the terminal and to programs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.cli import status as status_module
from dist_vpt.cli.main import main
from dist_vpt.data.loaders import TrainBatches
from dist_vpt.distributed.rank_status import read_rank_status
from dist_vpt.errors import Interrupted
from dist_vpt.experiments.suite_plan import Experiment
from dist_vpt.experiments.suite_worker import lock_file
from dist_vpt.files import locked
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.results import Protocol, Result, append
from tests.forks import command
from tests.running import wait_for, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
STEPS_DONE = 3


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def shown_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["status", *arguments]) == 0
    return capsys.readouterr().out


def standings(capsys: pytest.CaptureFixture[str], *folders: Path) -> dict[str, dict[str, Any]]:
    return {Path(each["folder"]).name: each for each in json.loads(shown_by(capsys, *map(str, folders), "--json"))}


def ended(folder: Path, error: BaseException | None = None) -> None:
    """A run that has ended, well or with an error."""
    run = RunFolder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_vpt.runs.provenance.git_revision", lambda: None)
        with (
            nullcontext() if error is None else pytest.raises(type(error)),
            run.acquire(load_recipe([], [f"run.dir={folder}"])),
        ):
            if error is not None:
                raise error
            run.result.write_text("{}")
            run.mark("done")


def wait_in_the_second_epoch(rank: int) -> None:
    """No more images come there."""
    whole = TrainBatches.epoch

    def epoch(self: TrainBatches, epoch: int, start_step: int = 0) -> Any:
        for step, batches in enumerate(whole(self, epoch, start_step)):
            if epoch == 1 and step == STEPS_DONE:
                time.sleep(300)
            yield batches

    TrainBatches.epoch = epoch  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_run_under_way_and_when_it_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "one"
    options = words(folder, "train.epochs=4", "train.batch_size=200", "run.trackers=[]", "run.timeout_minutes=0.01")
    forks = command(["train", *options], tmp_path / "output.txt", before=wait_in_the_second_epoch)
    issued = 5 + STEPS_DONE
    number = issued - 1  # a step is read when the next one has been issued

    def arrived() -> bool:
        return (folder / "run.json").exists() and standings(capsys, folder)["one"]["done"] == number

    wait_for(lambda: not forks.running or arrived())
    one = standings(capsys, tmp_path)["one"]
    assert (one["kind"], one["status"], one["reason"]) == ("run", "running", None)
    assert (one["done"], one["total"], one["unit"], one["epoch"], one["epochs"]) == (number, 20, "steps", 2, 4)
    left = (20 - number) * 200 / one["images_per_s"]
    assert one["seconds_left"] == pytest.approx(left, rel=0.01, abs=0.06)  # rounded to 0.1 s
    assert f"{number}/20 steps, epoch 2/4" in shown_by(capsys, str(tmp_path))
    forks.send(signal.SIGKILL)
    assert forks.finish() == [-signal.SIGKILL]
    one = standings(capsys, tmp_path)["one"]
    assert (one["status"], one["done"], one["images_per_s"], one["seconds_left"]) == ("dead", number, None, None)
    assert one["reason"] == (
        f"its process (pid {forks.processes[0].pid} on {os.uname().nodename}) is gone, at step {issued}: reading "
        "images; run.resume=auto continues it"
    )


def test_how_runs_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(tmp_path / "a" / "well")
    ended(tmp_path / "a" / "stopped", Interrupted("stopped at step 7"))
    ended(tmp_path / "failed", ZeroDivisionError("a bug"))
    ended(tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text('{"status": "do')
    ended(tmp_path / "lost")
    (tmp_path / "lost" / "result.json").unlink()
    found = standings(capsys, tmp_path)
    assert {name: each["status"] for name, each in found.items()} == {
        "well": "done",
        "stopped": "interrupted",
        "failed": "failed",
        "broken": "damaged",
        "lost": "damaged",
    }
    shown = shown_by(capsys, str(tmp_path))
    assert f"{tmp_path}/failed: a bug" in shown
    assert f"{tmp_path}/a/stopped: stopped at step 7" in shown
    assert f"\n{tmp_path}/broken/run.json: damaged" in shown
    assert f"\n{tmp_path}/lost/result.json: cannot be read" in shown


def test_a_sweep_by_its_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    grid = ("sweep.grid={optim: {lr: [1.0, 0.1, 0.2], weight_decay: [0.0, 0.1]}}", "sweep.seeds=[1, 2]")
    with RunFolder(folder).acquire(load_recipe([], [f"run.dir={folder}", *grid]), kind="sweep"):
        (folder / "trials").mkdir()
        for number, seconds in enumerate((10.0, 20.0)):
            (folder / "trials" / f"{number:03d}.json").write_text(json.dumps({"seconds": seconds}))
        sweep = standings(capsys, folder)["sweep"]
    assert (sweep["kind"], sweep["status"], sweep["done"], sweep["total"]) == ("sweep", "running", 2, 6 + 2)
    assert sweep["seconds_left"] == 6 * 15
    assert "2/8 trials and seeds" in shown_by(capsys, str(folder))


def test_a_sweep_by_halving_counts_the_epochs_of_its_rungs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight trials for 5 epochs, two for 20, and two seeds for 20; a second an epoch."""
    folder = tmp_path / "sweep"
    options = ["sweep.grid={optim: {lr: [1, 2, 3, 4, 5, 6, 7, 8]}}", "sweep.seeds=[1, 2]", "train.epochs=20"]
    options += ["sweep.search=halving", "optim.warmup_epochs=0", f"run.dir={folder}"]
    with RunFolder(folder).acquire(load_recipe([], options), kind="sweep"):
        (folder / "trials").mkdir()
        for number in range(8):
            (folder / "trials" / f"{number:03d}-rung-1.json").write_text('{"seconds": 5.0}')
        sweep = standings(capsys, folder)["sweep"]
        assert (sweep["done"], sweep["total"], sweep["seconds_left"]) == (8, 8 + 2 + 2, (2 + 2) * 20)
        (folder / "trials" / "003.json").write_text('{"seconds": 20.0}')
        sweep = standings(capsys, folder)["sweep"]
        assert (sweep["done"], sweep["total"], sweep["seconds_left"]) == (9, 12, 3 * 20)
        (folder / "ranks").mkdir()
        progress = {"trials": 1, "epoch": 4, "epochs": 20, "seconds": 10.0, "seconds_left": 30.0, "images_per_s": 7.5}
        (folder / "ranks" / "rank-0.json").write_text(json.dumps({"time": time.time(), "progress": progress}))
        assert standings(capsys, folder)["sweep"]["seconds_left"] == 30 + 2 * 40  # this trial, then the seeds
    RunFolder(folder).mark("done")
    sweep = standings(capsys, folder)["sweep"]
    assert (sweep["status"], sweep["done"], sweep["total"]) == ("done", 9, 9)  # the other of that rung diverged


@pytest.mark.slow
def test_a_pass_of_trials_under_way_elsewhere_and_when_it_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six trials of a reader train together, of which none has an outcome before all have."""
    folder = tmp_path / "sweep"
    options = words(folder, "method.name=linear", "train.epochs=4", "train.batch_size=200", "run.trackers=[]")
    options += ["sweep.grid={optim: {lr: [1.0, 0.1, 0.2], weight_decay: [0.0, 0.1]}}", "sweep.seeds=[1, 2]"]
    options += ["run.timeout_minutes=0.01"]  # a sign of life every 0.06 s
    forks = command(["sweep", *options], tmp_path / "output.txt", before=wait_in_the_second_epoch)
    issued = 5 + STEPS_DONE
    number = issued - 1  # a step is read when the next one has been issued

    def there() -> dict[str, Any]:
        return read_rank_status(folder, 0).get("progress", {})

    wait_for(lambda: not forks.running or there().get("step") == number)
    sweep = standings(capsys, folder)["sweep"]
    assert (sweep["status"], sweep["done"], sweep["total"], sweep["epoch"], sweep["epochs"]) == ("running", 0, 8, 2, 4)
    seconds = number * 200 / sweep["images_per_s"]
    assert seconds == pytest.approx(there()["seconds"], rel=0.02, abs=6e-4)  # which are written to the millisecond
    left, spent = there()["seconds_left"], there()["seconds"]
    assert left == pytest.approx(spent / number * (20 - number), rel=0.02)
    assert sweep["seconds_left"] == pytest.approx(left + 2 * (spent + left) / 6, abs=0.06)  # the seeds come later
    assert "0/8 trials and seeds, epoch 2/4" in shown_by(capsys, str(folder))
    with monkeypatch.context() as far:  # on a machine that our locks do not reach, a sign of life is enough
        far.setattr("dist_vpt.runs.status.is_locked", lambda file: False)
        far.setattr("dist_vpt.runs.status.socket.gethostname", lambda: "elsewhere")
        assert standings(capsys, folder)["sweep"]["status"] == "running"
        far.setattr("dist_vpt.runs.status.SILENT_SECONDS", -1)
        assert standings(capsys, folder)["sweep"]["status"] == "dead"
    forks.send(signal.SIGKILL)
    assert forks.finish() == [-signal.SIGKILL]
    sweep = standings(capsys, folder)["sweep"]
    assert (sweep["status"], sweep["epoch"], sweep["images_per_s"], sweep["seconds_left"]) == ("dead", None, None, None)
    assert sweep["reason"] == (
        f"its process (pid {forks.processes[0].pid} on {os.uname().nodename}) is gone, at step {issued}: reading "
        "images; the same command continues it"
    )


def test_a_sweep_whose_trials_two_processes_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 20 trials each trains ten in one pass; five seeds are to come."""
    folder = tmp_path / "sweep"
    grid = (f"sweep.grid={{optim: {{lr: {[n / 10 for n in range(1, 21)]}}}}}", "sweep.seeds=[1, 2, 3, 4, 5]")
    with RunFolder(folder).acquire(load_recipe([], [f"run.dir={folder}", *grid]), kind="sweep"):
        (folder / "ranks").mkdir()
        for rank, left in enumerate((30.0, 50.0)):
            progress = {"trials": 10, "epoch": 4, "epochs": 9, "seconds": 60.0, "seconds_left": left}
            place = {"world": 2, "time": time.time(), "progress": progress | {"images_per_s": 7.5}}
            (folder / "ranks" / f"rank-{rank}.json").write_text(json.dumps(place))
        sweep = standings(capsys, folder)["sweep"]
    assert (sweep["done"], sweep["total"], sweep["epoch"], sweep["images_per_s"]) == (0, 25, 4, 15)
    assert sweep["seconds_left"] == 50 + 5 * 10 / 2  # a trial takes 9 s and 11 s


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[tuple[Path, ExitStack]]:
    """A suite of four sweeps: one has a result, one has failed, a worker is at one, and one has not begun."""
    folder, recipe = tmp_path / "suite", load_recipe([])
    pairs = {name: Experiment(name, "vpt", recipe) for name in ("caltech101", "dtd", "svhn", "eurosat")}
    (folder / "claims").mkdir(parents=True)
    content = {pair.name: {"recipe": f"of {name}", "trials": 3, "seeds": [1, 2]} for name, pair in pairs.items()}
    (folder / "manifest.json").write_text(json.dumps({"pairs": content}))
    common = {"group": None, "method": "vpt", "backbone": "demo", "precision": "fp32"}
    protocol = {"storage": "tfds", "resize": "vpt", "fit": "squash", "normalize": "vpt", "image_size": 8}
    protocol |= {"counts": {}, "trials": 3, "epochs": 1}
    well = Result(run="of caltech101", task="caltech101", protocol=Protocol.model_validate(protocol), **common)  # type: ignore[arg-type]
    append(folder / "results.jsonl", well)
    append(folder / "results.jsonl", Result(run="of dtd", task="dtd", failed="no such folder: dtd", **common))  # type: ignore[arg-type]
    (folder / "svhn" / "vpt" / "trials").mkdir(parents=True)
    (folder / "svhn" / "vpt" / "run.json").write_text('{"kind": "sweep", "status": "running"}')
    (folder / "svhn" / "vpt" / "trials" / "000.json").write_text('{"seconds": 4.0}')
    with ExitStack() as runner:
        runner.enter_context(locked(lock_file(folder, pairs["svhn"], "trial 1"), ""))
        yield folder, runner


def test_a_suite_in_the_middle(suite: tuple[Path, ExitStack], capsys: pytest.CaptureFixture[str]) -> None:
    folder, runner = suite
    found = json.loads(shown_by(capsys, str(folder.parent), "--json"))
    assert [(each["kind"], each["status"], each["done"], each["total"]) for each in found] == [
        ("suite", "running", 1, 4),
        ("sweep", "done", 0, 5),
        ("sweep", "failed", 0, 5),
        ("sweep", "running", 1, 5),
        ("sweep", "waiting", 0, 5),
    ]
    assert found[3]["seconds_left"] == 4 * 4.0
    assert f"{folder}/dtd/vpt: no such folder: dtd" in shown_by(capsys, str(folder))
    assert [each["status"] for each in standings(capsys, folder / "svhn" / "vpt").values()] == ["running"]
    runner.close()
    found = json.loads(shown_by(capsys, str(folder), "--json"))
    assert [each["status"] for each in found] == ["interrupted", "done", "failed", "interrupted", "waiting"]


def test_a_damaged_outcome_hides_one_sweep_alone(
    suite: tuple[Path, ExitStack], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = suite
    (folder / "svhn" / "vpt" / "trials" / "000.json").write_text('{"seconds": 4')
    found = json.loads(shown_by(capsys, str(folder), "--json"))
    assert [each["status"] for each in found] == ["running", "done", "failed", "damaged", "waiting"]
    assert f"{folder}/svhn/vpt/trials/000.json: damaged" in shown_by(capsys, str(folder))


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_all(
    width: int, suite: tuple[Path, ExitStack], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(suite[0].parent)
    lines = shown_by(capsys, "suite").splitlines()
    assert max(map(len, lines)) <= width
    for word in ("running", "waiting", "failed", "done"):
        assert any(word in line for line in lines)
    assert any("0:16" in line for line in lines), "seconds left"
    assert "eurosat/vpt" in "".join(line.split("│")[0].strip() for line in lines)


def test_a_folder_without_runs_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown_by(capsys, str(tmp_path)).replace("\n", "") == f"{tmp_path}: no runs here yet"
    assert json.loads(shown_by(capsys, str(tmp_path), "--json")) == []
    assert main(["status", str(tmp_path), str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    message = capsys.readouterr().err
    assert all(f"{tmp_path}/{name}: there is no such folder; name one that train" in message for name in "xy")
    for wrong, said in (("0", "must be above 0"), ("runs", "is not a number of seconds")):
        assert main(["status", str(tmp_path), "--watch", wrong]) == 2
        assert f"--watch {wrong}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--watch"], ["--watch", "runs"], ["--watch", "5"], ["runs", "--watch"]])
def test_folders_are_those_in_runs_and_may_follow_watch(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], float | None]] = []
    monkeypatch.setattr(status_module, "status", lambda folders, *, as_json, watch: seen.append((folders, watch)))
    assert main(["status", *argv]) == 0
    assert seen == [(["runs"], 5.0 if argv else None)]


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_watching_ends_with_control_c(
    json_too: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    ended(tmp_path / "run")
    monkeypatch.setattr(status_module.time, "sleep", sleep)
    shown = shown_by(capsys, str(tmp_path), *json_too, "--watch", "0.5")
    assert slept == [0.5] * 3
    assert shown.count("done") == 3 * 2  # a heading or a key, and a status


def test_it_needs_no_torch(tmp_path: Path) -> None:
    ended(tmp_path / "run")
    code = (
        "import sys; from dist_vpt.cli.main import main; main(['status', sys.argv[1]]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False"
