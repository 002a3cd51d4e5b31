"""Few shots through the command line: one draw in a run, several in sweeps and suites, and what is refused."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vpt.cli.main import main
from dist_vpt.errors import Interrupted
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import engine
from tests.forks import command as forked
from tests.running import pictures, step_losses, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")

LINEAR = ["method.name=linear", "run.trackers=[]"]
GRID = ["sweep.grid.optim.lr=[0.5,0.1]", "sweep.seeds=[7,8,9]"]


@pytest.fixture
def folder(tmp_path: Path) -> tuple[str, ...]:
    """Overrides for a made image folder: 60 pictures of two classes, without splits."""
    return pictures(tmp_path / "data")


def trained(run: Path, *overrides: str) -> dict[str, Any]:
    assert main(["train", *words(run, *overrides)]) == 0
    return read(run / "result.json")


def swept(run: Path, *overrides: str) -> dict[str, Any]:
    assert main(["sweep", *words(run, *overrides)]) == 0
    return read(run / "sweep.json")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_a_run_has_its_shots_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = trained(tmp_path / "run", *LINEAR, "data.shots=5")
    shown = capsys.readouterr().out
    assert "digits: 50 images of 10 classes" in shown
    drawn = "50 images of train and 40 images of val, drawn by data.split_seed = 0, data.try_index = 0"
    assert f"shots 5: {drawn}" in shown
    assert result["protocol"]["shots"] == 5
    assert result["protocol"]["counts"] == {"train": 50, "val": 40, "trainval": 90, "test": 597}
    splits = read(tmp_path / "run" / "splits.json")
    assert {name: len(set(files)) for name, files in splits.items()} == {"train": 50, "val": 40}
    again = trained(tmp_path / "again", *LINEAR, "data.shots=5")
    assert read(tmp_path / "again" / "splits.json") == splits
    assert again["last"] == result["last"]
    trained(tmp_path / "other", *LINEAR, "data.shots=5", "data.try_index=1")
    assert read(tmp_path / "other" / "splits.json") != splits


def test_an_image_folder_s_test_stays_whole(folder: tuple[str, ...], tmp_path: Path) -> None:
    whole, few, half = (
        trained(tmp_path / f"run{i}", *LINEAR, *folder, *more)
        for i, more in enumerate(([], ["data.shots=2"], ["data.fraction=0.5"]))
    )
    counts = [each["protocol"]["counts"] for each in (whole, few, half)]
    assert counts[0] == {"train": 42, "val": 6, "trainval": 48, "test": 12}
    assert counts[1] == {"train": 4, "val": 4, "trainval": 8, "test": 12}
    assert counts[2] == {"train": 21, "val": 6, "trainval": 27, "test": 12}
    assert "shots" not in whole["protocol"]
    files = [read(tmp_path / f"run{i}" / "splits.json") for i in range(3)]
    assert [sorted(each) for each in files] == [["test", "val"], *[["test", "train", "val"]] * 2]
    assert files[0]["test"] == files[1]["test"] == files[2]["test"]
    assert set(files[1]["val"]) < set(files[0]["val"])


def test_a_stopped_run_resumes_with_its_images(
    folder: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*folder, "data.shots=3", "data.try_index=2", "train.epochs=3", "train.batch_size=4"]
    whole = trained(tmp_path / "whole", *options, "optim.warmup_epochs=0")
    evaluate = engine.evaluate

    def stop(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(engine, "evaluate", evaluate)
        raise Interrupted("stopped by the test")

    monkeypatch.setattr(engine, "evaluate", stop)
    line = ["train", *words(tmp_path / "run", *options, "optim.warmup_epochs=0", "run.resume=auto")]
    assert main(line) == Interrupted.exit_code
    drawn = read(tmp_path / "run" / "splits.json")
    assert main(line) == 0
    assert "resumed from" in capsys.readouterr().out
    assert read(tmp_path / "run" / "splits.json") == drawn == read(tmp_path / "whole" / "splits.json")
    assert step_losses(tmp_path / "run") == step_losses(tmp_path / "whole")
    assert read(tmp_path / "run" / "result.json")["last"] == whole["last"]


def test_a_run_is_not_resumed_with_other_images(
    folder: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the dataset may have moved, but not grown."""
    options = [*LINEAR, "data.shots=3", "train.epochs=2", "optim.warmup_epochs=0", "run.resume=auto"]

    def stop(*arguments: Any, **more: Any) -> Any:
        raise Interrupted("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", stop)
        assert main(["train", *words(tmp_path / "run", *folder, *options)]) == Interrupted.exit_code
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    for i in range(60, 80):
        (moved / "a" / f"0{i}.png").write_bytes((moved / "a" / "0.png").read_bytes())
    line = ["train", *words(tmp_path / "run", *folder, *options, f"data.root={moved}")]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "splits.json: split 'train' had other images when this run began: the dataset has changed; rest" in error
    for i in range(60, 80):
        (moved / "a" / f"0{i}.png").unlink()
    assert main(line) == 0


