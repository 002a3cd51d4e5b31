"""Two runs on the same images: against independent mathematics, and end to end on digits."""

import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, chi2

from dist_vpt.cli.main import main
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.report.paired import Predicted, bootstrap_interval, compare_runs, compare_two
from dist_vpt.runs.score_files import read_predictions
from tests.running import train


def runs(first: str, second: str) -> tuple[Predicted, Predicted]:
    """Two runs by which of their images are right: 1 or 0."""
    images = tuple((str(i), "a") for i in range(len(first)))
    one, two = (
        Predicted(name, images, tuple(bit == "1" for bit in bits)) for name, bits in (("A", first), ("B", second))
    )
    return one, two


@pytest.mark.parametrize(("a", "b"), [(0, 5), (3, 9), (1, 1), (7, 7), (20, 8), (0, 1)])
def test_mcnemar_is_a_fair_coin_thrown_for_each_image_right_in_one_alone(a: int, b: int) -> None:
    compared = compare_two(*runs("1" * a + "0" * b + "11110", "0" * a + "1" * b + "11110"))
    assert (compared.only_first, compared.only_second) == (a, b)
    assert compared.difference == pytest.approx(100 * (b - a) / (a + b + 5))
    # As exact integers: all outcomes of a + b throws that are as far from the middle, or farther.
    far = sum(math.comb(a + b, k) for k in range(a + b + 1) if abs(2 * k - a - b) >= abs(a - b))
    assert compared.p_value == pytest.approx(far / 2 ** (a + b), rel=1e-12)
    assert compared.p_value == pytest.approx(min(1.0, 2 * binom.cdf(min(a, b), a + b, 0.5)), rel=1e-12)


def test_mcnemar_of_many_images_is_near_its_chi_squared_form() -> None:
    compared = compare_two(*runs("1" * 400 + "0" * 460, "0" * 400 + "1" * 460))
    assert compared.p_value == pytest.approx(chi2.sf((460 - 400 - 1) ** 2 / 860, 1), rel=0.02)


def test_the_interval_is_that_of_images_drawn_with_replacement() -> None:
    """All draws of four images, each as likely: the exact distribution that 10,000 draws approach."""
    differences_n = np.array([1, -1, 0, 1])
    every = [100 * differences_n[list(rows)].mean() for rows in itertools.product(range(4), repeat=4)]
    low, high = bootstrap_interval(a=1, b=2, n=4)
    assert (low, high) == (np.quantile(every, 0.025), np.quantile(every, 0.975))


def test_the_interval_of_many_images_is_near_that_of_a_normal_distribution() -> None:
    a, b, n = 300, 360, 5_000
    low, high = bootstrap_interval(a, b, n)
    mean, variance = (b - a) / n, (a + b) / n - ((b - a) / n) ** 2
    half = 1.96 * math.sqrt(variance / n)
    assert (low, high) == pytest.approx((100 * (mean - half), 100 * (mean + half)), abs=0.05)
    assert bootstrap_interval(a, b, n) == (low, high)  # of one seed


def test_verdicts() -> None:
    assert compare_two(*runs("0" * 6 + "1", "1" * 7)).verdict == (
        "B is better than A: 6 images are right in it alone, 0 in the other alone, which chance would hardly give "
        "(p = 0.031)"
    )
    assert compare_two(*runs("1" * 6 + "1", "0" * 6 + "1")).verdict.startswith("A is better than B: 6 images")
    assert compare_two(*runs("100", "011")).verdict == (
        "A and B cannot be told apart: 2 and 1 images are right in one alone, which chance would often give (p = 1)"
    )
    same = compare_two(*runs("101", "101"))
    assert same.verdict == "A and B are right on the same images"
    assert (same.p_value, same.interval) == (1.0, (0.0, 0.0))


# End to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of different length."""
    path = tmp_path_factory.mktemp("runs")
    for name, *options in (("short",), ("long", "train.epochs=6"), ("val", "train.epochs=2", "data.fraction=0.5")):
        train(path / name, "method.name=linear", "optim.lr=0.5", "train.batch_size=50", *options)
    return path


