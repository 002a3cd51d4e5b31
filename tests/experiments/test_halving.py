"""Successive halving: who is promoted, that the last rung is the grid's, what it costs, that a kill loses nothing."""

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from dist_vpt.cli.main import main
from dist_vpt.errors import RecipeError, RunFailed
from dist_vpt.experiments.rungs import Rungs
from dist_vpt.experiments.suite_plan import plan_experiments
from dist_vpt.experiments.sweep_report import heatmap_figure, print_sweep
from dist_vpt.files import read_json
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.sweep_section import SweepConfig
from dist_vpt.runs.results import read
from dist_vpt.training import engine
from tests.forks import command as forked
from tests.running import few_digits, wait_for, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
HALVING = ("sweep.search=halving", "sweep.reduction_factor=2", "sweep.min_epochs=1")
GRID = ("sweep.grid.optim.lr=[20, 5, 1, 0.001]", "sweep.seeds=[42]", "train.epochs=5", "run.trackers=[]")
METHODS = {"vpt": ("method.name=vpt", "method.prompts=2"), "linear": ("method.name=linear",)}
RUNGS = [(4, 1), (2, 2), (1, 5)]  # trials and epochs


def swept(folder: Path, *overrides: str) -> dict[str, Any]:
    assert main(["sweep", *words(folder, *overrides)]) == 0
    return read_json(folder / "sweep.json")


def outcomes_of(folder: Path, rung: int = 0) -> dict[int, dict[str, Any]]:
    """Outcomes by the trials' numbers; rung 0 is the last one."""
    names = f"*-rung-{rung}.json" if rung else "[0-9][0-9][0-9].json"
    return {int(file.name[:3]): read_json(file) for file in sorted((folder / "trials").glob(names))}


def the_best(outcomes: dict[int, dict[str, Any]], count: int) -> list[int]:
    """Numbers of so many trials, as a user would read them from the files."""
    finite = {number: outcome for number, outcome in outcomes.items() if not outcome["diverged"]}
    table = [(o["last"]["val"]["top1"], -o["setting"]["optim.lr"], number) for number, o in finite.items()]
    return sorted(number for _, _, number in sorted(table, reverse=True)[:count])


