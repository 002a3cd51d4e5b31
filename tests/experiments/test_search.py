"""A sweep that Optuna draws: deterministic, pruned, resumed after a kill, shared by processes; what it refuses."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.cli.main import main
from dist_vpt.errors import RecipeError
from dist_vpt.experiments import search_checks
from dist_vpt.experiments.search import JOURNAL, Search
from dist_vpt.experiments.suite_plan import plan_experiments
from dist_vpt.files import read_json
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.search_space import Range, drawn_from
from tests.forks import command as forked
from tests.running import wait_for, words

pytest.importorskip("optuna")
pytestmark = pytest.mark.usefixtures("on_the_cpu")
SPACE = "sweep.space={optim: {lr: {low: 1e-3, high: 10, log: true}}, method: {prompts: {low: 1, high: 3}}}"
SEARCH = ("protocol=default", "sweep.search=optuna", SPACE, "sweep.n_trials=6", "sweep.min_epochs=1", "sweep.seeds=[1]")
OPTIONS = (*SEARCH, "sweep.reduction_factor=2", "train.epochs=4", "run.trackers=[]", "run.log_every=100")


@pytest.fixture(scope="module")
def whole(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    assert main(["sweep", *words(folder, *data, *OPTIONS)]) == 0
    return folder


def trials(folder: Path) -> list[dict[str, Any]]:
    found = read_json(folder / "sweep.json")["trials"]
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in found]


@pytest.mark.slow
def test_it_draws_prunes_and_chooses(whole: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    content = read_json(whole / "sweep.json")
    found = content["trials"]
    assert [trial["number"] for trial in found] == list(range(6))
    assert all(1e-3 <= trial["setting"]["optim.lr"] <= 10 for trial in found)
    assert {trial["setting"]["method.prompts"] for trial in found} <= {1, 2, 3}
    pruned = [trial for trial in found if trial.get("pruned")]
    finished = [trial for trial in found if trial["last"]]
    assert pruned
    assert finished
    assert all(re.fullmatch(r"pruned after epoch [12], with \d+\.\d\d % on val", trial["pruned"]) for trial in pruned)
    best = max(trial["last"]["val"]["top1"] for trial in finished)
    chosen = next(trial for trial in found if trial["setting"] == content["chosen"])
    assert chosen["last"]["val"]["top1"] == best
    assert list((whole / "seeds").glob("1/result.json"))
    assert main(["sweep", *words(whole, *data, *OPTIONS)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("pruned") == len(pruned)
    assert "test top1" in shown
    assert "[I 2" not in shown, "what Optuna logs"
    assert (whole / "heatmap.png").is_file()
    assert main(["status", str(whole), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["status"], status["done"], status["total"]) == ("done", 7, 7)


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_and_changes_nothing(whole: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    argv = ["sweep", *words(folder, *data, *OPTIONS)]
    for number in (1, 3):
        killed = forked(argv, tmp_path / f"{number}.txt")
        begun = folder / f"trials/{number:03d}/metrics.jsonl"
        wait_for(lambda begun=begun, killed=killed: begun.exists() or not killed.running)
        killed.send(signal.SIGKILL)
        assert killed.finish() == [-signal.SIGKILL], killed.output
    again = forked(argv, tmp_path / "again.txt")
    assert again.finish() == [0], again.output
    assert trials(folder) == trials(whole)
    assert read_json(folder / "sweep.json")["seeds"] == read_json(whole / "sweep.json")["seeds"]


@pytest.mark.distributed
def test_two_processes_share_the_trials(data: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    both = forked(["sweep", *words(folder, *data, *OPTIONS)], tmp_path / "both.txt", "ddp")
    assert both.finish() == [0, 0], both.output
    content = read_json(folder / "sweep.json")
    assert [trial["number"] for trial in content["trials"]] == list(range(6))
    journal = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    owners = [entry["user_attr"]["process"] for entry in journal if "process" in entry.get("user_attr", {})]
    assert len(owners) == 6
    assert set(owners) == {0, 1}


def test_the_grid_s_values_are_a_space() -> None:
    grid = {
        "optim": {"lr": [1.0, 0.1, 0.01], "weight_decay": [0.0, 0.1]},
        "method": {"prompts": [5, 10], "deep": [True]},
    }
    assert drawn_from(None, grid) == {
        "optim.lr": Range(0.01, 1.0, True),
        "optim.weight_decay": [0.0, 0.1],
        "method.prompts": Range(5, 10, False),
        "method.deep": [True],
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("protocol=published",), "protocol = published is a grid, so that numbers compare with the paper's; add "),
        (("method.name=linear", "sweep.space=null"), "method.name = linear is a reader, which trains a whole grid in"),
        (("sweep.parallelize=batch",), "each process trains trials of its own; set sweep.parallelize=trials"),
        (("sweep.space={optim: {lrr: [1, 2]}}",), "sweep.space.optim.lrr: there is no such key; did you mean 'lr'?"),
        (
            ("sweep.space={method: {prompts: {low: -1, high: 3}}}",),
            "sweep.space.method.prompts = -1: method.prompts: Input should be greater than or",
        ),
        (
            ("method.name=full", "sweep.space={method: {name: [full, linear]}}"),
            "sweep.space.method.name = 'linear': reads the frozen stream; leave it out",
        ),
    ],
)
def test_what_is_refused_before_anything_is_written(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    recipe = load_recipe([], words(tmp_path / "sweep", *SEARCH, *overrides))
    with pytest.raises(RecipeError, match=re.escape(message)):
        Search(recipe, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_without_optuna_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Optuna is not installed; pip install 'dist-vpt\[optuna\]'"):
        search_checks.check_search(load_recipe([], words(tmp_path / "sweep", *SEARCH)))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", "digits/vpt_shallow", "--sampler", "optuna", f"run.dir={tmp_path / 'sweep'}"]
    assert main([*argv, "protocol=published"]) == 2
    assert "sweep.search = optuna: protocol = published is a grid" in capsys.readouterr().err
    assert main([*argv, "sweep.space.optim.lrr=[1]"]) == 2  # and so protocol=default is what it takes by itself
    assert "sweep.space.optim.lrr: there is no such key" in capsys.readouterr().err


def test_a_suite_refuses_it() -> None:
    with pytest.raises(RecipeError, match="a suite compares grids; use `dist-vpt sweep`"):
        plan_experiments(["digits"], ["vpt_shallow"], ["sweep.search=optuna", "backbone.name=demo"], None, "out")