def right(run: Path) -> dict[str, bool]:
    with open(run / "predictions.csv", newline="") as file:
        return {row["image"]: row["label"] == row["predicted"] for row in csv.DictReader(file)}


def test_two_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(folder / "short"), str(folder / "long"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    one, two = right(folder / "short"), right(folder / "long")
    assert [run["images"] for run in content["runs"]] == [597, 597]
    for run in content["runs"]:
        scores = json.loads((Path(run["run"]) / "result.json").read_text())["last"]["test"]
        assert run["accuracy"] == pytest.approx(scores["top1"], abs=1e-4)
    [found] = content["comparisons"]
    assert found["only_first"] == sum(one[image] and not two[image] for image in one)
    assert found["only_second"] == sum(two[image] and not one[image] for image in one)
    assert found["difference"] == pytest.approx(content["runs"][1]["accuracy"] - content["runs"][0]["accuracy"])
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert found["p_value"] < 0.05
    assert "is better than" in found["verdict"]


def test_several_runs_are_shown_beside_the_first_in_80_columns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    found = compare_runs(["short", "long", "val"])
    shown = capsys.readouterr().out
    assert [each.second for each in found] == ["long", "val"]
    for each in found:
        assert f"{each.only_first}, {each.only_second}" in shown
        assert f"{each.interval[0]:.2f} to {each.interval[1]:.2f}" in shown
        assert each.verdict in shown


def test_other_splits_and_adapters_by_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["short", "long"]
    for options in (["--split", "val"], ["--adapters", "best"]):
        assert main(["compare", *(str(folder / name) for name in names), *options]) == 2
        assert f"`dist-vpt eval {folder / 'short'} {' '.join(options)} --out" in capsys.readouterr().err
        for name in names:
            assert main(["eval", str(folder / name), *options, "--out", str(folder / name)]) == 0
        assert main(["compare", *(str(folder / name) for name in names), *options]) == 0
    assert len(read_predictions(folder / "short" / "predictions-val.csv")) == 200
    assert len(read_predictions(folder / "short" / "predictions-best.csv")) == 597


def test_what_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    def refused(second: Path, text: str, kind: type[UserError] = UserError) -> None:
        with pytest.raises(kind, match=text):
            compare_runs([str(folder / "short"), str(second)])

    with pytest.raises(UserError, match="nothing to compare with one run"):
        compare_runs([str(folder / "short")])
    refused(tmp_path, r"neither a run folder \(no recipe\.yaml\) nor one of `dist-vpt eval --out`", RunFolderError)
    other = Path(shutil.copytree(folder / "long", tmp_path / "other"))
    table = other / "predictions.csv"
    lines = table.read_text().splitlines(keepends=True)
    last = lines[-1].partition(",")[0]
    table.write_text("".join(lines[:-1]))
    refused(other, f"image {last!r} is scored in the first one alone; compare runs that were")
    table.write_text("".join([*lines, lines[-1].replace(last, "digits record 9999")]))
    refused(other, "the second one has 1 images more")
    table.write_text("".join([lines[0], *lines[:0:-1]]))
    refused(other, "in another order")
    names = [line.partition(",")[0] for line in lines[1:]]
    table.write_text(lines[0] + "".join(f"{name},9,9,1\n" for name in names))
    refused(other, f"image {names[0]!r} is '.' in the first one, and '9' in the second one")
    table.write_text("".join(lines[1:]))
    refused(other, "damaged .its columns must be image, label, predicted, probability")
    table.unlink()
    refused(other, "no predictions here; `dist-vpt eval .*other --out .*other` writes them")
    (other / "run.json").write_text(json.dumps({"kind": "run", "status": "interrupted"}))
    refused(other, "not finished .status: interrupted.", RunFolderError)
    (other / "run.json").write_text(json.dumps({"kind": "sweep", "status": "done"}))
    refused(other, "is a sweep; name one of its runs", RunFolderError)


def test_an_extra_test_that_a_run_does_not_have(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dist-vpt eval .*short data.extra_tests.r=FOLDER --out"):
        compare_runs([str(folder / "short"), str(folder / "long")], "r")
    with pytest.raises(UserError, match="the sets of an extra test are not kept"):
        compare_runs([str(folder / "short"), str(folder / "long")], "c/fog/1")
