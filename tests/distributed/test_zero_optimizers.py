"""timm's optimizers and the average of what they train, under ZeRO on two processes as on one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.cli.main import main
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import engine
from dist_vpt.training.accelerator import keep_process_group
from dist_vpt.training.zero_optimizer import SUPPORTED
from tests.forks import command, launched
from tests.running import ROOT, SMALLEST, few_images, metrics, step_losses
from tests.training.test_resume_elsewhere import started_as

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
NAMES = [name for name in SUPPORTED if name not in TORCH_OPTIMIZERS]
OPTIONS = ("optim.lr=0.01", "optim.weight_decay=0.1", "train.epochs=1", "train.model_ema_decay=0.7")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_images(tmp_path_factory.mktemp("images"))


def train_all(folder: Path, images: Path, strategy: str) -> None:
    """A run with each optimizer, one after the other in the same processes."""

    def work(_: int) -> int:
        keep_process_group()
        return max(
            main(
                ["train", *SMALLEST, *OPTIONS, f"optim.name={name}", f"data.root={images}", f"run.dir={folder / name}"]
            )
            for name in NAMES
        )

    forks = launched(work, folder.with_suffix(".txt"), strategy)
    assert set(forks.finish()) == {0}, forks.output[-3000:]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "single"
    train_all(folder, images, "single")
    return folder


@pytest.mark.parametrize("strategy", ["zero2", "zero3_in_pieces"])
def test_two_processes_equal_one(strategy: str, alone: Path, images: Path, tmp_path: Path) -> None:
    train_all(tmp_path / "runs", images, started_as(strategy, tmp_path))
    for name in NAMES:
        one, two = alone / name, tmp_path / "runs" / name
        assert len(step_losses(two)) == 6
        assert step_losses(two) == pytest.approx(step_losses(one), abs=1e-4), name
        for a, b in zip(metrics(one), metrics(two), strict=True):  # val is that of the average
            assert b == pytest.approx(a, abs=1e-4), name
        theirs, ours = (read_adapters(run / "adapters.safetensors")[0] for run in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours), name
        reported = json.loads((two / "result.json").read_text())["last"]["test"]["loss"]
        assert evaluate_run(str(two), "test", "last")["loss"] == pytest.approx(reported, abs=1e-5), name


def test_a_stop_while_zero3_scores_val_resumes_to_the_last_bit(images: Path, tmp_path: Path) -> None:
    """Shards of weights and of their average change places for scoring, and back where that ends early."""
    strategy = started_as("zero3_in_pieces", tmp_path)
    options = (
        *(word for word in SMALLEST if "prompts" not in word), "method.name=full", "optim.name=sgdw", "optim.lr=0.01",
        "train.epochs=2", "train.model_ema_decay=0.7", "data.train_on=train", "runtime.deterministic=true",
        f"data.root={images}",
    )  # fmt: skip

    def stop_in_val(rank: int) -> None:
        evaluate = engine.evaluate

        def stopped(*args: Any, **named: Any) -> Any:
            named["stop"].requested = rank == 1
            return evaluate(*args, **named)

        engine.evaluate = stopped

    for number, (name, before, code) in enumerate(
        (("whole", lambda rank: None, 0), ("parts", stop_in_val, 75), ("parts", lambda rank: None, 0))
    ):
        argv = ["train", *options, "run.resume=auto", f"run.dir={tmp_path / name}"]
        forks = command(argv, tmp_path / f"{number}.txt", strategy, before)
        assert set(forks.finish()) == {code}, forks.output[-3000:]
        assert ("while val was scored" in forks.output) == (code == 75)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    for file in ("adapters.safetensors", "best.safetensors"):
        one, two = (read_adapters(tmp_path / run / file)[0] for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_entries_of_a_configuration_that_do_not_go_with_a_recipe(images: Path, tmp_path: Path) -> None:
    """Before anything is trained, and reported once."""
    config = json.loads((ROOT / "launch" / "accelerate" / "zero3_offload.json").read_text())
    for key, entry, message in (
        ("offload_optimizer", {"ratio": 0.5}, "offload_optimizer.ratio = 0.5: DeepSpeed steps on what it does not"),
        ("offload_param", {"device": "nvme"}, "offload_param.device = nvme: weights on a disk cannot be averaged"),
    ):
        changed = config["zero_optimization"] | {key: config["zero_optimization"][key] | entry}
        file = tmp_path / f"{key}.json"
        file.write_text(json.dumps(config | {"zero_optimization": changed}))
        argv = ["train", *SMALLEST, *OPTIONS, f"data.root={images}", f"run.dir={tmp_path / key}"]
        forks = command(argv, tmp_path / f"{key}.txt", str(file))
        assert forks.finish() == [2, 2], forks.output[-3000:]
        assert forks.output.count(f"DeepSpeed configuration: zero_optimization.{message}") == 1, forks.output[-3000:]
        assert not (tmp_path / key).exists()