@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_tries_are_swept(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tries = 3 if method == "linear" else 2
    options = [f"method.name={method}", "run.trackers=[]", "data.shots=2", f"data.tries={tries}", *GRID]
    content = swept(tmp_path / "sweep", *options)
    assert f"over {tries} tries of 2 shots, on train (" in " ".join(capsys.readouterr().out.split())
    assert content["draws"] == {"shots": 2, "fraction": 1.0, "tries": tries}
    assert list(content["seeds"]) == ["7", "8", "9"][:tries]
    drawn = []
    for number, seed in enumerate(content["seeds"]):
        run = tmp_path / "sweep" / "seeds" / seed
        data = load_recipe([run / "recipe.yaml"]).data
        assert (data.train_on, data.shots, data.tries, data.try_index) == ("train", 2, 1, number)
        assert read(run / "result.json")["protocol"]["counts"]["train"] == 20
        drawn.append(read(run / "splits.json")["train"])
    assert len({tuple(files) for files in drawn}) == tries
    scores = [content["seeds"][seed]["top1"] for seed in content["seeds"]]
    assert content["test"]["top1"]["mean"] == pytest.approx(statistics.fmean(scores))
    assert content["test"]["top1"]["std"] == pytest.approx(statistics.stdev(scores))
    grid = read(tmp_path / "sweep" / "trials" / "000.json")["recipe"]["data"]
    assert (grid["try_index"], grid["train_on"]) == (0, "train")
    assert swept(tmp_path / "sweep", *options) == content  # nothing is trained again


def test_a_try_of_a_sweep_is_the_run_with_its_recipe(tmp_path: Path) -> None:
    content = swept(tmp_path / "sweep", *LINEAR, "data.shots=2", "data.tries=2", *GRID)
    recipe = tmp_path / "sweep" / "seeds" / "8" / "recipe.yaml"
    assert main(["train", str(recipe), f"run.dir={tmp_path / 'alone'}", "run.resume=never"]) == 0
    alone = read(tmp_path / "alone" / "result.json")["last"]["test"]
    assert alone["loss"] == pytest.approx(content["seeds"]["8"]["loss"], rel=1e-4)
    assert read(tmp_path / "alone" / "splits.json") == read(recipe.parent / "splits.json")


def test_without_tries_all_seeds_have_one_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = swept(tmp_path / "sweep", *LINEAR, "data.fraction=0.1", "data.try_index=1", *GRID)
    assert "over 3 seeds with 0.1 of train, on trainval (" in " ".join(capsys.readouterr().out.split())
    runs = [tmp_path / "sweep" / "seeds" / seed for seed in content["seeds"]]
    assert len({(run / "splits.json").read_text() for run in runs}) == 1
    recipes = [load_recipe([run / "recipe.yaml"]).data for run in runs]
    assert {(data.train_on, data.try_index) for data in recipes} == {("trainval", 1)}
    assert read(runs[0] / "result.json")["protocol"]["counts"]["trainval"] == 300


def test_draws_have_caches_of_their_own(tmp_path: Path) -> None:
    """On disk, where a second run reads what the first has computed."""
    disk = [*LINEAR, "data.shots=2", "stream.cache=disk", f"stream.dir={tmp_path / 'cache'}"]

    def caches() -> set[str]:
        return {file.parent.name for file in (tmp_path / "cache").rglob("*.bin")}

    first = trained(tmp_path / "a", *disk)
    one = caches()
    assert trained(tmp_path / "b", *disk)["last"] == first["last"]
    assert caches() == one
    live = trained(tmp_path / "c", *LINEAR, "data.shots=2", "stream.cache=none", "data.try_index=1")
    assert trained(tmp_path / "d", *disk, "data.try_index=1")["last"]["test"]["loss"] == pytest.approx(
        live["last"]["test"]["loss"], rel=1e-4
    )
    assert len(caches()) == 2 * len(one)


@pytest.mark.distributed
def test_two_processes_draw_as_one(folder: tuple[str, ...], tmp_path: Path) -> None:
    options = [*folder, "data.shots=4", "data.try_index=1", "train.epochs=2", "optim.warmup_epochs=0"]
    options += ["train.batch_size=4", "method.name=linear"]
    trained(tmp_path / "one", *options)
    forks = forked(["train", *words(tmp_path / "two", *options)], tmp_path / "two.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output
    assert read(tmp_path / "two" / "splits.json") == read(tmp_path / "one" / "splits.json")
    assert step_losses(tmp_path / "two") == pytest.approx(step_losses(tmp_path / "one"), abs=1e-4)
    one, two = (read_adapters(tmp_path / name / "adapters.safetensors")[0] for name in ("one", "two"))
    for name, tensor in one.items():
        assert np.allclose(tensor, two[name], atol=1e-4), name


@pytest.mark.distributed
def test_two_processes_share_the_tries(tmp_path: Path) -> None:
    options = [*LINEAR, "data.shots=2", "data.tries=3", *GRID]
    one = swept(tmp_path / "one", *options)
    forks = forked(["sweep", *words(tmp_path / "two", *options)], tmp_path / "two.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output
    two = read(tmp_path / "two" / "sweep.json")
    assert two["chosen"] == one["chosen"]
    assert two["test"]["loss"]["values"] == pytest.approx(one["test"]["loss"]["values"], rel=1e-4)


def test_a_suite_has_a_row_for_each_number_of_shots(
    write: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write("tens.yaml", "data: {format: digits, image_size: 8, workers: 0}\ntrain: {epochs: 1}\n")
    method = write("own.yaml", "method: {name: linear}\ntrain: {batch_size: 50}\noptim: {warmup_epochs: 0}\n")
    out = tmp_path / "suite"
    line = ["suite", "data.tries=2", *GRID, "--tasks", str(task), "--method", str(method), "--out", str(out)]
    assert main([*line, "--shots", "1,3", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 sweeps" in shown
    assert "own, 1-shot" in shown
    assert "4 trials and 4 seeds" in " ".join(shown.split())
    assert main([*line, "--shots", "1,3"]) == 0
    assert "own, 3-shot" in capsys.readouterr().out
    lines = [json.loads(each) for each in (out / "results.jsonl").read_text().splitlines()]
    assert [(each["method"], each["protocol"]["shots"], each["protocol"]["tries"]) for each in lines] == [
        ("own", 1, 2),
        ("own", 3, 2),
    ]
    assert [each["protocol"]["counts"]["train"] for each in lines] == [10, 30]
    assert [each["seeds"] for each in lines] == [[7, 8], [7, 8]]
    assert {path.name for path in (out / "tens").iterdir()} == {"own-1-shot", "own-3-shot"}
    before = (out / "results.jsonl").read_bytes()
    assert main([*line, "--shots", "1,3"]) == 0  # all is done
    assert (out / "results.jsonl").read_bytes() == before
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    table = next((tmp_path / "report").glob("*.md")).read_text()
    assert "own (1 shot)" in table
    assert "own (3 shots)" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "data.shots=2", "data.tries=3"],
            "data.tries = 3: a run trains one draw, and `dist-vpt sweep` or",
        ),
        (
            ["train", "data.shots=200"],
            "data.shots 200: class '8' has 97 images in train, and 9 other classes",
        ),
        (
            ["sweep", "data.shots=200"],
            "data.shots 200: class '8' has 97 images in train, and 9 other classes",
        ),
        (
            ["train", "data.shots=2", "data.fraction=0.5"],
            "shots = 2, fraction = 0.5: both say how much of train is",
        ),
        (["train", "data.fraction=1.5"], "data.fraction = 1.5: must be less than or equal to 1"),
        (["train", "data.fraction=0"], "data.fraction = 0: must be greater than 0"),
        (
            ["train", "data.fraction=0.001"],
            "data.fraction 0.001: 1 of 1,000 images of train leave some of 10",
        ),
        (
            ["sweep", "data.tries=2"],
            "tries = 2: without shots or fraction nothing is drawn; set one of",
        ),
        (
            ["sweep", "data.shots=1", "data.tries=6"],
            "data.tries = 6: each try is trained with a seed of its own",
        ),
        (["sweep", "data.shots=1", "sweep.grid.data.try_index=[0,1]"], "grid.data.try_index: is set by the sweep"),
        (
            ["suite", "--tasks", "digits", "--method", "vqt", "--shots", "1,x"],
            "--shots 1,x: must be numbers above 0",
        ),
        (
            ["suite", "--tasks", "digits", "--method", "vqt", "--shots", "4,4"],
            "--shots 4,4: must be numbers above 0",
        ),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = arguments
    more = [] if command == "suite" else [f"run.dir={tmp_path / 'run'}", "method.name=linear"]
    assert main([command, *rest, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
