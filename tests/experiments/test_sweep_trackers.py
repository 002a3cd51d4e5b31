"""What a sweep sends to trackers: means and standard deviations over seeds, the chosen setting, the heat map."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_vpt.cli.main import main
from tests.running import words

SWEEP = ["method.name=linear", "train.epochs=1", "sweep.grid.optim.lr=[0.5, 0.02]", "sweep.seeds=[42, 44]"]
pytestmark = pytest.mark.usefixtures("on_the_cpu")


def swept(folder: Path, *overrides: str) -> dict[str, dict[str, float]]:
    assert main(["sweep", *words(folder, *SWEEP, *overrides)]) == 0
    return json.loads((folder / "sweep.json").read_text())


def test_tensorboard_has_means_and_map(tmp_path: Path, data: tuple[str, ...]) -> None:
    content = swept(tmp_path / "sweep", *data)
    events = EventAccumulator(str(tmp_path / "sweep" / "tb")).Reload()
    for name in ("top1", "loss"):
        for what in ("mean", "std"):
            (value,) = events.Scalars(f"test/{name}_{what}")
            assert value.value == pytest.approx(content["test"][name][what], rel=1e-6)
    assert events.Tags()["images"] == ["sweep/val_top1"]


def test_mlflow_has_them_too(tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    folder = tmp_path / "sweep"
    content = swept(folder, *data, "run.trackers=[mlflow]")
    (found,) = mlflow.search_runs(experiment_names=["dist_vpt"], output_format="list")
    assert (found.info.run_name, found.info.status) == ("sweep", "FINISHED")
    for name in ("top1", "loss"):
        for what in ("mean", "std"):
            assert found.data.metrics[f"test/{name}_{what}"] == content["test"][name][what]
    assert found.data.params["optim.lr"] == str(content["chosen"]["optim.lr"])
    assert (Path(found.info.artifact_uri.removeprefix("file:")) / "sweep" / "val_top1.png").is_file()
    assert not (folder / "tb").exists()
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_a_tracker_that_cannot_start_costs_neither_the_sweep_nor_the_others(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such server\nand more")

    monkeypatch.setattr("accelerate.tracking.MLflowTracker.start", broken)
    swept(tmp_path / "sweep", *data, "run.trackers=[mlflow,tensorboard]")
    assert (
        "warning: run.trackers: mlflow cannot start (no such server); sweep.json has all values\n"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "sweep" / "run.json").read_text())["status"] == "done"
    events = EventAccumulator(str(tmp_path / "sweep" / "tb")).Reload()
    assert "test/top1_mean" in events.Tags()["scalars"]
