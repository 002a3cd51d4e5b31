"""What a run's adapters are good for: the same numbers again, and classes for images."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dist_vpt.cli.main import main
from dist_vpt.errors import DataError, RunFolderError, UserError, WeightsError
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.predict import predict
from dist_vpt.runs.adapters import read_adapters, write_adapters
from tests.running import train

DIGITS = 12  # images written out for prediction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    path = tmp_path_factory.mktemp("runs") / "one"
    train(
        path, "train.epochs=2", "optim.lr=0.5", "train.batch_size=50", "data.image_size=16", "train.eval_batch_size=64"
    )
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, some in a folder of their own, beside files that are no images."""
    path = tmp_path_factory.mktemp("pictures")
    (path / "inner").mkdir()
    for i, image in enumerate(load_digits().images[:DIGITS]):
        pixels = np.rint(255 - image * (255 / 16)).astype(np.uint8)
        suffix = (".png", ".PNG", ".bmp")[i % 3]
        Image.fromarray(pixels).save(path / ("inner" if i > 8 else "") / f"{i:02}{suffix}")
    (path / "notes.txt").write_text("no image")
    (path / "._00.png").write_text("what some systems leave beside an image")
    return path


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


# Scoring again


@pytest.mark.parametrize("adapters", ["last", "best"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_eval_gives_the_runs_own_numbers(
    adapters: str, split: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported = result(folder)[adapters][split]
    assert evaluate_run(str(folder), split, adapters) == reported
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{split} split, {adapters} adapters" in shown
    assert shown.count(f"{reported['top1']:.4f}") >= 2


def test_eval_of_what_the_run_did_not_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = evaluate_run(str(folder), "trainval", "last")
    assert {*scores, "ece_scaled"} == set(result(folder)["last"]["test"])
    assert "1,200 images" in " ".join(capsys.readouterr().out.split())


def test_eval_with_overrides_of_how_it_is_computed(folder: Path) -> None:
    scores = evaluate_run(str(folder), "test", "last", ["train.eval_batch_size=17", "data.cache=none"])
    assert scores == pytest.approx(result(folder)["last"]["test"], abs=1e-4)


def test_eval_reads_the_adapters(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors, facts = read_adapters(copy / "adapters.safetensors")
    write_adapters(copy / "adapters.safetensors", {n: -t for n, t in tensors.items()}, facts)
    assert evaluate_run(str(copy), "test", "last")["top1"] < result(folder)["last"]["test"]["top1"] - 10


def test_eval_leaves_the_run_as_it_was(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert main(["eval", str(folder), "--split", "val"]) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.prompts=3"], "prompts has shape"),
        (["method.name=linear"], "not adapters of this recipe"),
        (["data.rot=x"], "did you mean 'root'"),
    ],
)
def test_eval_with_another_recipe(overrides: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_run(str(folder), "test", "last", overrides)


def test_eval_on_data_with_other_classes(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in "abcdefghij":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match="other classes"):
        evaluate_run(
            str(folder), "test", "last", ["data.task=mine", "data.format=image_folder", f"data.root={tmp_path}"]
        )


def test_eval_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        evaluate_run(str(tmp_path), "test", "last")


def test_eval_before_the_run_has_ended(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "recipe.yaml", tmp_path)
    with pytest.raises(WeightsError, match="no adapters here"):
        evaluate_run(str(tmp_path), "test", "last")


def test_damaged_adapters(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "recipe.yaml", tmp_path)
    (tmp_path / "adapters.safetensors").write_bytes((folder / "adapters.safetensors").read_bytes()[:500])
    with pytest.raises(WeightsError, match="damaged adapters"):
        evaluate_run(str(tmp_path), "test", "last")


# Classifying images


def test_predict_knows_digits(folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict(str(folder), [str(pictures)], top=10)
    capsys.readouterr()
    assert len(rows) == DIGITS
    right = 0
    for row in rows:
        predictions = row["predictions"]
        values = [p["probability"] for p in predictions]
        assert {p["class"] for p in predictions} == set("0123456789")
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
        right += predictions[0]["class"] == str(load_digits().target[int(Path(row["image"]).stem)])
    assert right >= DIGITS // 4  # by chance: a tenth


def test_predict_agrees_with_the_evaluation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dist_vpt.data.config import DataConfig
    from dist_vpt.data.formats import open_splits

    test = open_splits(DataConfig()).test
    assert test is not None
    for i in range(len(test)):
        Image.fromarray(np.asarray(test.read(i))).save(tmp_path / f"{i:04}.png")
    rows = predict(str(folder), [str(tmp_path)], top=1)
    capsys.readouterr()
    right = sum(int(row["predictions"][0]["class"]) == label for row, label in zip(rows, test.labels, strict=True))
    assert 100 * right / len(test) == pytest.approx(result(folder)["last"]["test"]["top1"], abs=1e-4)


def test_predict_writes_csv(folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert main(["predict", str(folder), str(pictures), "--top", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * DIGITS
    assert list(rows[0]) == ["image", "rank", "class", "probability"]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * DIGITS
    assert {row["class"] for row in rows} <= set("0123456789")
    for start in range(0, len(rows), 3):
        some = rows[start : start + 3]
        assert len({row["image"] for row in some}) == 1
        assert 0 < sum(float(row["probability"]) for row in some) <= 1 + 1e-5
    assert main(["predict", str(folder), str(pictures), "--top", "3"]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_predict_writes_json(folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["predict", str(folder), str(pictures), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    rows = json.loads(out.read_text())
    assert [len(row["predictions"]) for row in rows] == [5] * DIGITS
    assert all(sum(p["probability"] for p in row["predictions"]) <= 1 + 1e-5 for row in rows)
    assert list(tmp_path.iterdir()) == [out]


def test_predict_takes_files_and_folders_in_order(
    folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predict(str(folder), [str(pictures / "02.bmp"), str(pictures / "inner"), str(pictures / "02.bmp")], top=1)
    capsys.readouterr()
    names = [Path(row["image"]).name for row in rows]
    assert names == ["02.bmp", "09.png", "10.PNG", "11.bmp", "02.bmp"]
    assert rows[0] == rows[-1]


def test_predict_says_which_files_of_a_folder_it_passed_over(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pictures / "00.png", tmp_path)
    (tmp_path / "a.json").write_text("{}")
    assert len(predict(str(folder), [str(tmp_path)])) == 1
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: files without the extension of an image are not read: 1 .json\n"
    )


def test_predict_with_the_best_adapters(folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "best.safetensors", folder / "kept")
    tensors, facts = read_adapters(folder / "best.safetensors")
    write_adapters(folder / "best.safetensors", {n: 0 * t for n, t in tensors.items()}, facts)
    try:
        rows = predict(str(folder), [str(pictures)], adapters="best", top=2)
    finally:
        shutil.move(folder / "kept", folder / "best.safetensors")
    capsys.readouterr()
    assert all(p["probability"] == pytest.approx(0.1, abs=1e-6) for row in rows for p in row["predictions"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pictures}/nix.png"], "nix.png: no such file or folder"),
        (["{empty}"], "holds no image; name a folder of images"),
        (["{pictures}/00.png", "--top", "0"], "--top 0: must be at least 1"),
        (["{pictures}/00.png", "--out", "out.txt"], "--out out.txt: must end in .csv or .json"),
        (["{pictures}/00.png", "--out", "{empty}/nix/out.csv"], "there is no folder"),
    ],
)
def test_predict_with_mistakes(  # noqa: PLR0917 (fixtures)
    arguments: list[str],
    message: str,
    folder: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.format(pictures=pictures, empty=tmp_path) for argument in arguments]
    assert main(["predict", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_predict_names_the_broken_image(folder: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.txt"):
        predict(str(folder), [str(pictures / "notes.txt")])
    whole = (pictures / "00.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\.png"):
        predict(str(folder), [str(pictures / "00.png"), str(tmp_path / "half.png")], out=str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_a_damaged_result(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "result.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"result\.json: damaged"):
        evaluate_run(str(copy), "val", "last")


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
@pytest.mark.parametrize("name", ["result.json", "run.json"])
def test_files_of_a_run_that_hold_something_else(content: str, name: str, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    (copied / name).write_text(content)
    with pytest.raises(RunFolderError, match=rf"{name}: damaged \(it holds a \w+, not an object\); restore the file"):
        evaluate_run(str(copied), "test", "last")


def test_a_result_without_scores_is_read_as_none(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    (copied / "result.json").write_text("{}")
    assert evaluate_run(str(copied), "test", "last")["top1"] == pytest.approx(result(folder)["last"]["test"]["top1"])


def test_adapters_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    """They would be scored as some class or other."""
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    tensors, facts = read_adapters(copied / "adapters.safetensors")
    tensors["head.bias"][0] = float("nan")
    write_adapters(copied / "adapters.safetensors", tensors, facts)
    with pytest.raises(WeightsError, match=r"adapters.safetensors: head.bias holds numbers that are not finite; train"):
        evaluate_run(str(copied), "test", "last")
