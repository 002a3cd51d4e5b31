"""Trackers: Accelerate's names, packages that are missing, and what each one gets; stand-ins write down their calls."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.utils import LoggerType

from dist_vpt.errors import RecipeError, UserError
from dist_vpt.experiments.early_checks import check_early
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.trackers import TRACKERS, require_trackers
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.trackers import Trackers
from tests.running import train, words

RECORD = """
calls = []
class Record:
    def __init__(self, **given): self.__dict__.update(given)
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        return lambda *a, **k: calls.append((name, a, k))
"""
STAND_INS = {  # of the interfaces that Accelerate's trackers use
    "wandb": "def init(**k):\n    calls.append(('init', (), k)); return Record()\nconfig = Record()",
    "swanlab": "class Config(Record):\n    def __setitem__(self, k, v): pass\n"
    "def init(**k):\n    calls.append(('init', (), k)); return Record()\nconfig = Config()",
    "trackio": "def init(**k):\n    calls.append(('init', (), k)); return Record()\nconfig = Record()",
    "comet_ml": "__version__ = '3.50.0'\ndef start(**k):\n    calls.append(('init', (), k)); return Record()",
    "aim": "class Run(Record):\n    def __init__(self, **k):\n        calls.append(('init', (), k))\n"
    "        self.hash = 'hash-1'\n    def __setitem__(self, k, v): calls.append(('set', (k, v), {}))",
    "clearml": "class Task:\n    @staticmethod\n    def current_task(): return None\n    @staticmethod\n"
    "    def init(**k):\n        calls.append(('init', (), k)); return Record(get_logger=lambda: Record())",
    "dvclive": "class Live(Record):\n    def __init__(self, **k): calls.append(('init', (), k))",
    "mlflow": "utils = Record(validation=Record(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))\n"
    "def search_experiments(**k): return []\ndef create_experiment(**k): return '7'\n"
    "def start_run(**k):\n    calls.append(('init', (), k)); return Record(info=Record(run_id='run-1'))\n"
    "def log_params(v): calls.append(('log_params', (v,), {}))\n"
    "def log_metrics(v, step): calls.append(('log_metrics', (v,), {'step': step}))\n"
    "def end_run(): calls.append(('end_run', (), {}))",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Puts a package in the place of a tracker's, and gives its module."""
    made: list[str] = []

    def make(name: str) -> Any:
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(RECORD + STAND_INS[name])
        if name == "dvclive":
            (package / "plots.py").write_text("class Metric:\n    could_log = staticmethod(lambda v: True)\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        for module in loaded(name):  # the package itself, if another test has used it
            monkeypatch.delitem(sys.modules, module)
        made.append(name)
        return importlib.import_module(name)

    yield make
    for name in made:
        for module in loaded(name):
            del sys.modules[module]


def loaded(package: str) -> list[str]:
    return [module for module in sys.modules if module.partition(".")[0] == package]


def test_the_names_are_accelerate_s() -> None:
    assert set(TRACKERS) == {str(kind) for kind in LoggerType} - {"all"}


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"run\.trackers\.1 = 'comet': must be one .*; did you mean 'comet_ml'\?"):
        load_recipe([], ["run.trackers=[tensorboard,comet]"])