def without(outcome: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if key not in ("seconds", *names)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return few_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module", params=["vpt", "linear"])
def both(
    request: pytest.FixtureRequest, digits: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, dict[str, float]]:
    """Method, the folders of the grid and of halving, and the images that each trained on before the seeds."""
    root, method, images = tmp_path_factory.mktemp(request.param), request.param, {}
    step = engine.train_step
    with pytest.MonkeyPatch.context() as patch:

        def counted(t: Any, *args: Any, **options: Any) -> Any:
            issued = step(t, *args, **options)
            name = t.path.relative_to(root).parts[0]
            images[name] = images.get(name, 0.0) + issued.read().images * (t.recipe.data.train_on == "train")
            return issued

        patch.setattr(engine, "train_step", counted)
        common = (*digits, *METHODS[method], *GRID)
        swept(root / "grid", *common)
        swept(root / "halving", *common, *HALVING)
    return method, root / "grid", root / "halving", images


def test_each_rung_trains_the_best_of_the_one_before(both: tuple[str, Path, Path, dict[str, float]]) -> None:
    _, _, folder, _ = both
    first, second, last = (outcomes_of(folder, rung) for rung in (1, 2, 0))
    assert sorted(first) == [0, 1, 2, 3]
    assert sorted(second) == the_best(first, 2)
    assert sorted(last) == the_best(second, 1)
    for (_, epochs), rung in zip(RUNGS, (first, second, last), strict=True):
        assert {outcome["last"]["epoch"] for outcome in rung.values()} == {epochs}
        assert {outcome["recipe"]["train"]["epochs"] for outcome in rung.values()} == {epochs}
    content = read_json(folder / "sweep.json")
    assert content["rungs"] == [1, 2, 5]
    [number] = last
    assert content["chosen"] == last[number]["setting"]


def test_the_last_rung_is_the_grid_s(both: tuple[str, Path, Path, dict[str, float]]) -> None:
    """To the last bit for a writer; a reader's trials share products, whose shape depends on how many they are."""
    method, grid, folder, _ = both
    everything = outcomes_of(grid)
    for number, outcome in outcomes_of(folder).items():
        if method == "linear":
            for split in ("train", "val"):
                wanted = everything[number]["last"][split]["loss"]
                assert outcome["last"][split]["loss"] == pytest.approx(wanted, rel=1e-5)
            continue
        alike = without(everything[number], "recipe")
        assert without(outcome, "recipe") == alike
        theirs, ours = everything[number]["recipe"], outcome["recipe"]
        assert theirs | {"run": ours["run"]} == ours
        wanted, found = (load_file(at / "trials" / f"{number:03d}" / "adapters.safetensors") for at in (grid, folder))
        assert {name: tensor.tolist() for name, tensor in wanted.items()} == {
            name: tensor.tolist() for name, tensor in found.items()
        }


def test_what_halving_costs(both: tuple[str, Path, Path, dict[str, float]]) -> None:
    method, _, folder, images = both
    if method == "vpt":
        assert images["grid"] == 4 * 5 * 100
        assert images["halving"] == sum(trials * epochs for trials, epochs in RUNGS) * 100
    seconds = [o["seconds"] for rung in (1, 2, 0) for o in outcomes_of(folder, rung).values()]
    content = read_json(folder / "sweep.json")
    assert sum(trial["seconds"] for trial in content["trials"]) == pytest.approx(sum(seconds), abs=0.01)


def test_the_table_is_blank_where_a_trial_was_not_trained_to_the_end(
    both: tuple[str, Path, Path, dict[str, float]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, _, folder, _ = both
    recipe = load_recipe([folder / "recipe.yaml"])
    before = (folder / "sweep.json").read_bytes()
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["sweep", str(folder / "recipe.yaml")]) == 0  # it is done: the table alone
    assert (folder / "sweep.json").read_bytes() == before
    shown = capsys.readouterr().out
    assert "1 epoch" in shown
    assert "2 epochs" in shown
    content = read_json(folder / "sweep.json")
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    whole = 0
    for trial, line in zip(content["trials"], lines, strict=True):
        cells = [cell.strip() for cell in line.strip("│").split("│")][-6:]  # rungs, last, best, at epoch, chosen
        trained = len(trial["rungs"])
        scores = [f"{rung['top1']:.2f}" for rung in trial["rungs"][:2]]
        assert cells[:2] == scores + [""] * (2 - len(scores))
        assert [bool(cell) for cell in cells[2:5]] == [trained == 3] * 3
        assert bool(trial["last"]) == bool(trial["best"]) == (trained == 3)
        assert (cells[5] == "*") == (trial["setting"] == content["chosen"])
        whole += trained == 3
    assert whole == 1
    assert recipe.sweep.search == "halving"
    assert recipe.method.name == method
    assert (folder / "heatmap.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_of_a_published_grid_fits_a_terminal(
    both: tuple[str, Path, Path, dict[str, float]], tmp_path: Path
) -> None:
    content, shown = read_json(both[2] / "sweep.json"), io.StringIO()
    for trial in content["trials"]:
        trial["setting"]["optim.weight_decay"] = 0.0001
    content["chosen"]["optim.weight_decay"] = 0.0001
    print_sweep(content, tmp_path, Console(file=shown, width=80))
    heads, _, _ = shown.getvalue().partition("┡")
    assert {"lr", "weight_decay", "epochs", "last", "chosen"} <= set(heads.split())
    assert "…" not in heads


def test_the_heat_map_says_how_long_a_trial_was_trained(both: tuple[str, Path, Path, dict[str, float]]) -> None:
    content = read_json(both[2] / "sweep.json")
    axes = heatmap_figure(content["trials"], content["chosen"]).axes[0]
    shown = sorted(text.get_text() for text in axes.texts)
    top1 = next(trial["last"]["val"]["top1"] for trial in content["trials"] if trial["last"])
    assert shown == sorted(["1 epoch", "1 epoch", "2 epochs", f"{top1:.1f}"])


@pytest.mark.parametrize(
    ("trials", "epochs", "options", "wanted"),
    [
        (40, 100, {}, [(40, 7), (10, 28), (3, 100)]),  # VPT's published grid: 860 epochs of 4,000
        (20, 100, {}, [(20, 7), (5, 28), (2, 100)]),
        (16, 100, {"min_epochs": 2}, [(16, 2), (4, 8), (1, 100)]),
        (40, 20, {}, [(40, 5), (10, 20)]),  # no rung of less than 5 epochs by itself
        (64, 100, {}, [(64, 5), (16, 20), (4, 100)]),  # none of 80: to train all of its trials to the end costs no more
        (40, 5, {}, [(40, 5)]),
        (3, 100, {}, [(3, 100)]),  # fewer than the factor
        (9, 30, {"reduction_factor": 3, "min_epochs": 2}, [(9, 2), (3, 6), (1, 30)]),
        (40, 100, {"search": "grid", "min_epochs": 2}, [(40, 100)]),
    ],
)
def test_the_sizes_of_rungs(trials: int, epochs: int, options: dict[str, Any], wanted: list[tuple[int, int]]) -> None:
    grid = {"optim": {"lr": [number + 1.0 for number in range(trials)]}}
    sizes = SweepConfig.model_validate({"grid": grid, "search": "halving", **options}).rungs(epochs)
    assert sizes == wanted
    assert sum(size.trials * size.epochs for size in sizes) <= trials * epochs


def rungs_of(folder: Path, *overrides: str) -> Rungs:
    return Rungs(load_recipe([], words(folder, "method.name=linear", *GRID, *HALVING, *overrides)), folder)


def outcomes(*top1: float | None) -> list[dict[str, Any]]:
    return [
        {"diverged": "the loss was nan"} if v is None else {"diverged": None, "last": {"val": {"top1": v}}}
        for v in top1
    ]


def test_a_rung_has_the_whole_schedule_in_its_own_epochs(tmp_path: Path) -> None:
    """And is scored after its last epoch, whatever the recipe says of early stopping and of when to evaluate."""
    more = ("optim.warmup_epochs=2", "optim.schedule_by=epoch", "train.eval_every=3", "train.early_stop.patience=1")
    rungs = rungs_of(tmp_path, *more)
    for number, (_, epochs) in enumerate(RUNGS[:-1], start=1):
        jobs = rungs.next()
        for job in jobs:
            recipe, grid = job.recipe, rungs.grid[job.number].recipe
            assert (recipe.train.epochs, recipe.train.eval_every, recipe.train.early_stop) == (epochs, epochs, None)
            assert recipe.optim.warmup_epochs / epochs == pytest.approx(2 / 5)
            assert recipe.optim.schedule_by == "step"  # by epoch, the only one of rung 1 would have a rate of 0
            assert recipe.run.dir == str(tmp_path / "trials" / f"{job.number:03d}-rung-{number}")
            assert (recipe.optim.lr, recipe.seed, recipe.train.data_seed) == (
                *(grid.optim.lr, grid.seed),
                grid.train.data_seed,
            )
        rungs.add(jobs, outcomes(*range(len(jobs))))
    assert [job.recipe for job in rungs.next()] == [rungs.grid[3].recipe]


def test_ties_go_to_the_smaller_learning_rate_and_diverged_trials_are_dropped(tmp_path: Path) -> None:
    rungs = rungs_of(tmp_path)
    rungs.add(rungs.next(), outcomes(50, 50, None, 50))
    assert [job.number for job in rungs.next()] == [1, 3]
    rungs.add(rungs.next(), outcomes(50, None))
    assert [job.number for job in rungs.next()] == [1]
    rungs.add(rungs.next(), outcomes(None))
    assert rungs.next() == []
    with pytest.raises(RunFailed, match=r"every trial of rung 3 \(5 epochs\) diverged; choose another run.dir"):
        rungs.chosen()
    few = rungs_of(tmp_path)
    few.add(few.next(), outcomes(None, None, None, 7))
    assert [job.number for job in few.next()] == [3]
    none = rungs_of(tmp_path)
    none.add(none.next(), outcomes(None, None, None, None))
    with pytest.raises(RunFailed, match=r"every trial of the grid diverged; choose another run.dir"):
        none.next()


def test_a_first_rung_that_saves_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(tmp_path / "run", "method.name=linear", *GRID, *HALVING, "sweep.min_epochs=3")
    assert main(["sweep", *line]) == 2
    message = "sweep.min_epochs = 3: must be below 0.5 x train.epochs = 2.5, or halving saves nothing; lower it, or set"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"must be below 0.75 x train.epochs = 3.75"):
        rungs_of(tmp_path, "sweep.min_epochs=4", "sweep.reduction_factor=4")


def test_early_stopping_ends_no_rung(digits: tuple[str, ...], tmp_path: Path) -> None:
    more = ("train.early_stop={patience: 1, min_delta: 100}", "train.eval_every=2")
    content = swept(tmp_path / "run", *digits, "method.name=linear", *GRID, *HALVING, *more)
    assert {o["last"]["epoch"] for o in outcomes_of(tmp_path / "run", 2).values()} == {2}
    assert all("val" in o["last"] for rung in (1, 2) for o in outcomes_of(tmp_path / "run", rung).values())
    [last] = outcomes_of(tmp_path / "run").values()
    assert last["last"]["epoch"] == 2  # as in the grid: what is trained to the end may stop early
    assert content["chosen"] == last["setting"]


def test_too_few_trials_to_halve_are_the_grid(
    digits: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = swept(tmp_path / "run", *digits, "method.name=linear", *GRID, "sweep.search=halving", "train.epochs=1")
    assert "note: 4 trials for 1 epoch are too few to halve by 4: all are trained to the end" in capsys.readouterr().out
    assert all(trial["last"] for trial in content["trials"])


def test_killed_between_rungs_it_gives_the_same_table(
    both: tuple[str, Path, Path, dict[str, float]], digits: tuple[str, ...], tmp_path: Path
) -> None:
    line = ["sweep", *words(tmp_path / "run", *digits, *METHODS[both[0]], *GRID, *HALVING)]

    def before(_: int) -> None:
        add = Rungs.add

        def held(rungs: Rungs, jobs: Any, outcomes: Any) -> None:
            if len(rungs.done) == 1:
                signal.pause()
            add(rungs, jobs, outcomes)

        Rungs.add = held  # type: ignore[method-assign]

    killed = forked(line, tmp_path / "killed.txt", before=before)
    wait_for(lambda: len(list((tmp_path / "run" / "trials").glob("*-rung-2.json"))) == 2 or not killed.running)
    killed.send(signal.SIGKILL)
    assert killed.finish() == [-signal.SIGKILL], killed.output
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "trials").glob("*.json")}
    assert len(written) == 4 + 2
    again = forked(line, tmp_path / "again.txt")
    assert again.finish() == [0], again.output
    assert {file: file.stat().st_mtime_ns for file in written} == written  # nothing was trained twice
    found, wanted = read_json(tmp_path / "run" / "sweep.json"), read_json(both[2] / "sweep.json")
    assert [without(trial) for trial in found["trials"]] == [without(trial) for trial in wanted["trials"]]
    assert (found["chosen"], found["seeds"]) == (wanted["chosen"], wanted["seeds"])


