"""What a run comes to in the end: its temperature, extra tests and tables, and the same by eval."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from dist_vpt.cli.main import main
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.load import load_run
from dist_vpt.runs import score_files
from tests.running import train
from tests.training.test_calibration import cross_entropy
from tests.training.test_metrics import calibration_by_hand

FEW = (1, 4, 7)  # classes of an extra test
LINEAR = ("method.name=linear", "optim.lr=0.5", "train.batch_size=50")
NOISY = ("optim.lr=1", "optim.schedule=constant", "train.epochs=4")  # the last epoch is not the best one


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digits as files: of three classes, and noisy ones in two sets."""
    root, draw, digits = tmp_path_factory.mktemp("extra"), np.random.default_rng(0), load_digits()
    for i, (ink, label) in enumerate(zip(digits.images[1000:1060], digits.target[1000:1060], strict=True)):
        pixels = 255 - ink * (255 / 16)
        noisy = np.clip(pixels + draw.normal(0, 90, pixels.shape), 0, 255)
        for folder, shown in (("few", noisy), ("c/noise/1", pixels), ("c/noise/2", noisy)):
            if folder != "few" or label in FEW:
                path = root / folder / str(label) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(shown.astype(np.uint8)).convert("RGB").save(path)
    return {"few": str(root / "few"), "c": str(root / "c")}


