"""Runs with balanced sampling: on one process or two, resumed or not, from a cached or a live stream."""

import json
from pathlib import Path

import pytest

from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.components import build_components
from tests.forks import command
from tests.running import SMALLEST, few_images, step_losses, train, words
from tests.training.test_resume_elsewhere import started_as, stop_at

BALANCED = ("train.sampling=balanced", "train.batch_size=4")


@pytest.fixture
def unbalanced(tmp_path: Path) -> Path:
    """22 images, of whose classes two are small."""
    root = tmp_path / "data"
    root.mkdir()
    few_images(root)
    for file in root.glob("*.txt"):
        lines = [line.split() for line in file.read_text().splitlines()]
        labels = [int(label) if int(Path(path).stem) < 5 else 0 for path, label in lines]
        file.write_text("".join(f"{path} {k}\n" for (path, _), k in zip(lines, labels, strict=True)))
    return root


@pytest.mark.distributed
@pytest.mark.usefixtures("on_the_cpu")
def test_two_processes_and_a_resumed_run_equal_one(unbalanced: Path, tmp_path: Path) -> None:
    options = [*SMALLEST, *BALANCED, f"data.root={unbalanced}", "run.resume=auto", "train.epochs=3", "optim.lr=0.01",
               "run.save_every=1000"]  # fmt: skip
    alone = command(["train", *options, f"run.dir={tmp_path / 'alone'}"], tmp_path / "alone.txt")
    assert alone.finish(120) == [0], alone.output[-3000:]
    for number, (strategy, until) in enumerate((("ddp", 8), ("single", 14), ("ddp", None))):
        before = stop_at(until) if until else (lambda rank: None)
        argv = ["train", *options, f"run.dir={tmp_path / 'run'}"]
        forks = command(argv, tmp_path / f"{number}.txt", started_as(strategy, tmp_path), before)
        assert set(forks.finish(120)) == {75 if until else 0}, forks.output[-3000:]
    assert step_losses(tmp_path / "run") == pytest.approx(step_losses(tmp_path / "alone"), abs=1e-5)
    assert len(step_losses(tmp_path / "run")) == 18
    scores = [json.loads((tmp_path / name / "result.json").read_text())["last"] for name in ("alone", "run")]
    assert scores[1]["test"]["loss"] == pytest.approx(scores[0]["test"]["loss"], abs=1e-5)


def test_cached_and_live_streams_give_the_same_losses(tmp_path: Path) -> None:
    for cache in ("none", "memory"):
        more = ("method.name=linear", "train.sampling=balanced", "train.epochs=2", f"stream.cache={cache}")
        train(tmp_path / cache, *more)
    losses = step_losses(tmp_path / "none")
    assert step_losses(tmp_path / "memory") == pytest.approx(losses, rel=1e-6)
    train(tmp_path / "shuffled", "method.name=linear", "train.epochs=2")
    assert step_losses(tmp_path / "shuffled") != pytest.approx(losses, rel=1e-3)


def test_what_is_said_of_it(unbalanced: Path, tmp_path: Path) -> None:
    options = [*SMALLEST, *BALANCED, f"data.root={unbalanced}"]
    parts = build_components(load_recipe([], options))
    assert (
        "train.sampling = balanced: an epoch draws 7 images of each class on average, from 1 to 19 that it has"
        in parts.remarks()
    )
    assert parts.guessing().majority == pytest.approx(1 / 3)
    recipe = load_recipe([], words(tmp_path, "train.sampling=balanced", "train.class_weights=inv"))
    assert [line for line in recipe.warnings if "sampling" in line] == [
        "train.sampling = balanced and train.class_weights = inv both make up for the numbers of images, so that small "
        "classes count for more than large ones; set either"
    ]
