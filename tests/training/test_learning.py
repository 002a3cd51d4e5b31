"""Warnings that a training diverges or does not learn: in the log while it happens, and in result.json."""

import json
import math
from pathlib import Path

import pytest

from dist_vpt.recipe.schema import OptimConfig, TrainConfig
from dist_vpt.training.learning import Guessing, warning_of
from tests.running import train

OPTIM, TRAIN = OptimConfig(lr=0.5, warmup_epochs=2), TrainConfig(epochs=10)


@pytest.mark.parametrize(
    ("epoch", "loss", "top1", "found"),
    [
        (
            3,
            6.91,
            50.0,
            "the training loss of epoch 3 is 6.91, and that of guessing 2.30: optim.lr = 0.5 may not suit",
        ),
        (3, 6.90, 50.0, ""),  # 3 ln(10) is 6.908
        (2, 99.0, 50.0, ""),  # in warm-up
        (5, 2.3, 12.8, "after half of the epochs 12.8 % of the training images are classified correctly, and the larg"),
        (5, 2.3, 12.9, ""),  # 10 % and three standard deviations of 1,000 images are 12.85 %
        (4, 2.3, 10.0, ""),
        (6, 2.3, 10.0, ""),
    ],
)
def test_warning_of(epoch: int, loss: float, top1: float, found: str) -> None:
    warning = warning_of(OPTIM, TRAIN, epoch, {"loss": loss, "top1": top1}, 1000, Guessing(math.log(10), 0.1))
    assert warning.startswith(found) if found else warning == ""


def test_few_images_and_a_large_class_are_no_reason_to_warn() -> None:
    for images, majority, top1 in ((73, 0.959, 100.0), (73, 0.959, 97.0), (16, 0.5, 60.0)):
        guessing = Guessing(math.log(2), majority)
        assert warning_of(OPTIM, TRAIN, 5, {"loss": 0.1, "top1": top1}, images, guessing) == ""
    assert warning_of(OPTIM, TRAIN, 5, {"loss": 0.1, "top1": 50.0}, 16, Guessing(math.log(2), 0.5))


def warnings_of(folder: Path) -> list[str]:
    result = json.loads((folder / "result.json").read_text())
    logged = [line for line in (folder / "train.log").read_text().splitlines() if "warning: " in line]
    found = result.get("warnings", [])
    assert [line.partition("warning: ")[2] for line in logged] == found
    return found


def test_a_run_that_diverges_says_so_once(tmp_path: Path) -> None:
    train(tmp_path / "run", "optim.lr=300", "train.epochs=4")
    [warning] = warnings_of(tmp_path / "run")
    assert warning.startswith("the training loss of epoch 2 is")
    assert "where the loss rises, lower optim.lr" in warning


def test_a_rate_that_is_far_too_small_is_named(tmp_path: Path) -> None:
    train(tmp_path / "run", "optim.lr=1e-9", "train.epochs=4", "method.name=linear")
    [warning] = warnings_of(tmp_path / "run")
    assert "optim.lr = 1e-09 may not suit this backbone" in warning
    assert "where it stays, raise optim.lr" in warning


def test_a_run_that_learns_has_no_warning(tmp_path: Path) -> None:
    train(tmp_path / "run", "optim.lr=0.5", "train.epochs=4", "optim.warmup_epochs=1")
    assert warnings_of(tmp_path / "run") == []