@pytest.fixture(scope="module")
def folder(extra: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last epoch is not its best one."""
    path = tmp_path_factory.mktemp("runs") / "run"
    found = train(path, *LINEAR, *NOISY, f"data.extra_tests={json.dumps(extra)}")
    assert found["best"]["epoch"] < found["last"]["epoch"]
    assert found["best"]["temperature"] != found["last"]["temperature"]
    return path


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def logits_of(folder: Path, images: list[Path]) -> torch.Tensor:
    loaded = load_run(str(folder), "last")
    with torch.no_grad():
        return loaded.method(loaded.load_images(images)).double()


def test_an_extra_test_is_scored_among_its_classes(folder: Path, extra: dict[str, str]) -> None:
    images = sorted(Path(extra["few"]).glob("*/*.png"), key=lambda path: (path.parent.name, path.name))
    labels_N = torch.tensor([FEW.index(int(path.parent.name)) for path in images])
    logits_NK = logits_of(folder, images)[:, list(FEW)]
    last = result(folder)["last"]
    scores, temperature = last["extra_tests"]["few"], last["temperature"]["value"]
    assert scores["loss"] == pytest.approx(cross_entropy(logits_NK, labels_N, 1.0), rel=1e-5)
    assert scores["top1"] == pytest.approx(100 * float((logits_NK.argmax(1) == labels_N).double().mean()), abs=1e-4)
    assert scores["ece"] == pytest.approx(calibration_by_hand(logits_NK, labels_N), rel=1e-4)
    assert scores["ece_scaled"] == pytest.approx(calibration_by_hand(logits_NK / temperature, labels_N), rel=1e-4)


def test_the_sets_of_an_extra_test_and_their_mean(folder: Path) -> None:
    scores = result(folder)["last"]["extra_tests"]
    assert list(scores) == ["c", "few", "c/noise/1", "c/noise/2"]
    assert scores["c/noise/1"]["top1"] > scores["c/noise/2"]["top1"]
    for name, mean in scores["c"].items():
        assert mean == pytest.approx((scores["c/noise/1"][name] + scores["c/noise/2"][name]) / 2)


def test_the_temperature_is_the_best_on_val(folder: Path) -> None:
    found = result(folder)["last"]["temperature"]
    assert found["images"] == 200
    loaded = load_run(str(folder), "last")
    val = open_splits(loaded.recipe.data).val
    assert val is not None
    pixels = torch.stack([loaded.inputs.transform.eval(val.read(i)) for i in range(len(val))])
    with torch.no_grad():
        logits_NK = loaded.method(pixels)
    losses = [cross_entropy(logits_NK, torch.from_numpy(val.labels), found["value"] * f) for f in (0.99, 1, 1.01)]
    assert losses[1] == min(losses)


def test_scores_are_logged_and_shown(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last, log = result(folder)["last"], (folder / "train.log").read_text()
    for name, scores in {"test": last["test"], **last["extra_tests"]}.items():
        [line] = [line for line in lines if line["split"] == name]
        assert {key: line[key] for key in scores} == scores
        assert f"  {name:5}  loss {scores['loss']:.4f}  ece {scores['ece']:.2f} %" in log
    assert "note: extra test few: has 3 of 10 classes, and predictions are made among these" in log


def test_tables(folder: Path) -> None:
    rows = table(folder / "predictions.csv")
    test = open_splits(DataConfig())["test"]
    assert [row["image"] for row in rows] == [test.where(i) for i in range(597)]
    assert [int(row["label"]) for row in rows] == test.labels.tolist()
    labels, predicted = ([int(row[key]) for row in rows] for key in ("label", "predicted"))
    right = sum(a == b for a, b in zip(labels, predicted, strict=True))
    assert 100 * right / 597 == pytest.approx(result(folder)["last"]["test"]["top1"], abs=1e-4)
    loss = -np.mean(np.log([float(row["probability"]) for row in rows]))
    assert loss == pytest.approx(result(folder)["last"]["test"]["loss"], abs=1e-4)
    with open(folder / "confusion.csv", newline="") as opened:
        head, *lines = csv.reader(opened)
    assert head == ["label", *map(str, range(10))]
    assert [[int(cell) for cell in line[1:]] for line in lines] == confusion_matrix(labels, predicted).tolist()
    precision, recall, f1, images = precision_recall_fscore_support(labels, predicted)
    for k, row in enumerate(table(folder / "per_class.csv")):
        assert (row["class"], int(row["images"])) == (str(k), images[k])
        for key, expected in (("recall", recall), ("precision", precision), ("f1", f1)):
            assert float(row[key]) == pytest.approx(100 * expected[k], abs=1e-4)
    few = table(folder / "predictions-few.csv")
    assert {row["predicted"] for row in few} <= set(map(str, FEW))
    assert few[0]["image"].startswith("1/")
    unseen = table(folder / "per_class-few.csv")[0]
    assert (unseen["images"], unseen["recall"], unseen["precision"], unseen["f1"]) == ("0", "", "", "")
    assert not list(folder.glob("predictions-c*"))


@pytest.mark.parametrize("adapters", ["last", "best"])
def test_eval_gives_the_same(adapters: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported = result(folder)[adapters]
    found = evaluate_run(str(folder), "test", adapters, out=str(tmp_path / "new" / "out"))
    assert found == {**reported["test"], "extra_tests": reported["extra_tests"]}
    shown = capsys.readouterr().out
    for scores in (reported["test"], *reported["extra_tests"].values()):
        assert shown.count(f"{scores['ece_scaled']:.4f}") >= 2
    names = [path.name for path in (tmp_path / "new" / "out").iterdir()]
    assert len(names) == 6
    for name in names if adapters == "last" else []:
        assert (tmp_path / "new" / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert all(name.endswith("-best.csv") for name in names) == (adapters == "best")


def test_eval_of_extra_tests_that_the_run_did_not_have(folder: Path, extra: dict[str, str]) -> None:
    found = evaluate_run(str(folder), "test", "last", [f"data.extra_tests.new={extra['few']}"])
    assert found["extra_tests"]["new"] == found["extra_tests"]["few"]


def test_eval_refuses_an_out_that_is_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder), "--out", str(folder / "result.json" / "x")]) == 2
    assert "result.json/x: cannot be made (Not a directory); name another folder" in capsys.readouterr().err


def test_eval_of_a_run_without_a_temperature(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = result(copy)
    del content["last"]["temperature"]  # of an earlier version
    (copy / "result.json").write_text(json.dumps(content))
    assert evaluate_run(str(copy), "test", "last")["ece_scaled"] is None
    assert "ece_scaled" not in evaluate_run(str(copy), "val", "last")


def test_predict_calibrated(folder: Path, extra: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted(Path(extra["few"]).glob("1/*.png"))[:3]
    command = ["predict", str(folder), *map(str, images), "--calibrated", "--top", "1"]
    assert main(command) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    temperature = result(folder)["last"]["temperature"]["value"]
    expected = (logits_of(folder, images) / temperature).softmax(1).max(1).values
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=2e-6)


def test_without_val_no_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = train(tmp_path / "run", *LINEAR, "data.train_on=trainval")["last"]
    assert last["temperature"]["value"] is None
    assert last["test"]["ece_scaled"] is None
    assert last["test"]["ece"] > 0
    reason = "there is no val split that is not trained on"
    assert f"note: no temperature is fitted, and ece_scaled is not defined: {reason}" in capsys.readouterr().out
    assert evaluate_run(str(tmp_path / "run"), "test", "last") == last["test"]
    assert main(["predict", str(tmp_path / "run"), __file__, "--calibrated"]) == 2
    assert f"has no temperature for its last adapters: {reason}; leave it out" in capsys.readouterr().err


def test_without_test_nothing_is_scored(tmp_path: Path, extra: dict[str, str]) -> None:
    last = train(tmp_path / "run", *LINEAR, "train.test=false", f"data.extra_tests={json.dumps(extra)}")["last"]
    assert set(last) == {"epoch", "train", "val"}
    assert not list((tmp_path / "run").glob("*.csv"))


@pytest.mark.parametrize("method", ["knn", "logistic"])
def test_a_fitted_run_has_the_same(method: str, extra: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    last = train(folder, f"method.name={method}", f"data.extra_tests={json.dumps(extra)}")["last"]
    assert last["temperature"]["images"] == 200
    assert 0 < last["test"]["ece_scaled"] < 100
    assert list(last["extra_tests"]) == ["c", "few", "c/noise/1", "c/noise/2"]
    assert len(table(folder / "predictions.csv")) == 597
    assert len(table(folder / "predictions-few.csv")) == len(list(Path(extra["few"]).glob("*/*")))
    found = evaluate_run(str(folder), "test", "last")
    assert found["extra_tests"]["few"] == pytest.approx(last["extra_tests"]["few"], rel=1e-3)


def test_extra_tests_may_change_on_resume(folder: Path) -> None:
    assert train(folder, *LINEAR, *NOISY, "run.resume=auto") == result(folder)  # done: not scored again


def fail(path: Path, content: str) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_the_tables_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "write_atomically", fail)
    for name, method in (("a", LINEAR), ("b", ("method.name=knn",))):
        folder = tmp_path / name
        found = train(folder, *method)
        assert found["last"]["test"]["top1"] > 10
        assert json.loads((folder / "run.json").read_text())["status"] == "done"
        assert not list(folder.glob("*.csv"))
    assert "tables of the scores could not be written" in (tmp_path / "a" / "train.log").read_text()


def test_names_are_escaped(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    predictions = score_files.Predictions(*(np.array(column) for column in ([0], [0], [1], [0.25])))
    names = ("a,\n", 'b"\x1b[1m')

    class Records:
        def where(self, i: int) -> str:
            return f"record {i}"

    split = score_files.Split("test", np.array([0]), Records())  # type: ignore[arg-type]
    score_files.write_tables(tmp_path, predictions, split, names, "test")
    assert table(tmp_path / "predictions.csv") == [
        {"image": "record 0", "label": "a,\\n", "predicted": 'b"\\x1b[1m', "probability": "0.25"}
    ]
    assert (tmp_path / "confusion.csv").read_text() == 'label,"a,\\n","b""\\x1b[1m"\n"a,\\n",0,1\n"b""\\x1b[1m",0,0\n'