def test_missing_packages_are_named_before_anything_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B leaves it in the current folder: it is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_recipe([], words(tmp_path / "run", "run.trackers=[tensorboard,wandb,comet_ml]"))
    with pytest.raises(UserError) as refused:
        check_early(recipe)
    assert str(refused.value) == (
        "run.trackers: wandb and comet_ml are not installed; pip install 'dist-vpt[wandb]' comet-ml, or leave them out"
    )
    with pytest.raises(UserError, match=r"^run\.trackers: aim is not installed; pip install aim, or leave it out$"):
        require_trackers(["aim"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_each_gets_curves_hyperparameters_and_scores(
    name: str, stand_in: Callable[[str], Any], tmp_path: Path, data: tuple[str, ...]
) -> None:
    calls = stand_in(name).calls
    train(tmp_path / "run", *data, f"run.trackers=[{name}]", "train.epochs=1")
    text = repr(calls)
    for sent in ("train/loss", "norm/update", "val/epoch_top1", "test/epoch_top1", "optim.lr", "method.prompts"):
        assert sent in text, sent
    assert sum(call[0] == "init" for call in calls) == 1
    assert calls[-1][0] in ("finish", "end", "end_run", "close")
    assert "warning" not in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(
    ("name", "key", "kept"),
    [
        ("mlflow", "run_id", "run-1"),
        ("aim", "run_hash", "hash-1"),
        ("wandb", "id", None),
        ("comet_ml", "experiment_key", None),
        ("trackio", "name", None),
    ],
)
def test_a_resumed_run_continues_the_tracker_s(  # noqa: PLR0917 (fixtures)
    name: str, key: str, kept: str | None, stand_in: Callable[[str], Any], tmp_path: Path, data: tuple[str, ...]
) -> None:
    calls = stand_in(name).calls
    folder, tracked = tmp_path / "run", f"run.trackers=[{name}]"
    train(folder, *data, tracked)
    (folder / "result.json").unlink()
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"status": "interrupted"}))
    train(folder, *data, tracked, "run.resume=auto")
    first, second = (call[2] for call in calls if call[0] == "init")
    assert second[key] == (kept or first[key])
    if kept:
        assert not first.get(key)
    assert json.loads((folder / "run.json").read_text()).get("trackers") == ({name: kept} if kept else None)


def test_one_that_fails_later_is_dropped_and_the_others_go_on(
    stand_in: Callable[[str], Any], tmp_path: Path, data: tuple[str, ...]
) -> None:
    module = stand_in("mlflow")

    def broken(values: Any, step: int) -> None:
        raise ConnectionError("the server is gone\nand more")

    module.log_metrics = broken
    train(tmp_path / "run", *data, "run.trackers=[mlflow,tensorboard]")
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("warning: mlflow gets no more values (ConnectionError: the server is gone); metrics.jsonl") == 1
    assert list((tmp_path / "run" / "tb").glob("events*"))


def test_a_picture_goes_where_accelerate_has_a_call_for_it(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    got: dict[str, Any] = {}

    class Tracker:
        def __init__(self, name: str):
            self.name = name

        def log_images(self, values: dict[str, Any], step: int) -> None:
            got[self.name] = values["sweep/val_top1"]

    trackers = Trackers(load_recipe([], words(tmp_path)), RunFolder(str(tmp_path)), print)
    trackers.active = [Tracker(name) for name in ("wandb", "swanlab", "aim", "clearml", "dvclive")]
    trackers.picture("sweep/val_top1", Figure(figsize=(2, 1), dpi=100), 0)
    assert len(trackers.active) == 5
    assert {name: type(picture) for name, picture in got.items()} == {
        "wandb": list, "swanlab": list, "aim": np.ndarray, "clearml": np.ndarray,
    }  # fmt: skip
    assert got["wandb"][0].shape == got["aim"].shape == (100, 200, 3)
    assert got["aim"].dtype == np.uint8


@pytest.mark.slow
def test_mlflow_itself(tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    folder = tmp_path / "run"
    train(folder, *data, "run.trackers=[mlflow]")
    info = json.loads((folder / "run.json").read_text())
    (folder / "result.json").unlink()
    (folder / "run.json").write_text(json.dumps(info | {"status": "interrupted"}))
    train(folder, *data, "run.trackers=[mlflow]", "run.resume=auto", "data.on_decode_error=skip")
    (found,) = mlflow.search_runs(experiment_names=["dist_vpt"], output_format="list")
    assert found.info.run_id == info["trackers"]["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optim.lr"] == "0.1"
    assert {"train/loss", "test/epoch_top1"} <= found.data.metrics.keys()
