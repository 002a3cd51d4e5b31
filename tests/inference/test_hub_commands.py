"""What `compare`, `compress`, `status` and `Run` make of a run on the hub."""

import json
from pathlib import Path

import pytest

import dist_vpt
from dist_vpt.cli.main import main
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.push import push
from tests.inference.hub_server import Hub
from tests.running import few_digits, train

ID = "hub:me/vqt"
VQT = ("method.name=vqt", "method.blocks=[1,4]", "train.epochs=1", "run.trackers=[]")
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return few_digits(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def run(few: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "vqt"
    train(path, *VQT, *few, "train.batch_size=50")
    return path


def root(few: tuple[str, ...]) -> str:
    return next(word for word in few if word.startswith("data.root="))


def test_compress_starts_from_it(  # noqa: PLR0917 (fixtures)
    hub: Hub,
    run: Path,
    few: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(str(run), ID)
    monkeypatch.chdir(tmp_path)
    assert main(["compress", ID, "--keep", "0.5"]) == 2
    assert (
        "hub:me/vqt: the folder of its dataset is not shared with it; give data.root=FOLDER" in capsys.readouterr().err
    )
    assert main(["compress", ID, "--keep", "0.5", "--adapters", "best", root(few)]) == 2
    assert "was shared with one file of adapters" in capsys.readouterr().err
    assert main(["compress", ID, "--keep", "0.5", root(few)]) == 0
    assert main(["compress", str(run), "--keep", "0.5"]) == 0
    here, there = (
        json.loads((folder / "featselect-0.5" / "result.json").read_text())["last"]["test"]
        for folder in (run / "compressed", tmp_path / "compressed")
    )
    assert here == there


def test_compare_names_the_command_that_writes_predictions(
    hub: Hub, run: Path, few: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(str(run), ID)
    assert main(["compare", str(run), ID]) == 2
    out = tmp_path / "there"
    assert f"`dist-vpt eval {ID} --out FOLDER` writes them here, and compare takes FOLDER" in capsys.readouterr().err
    evaluate_run(ID, "test", "last", [root(few)], out=str(out))
    capsys.readouterr()
    assert main(["compare", str(run), str(out), "--json"]) == 0
    (compared,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert (compared["only_first"], compared["only_second"]) == (0, 0)
    assert main(["compare", str(run), str(tmp_path)]) == 2
    assert "neither a run folder (no recipe.yaml) nor one of `dist-vpt eval --out`" in capsys.readouterr().err


def test_status_says_that_it_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", ID]) == 2
    assert capsys.readouterr().err == (
        "error: hub:me/vqt: is a run on the hub, which is finished; name a folder that train, sweep or suite "
        "writes to\n"
    )


def test_a_run_in_python(hub: Hub, run: Path) -> None:
    push(str(run), ID)
    shared, here = dist_vpt.Run(ID), dist_vpt.Run(run)
    assert (shared.status, shared.metrics) == ("done", [])
    assert shared.result["last"]["test"] == here.result["last"]["test"]
    assert shared.recipe.method == here.recipe.method
    assert shared.load().classes == here.load().classes
