"""Scores, a temperature and predictions of two processes are those of one, whatever each has seen."""

import csv
import json
from pathlib import Path

import pytest
import torch

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.training.calibration import fit_temperature, temperature_on_val
from dist_vpt.training.metrics import Scores
from tests.forks import command, launched
from tests.running import train, words
from tests.training.test_metrics import CPU, draw

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]


@pytest.mark.parametrize("seen", ["alike", "one alone"])
def test_two_processes_score_as_one(seen: str, tmp_path: Path) -> None:
    logits_NK, labels_N = draw(101, 7)

    def scored(keep: str, temperature: float | None, rank: int, world: int) -> Scores:
        rows_n = torch.arange(101)
        mine_n = rows_n[rank::world] if seen == "alike" or world == 1 else rows_n[: 101 * rank]  # the second one alone
        scores = Scores(7, CPU, "test", keep=keep, temperature=temperature)  # type: ignore[arg-type]
        for some in mine_n.split(10):
            scores.update(logits_NK[some], labels_N[some], torch.ones(len(some)), some)
        return scores

    expected = scored("predictions", 1.7, 0, 1).compute()
    predicted = scored("predictions", 1.7, 0, 1).predictions()
    temperature = fit_temperature(logits_NK, labels_N)

    def work(rank: int) -> int:
        RankAccelerator(cpu=True)
        scores = scored("predictions", 1.7, rank, 2)
        assert scores.compute() == pytest.approx(expected, rel=1e-6)
        assert scores.compute()["ece"] == pytest.approx(expected["ece"], rel=1e-12)
        found = scores.predictions()
        for name in ("index_n", "label_n", "predicted_n", "probability_n"):
            assert getattr(found, name).tolist() == getattr(predicted, name).tolist(), name
        assert temperature_on_val(scored("logits", None, rank, 2)) == temperature
        return 0

    forks = launched(work, tmp_path / "output.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output[-3000:]


@pytest.mark.parametrize("method", ["vpt", "knn"])
def test_a_run_on_two_processes_ends_as_on_one(method: str, data: tuple[str, ...], tmp_path: Path) -> None:
    """An extra test of one image, which the second process does not see."""
    source = next(path for path in Path(data[2].partition("=")[2]).glob("*.png"))
    image = tmp_path / "extra" / "3" / "0.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(source.read_bytes())
    options = (*data, "optim.lr=0.02", f"method.name={method}", f"data.extra_tests.one={tmp_path / 'extra'}")
    alone = train(tmp_path / "alone", *options)["last"]
    forks = command(["train", *words(tmp_path / "run", *options)], tmp_path / "output.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output[-3000:]
    last = json.loads((tmp_path / "run" / "result.json").read_text())["last"]
    for one, two in (
        (alone["temperature"], last["temperature"]),
        (alone["test"], last["test"]),
        (alone["extra_tests"]["one"], last["extra_tests"]["one"]),
    ):
        assert two == pytest.approx(one, abs=1e-3)
    for name in ("predictions.csv", "predictions-one.csv"):
        tables = [list(csv.DictReader((tmp_path / run / name).open(newline=""))) for run in ("alone", "run")]
        for row, other in zip(*tables, strict=True):
            assert float(other.pop("probability")) == pytest.approx(float(row.pop("probability")), abs=1e-4)
            assert other == row
    assert (tmp_path / "run" / "confusion.csv").read_text() == (tmp_path / "alone" / "confusion.csv").read_text()