@pytest.mark.distributed
@pytest.mark.parametrize("parallelize", ["trials", "batch"])
def test_two_processes_promote_alike(
    parallelize: str, both: tuple[str, Path, Path, dict[str, float]], digits: tuple[str, ...], tmp_path: Path
) -> None:
    method, _, alone, _ = both
    line = words(tmp_path / "run", *digits, *METHODS[method], *GRID, *HALVING)
    forks = forked(["sweep", *line, f"sweep.parallelize={parallelize}"], tmp_path / "out.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output
    for rung in (1, 2, 0):
        found, wanted = outcomes_of(tmp_path / "run", rung), outcomes_of(alone, rung)
        assert sorted(found) == sorted(wanted)
        for number, outcome in found.items():
            loss = wanted[number]["last"]["val"]["loss"]
            assert outcome["last"]["val"]["loss"] == pytest.approx(loss, rel=1e-3)


def test_a_suite_of_halving(
    digits: tuple[str, ...], both: tuple[str, Path, Path, dict[str, float]], tmp_path: Path, capsys: Any
) -> None:
    method, _, folder, _ = both
    (tmp_path / "digits.yaml").write_text("data: {task: mine}\n")
    (tmp_path / "own.yaml").write_text(f"method: {{name: {method}}}\n")
    shared = [word for word in words(tmp_path, *digits, *METHODS[method], *GRID, *HALVING) if "run.dir" not in word]
    line = ["suite", *shared, "--tasks", str(tmp_path / "digits.yaml"), "--method", str(tmp_path / "own.yaml")]
    line += ["--out", str(tmp_path / "suite")]
    assert main([*line, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4, 2, 1" in shown
    assert "1, 2, 5" in shown
    assert "in all 7 trials and 1 seeds" in shown
    assert main([*line, "--workers", "1"]) == 0
    output = capsys.readouterr().out
    for number in (1, 2, 3):
        item = f"trials of rung {number}" if method == "linear" else f"of rung {number}"
        assert output.count(item) == (1 if method == "linear" else RUNGS[number - 1][0])
    [result], wrong = read(tmp_path / "suite" / "results.jsonl")
    assert not wrong
    assert result.protocol is not None
    assert (result.protocol.search, result.protocol.trials, result.protocol.epochs) == ("halving", 4, 5)
    alone = read_json(folder / "sweep.json")
    ours = read_json(tmp_path / "suite" / "digits" / "own" / "sweep.json")
    assert [without(trial) for trial in ours["trials"]] == [without(trial) for trial in alone["trials"]]
    assert (result.chosen, result.epochs["last"]) == (alone["chosen"], 5)
    assert main(["status", str(tmp_path / "suite"), "--json"]) == 0
    _, sweep = json.loads(capsys.readouterr().out)
    assert (sweep["status"], sweep["done"], sweep["total"]) == ("done", 8, 8)


def test_what_a_plan_of_halving_costs() -> None:
    def images(method: str, *more: str) -> int | None:
        return plan_experiments(["dtd"], [method], ["sweep.search=halving", *more], "somewhere", "out")[0].images()

    seeds = 5 * (100 * 1000 + 1880)
    short = 40 * (7 * 800 + 200) + 10 * (28 * 800 + 200)
    assert images("vpt_deep") == short + 3 * 100 * (800 + 200) + seeds
    assert images("vpt_deep", "train.eval_every=30") == short + 3 * (100 * 800 + math.ceil(100 / 30) * 200) + seeds
    assert images("vqt") == 3 * (800 + 200) + 1000 + 1880
    passes = (7 * 800 + 200) + (28 * 800 + 200) + 100 * (800 + 200)
    assert images("vqt", "stream.cache=none") == passes + 100 * 1000 + 1880
