"""A run resumes under another strategy and on another number of processes as if nothing had changed."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.training import engine
from tests.forks import command
from tests.running import ROOT, SMALLEST, few_images, step_losses

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
LEG = 20  # steps under one strategy
# Settings, and the strategies one after the other: single is one process, all others are two.
JOURNEYS = {
    "adamw": (
        ("optim.name=adamw", "protocol=default"),
        ("single", "ddp", "zero3", "ddp", "zero2", "ddp", "single"),
    ),
    "sgd": (
        ("optim.name=sgd", "protocol=published"),
        ("zero3_in_pieces", "single", "zero1", "zero3_in_pieces", "zero0", "zero3_offload"),
    ),
    # timm's count by groups (adan), and keep numbers that are no tensors and differ between groups (laprop).
    "adan": (("optim.name=adan", "train.model_ema_decay=0.9"), ("zero3_in_pieces", "single", "zero3")),
    "laprop": (
        ("optim.name=laprop", "method.name=lora", "method.rank=2", "optim.layer_decay=0.5"),
        ("zero2", "zero3_in_pieces", "ddp"),
    ),
    # All that ZeRO-3 shards is averaged.
    "sgdw": (
        ("optim.name=sgdw", "method.name=full", "optim.layer_decay=0.5", "train.model_ema_decay=0.9"),
        ("zero3", "zero2", "zero3_offload"),
    ),
}


def started_as(strategy: str, folder: Path) -> str:
    """The strategy argument of forks.command: shipped files, and two that users have no use for."""
    if strategy in ("single", "ddp"):
        return strategy
    own = folder / f"{strategy}.json"
    if strategy == "zero0":  # DeepSpeed without sharding
        own.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    elif strategy == "zero3_in_pieces":  # the shipped file keeps small tensors whole
        config = json.loads((ROOT / "launch" / "accelerate" / "zero3.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        own.write_text(json.dumps(config))
    else:
        return str(ROOT / "launch" / "accelerate" / f"{strategy}.json")
    return str(own)


def stop_at(step: int) -> Callable[[int], None]:
    """Lets main ask for a stop in its last step before ``step``."""

    def before(rank: int) -> None:
        train_step = engine.train_step

        def signaled(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
            if rank == 0 and t.step == step - 1:
                signal.raise_signal(signal.SIGUSR1)
            return train_step(t, *args, **kwargs)

        engine.train_step = signaled

    return before


@pytest.mark.parametrize("optimizer", JOURNEYS)
def test_another_strategy_and_number_of_processes(optimizer: str, tmp_path: Path) -> None:
    """One loss a step, all moments in the end, and three classes, which two processes do not share evenly."""
    settings, journey = JOURNEYS[optimizer]
    (tmp_path / "data").mkdir()
    smallest = SMALLEST if "method.name" not in "".join(settings) else [w for w in SMALLEST if "prompts" not in w]
    options = [
        *smallest, "optim.lr=0.01", *settings, f"data.root={few_images(tmp_path / 'data')}", "run.resume=auto",
        f"train.epochs={LEG * len(journey) // 6}", "run.save_every=1000",
    ]  # fmt: skip
    alone = command(["train", *options, f"run.dir={tmp_path / 'alone'}"], tmp_path / "alone.txt")
    assert alone.finish(120) == [0], alone.output[-3000:]
    for number, strategy in enumerate(journey):
        output, last = tmp_path / f"{number}.txt", number == len(journey) - 1
        before = (lambda rank: None) if last else stop_at(LEG * (number + 1))
        forks = command(
            ["train", *options, f"run.dir={tmp_path / 'run'}"], output, started_as(strategy, tmp_path), before
        )
        assert set(forks.finish(120)) == {0 if last else 75}, forks.output[-3000:]
        processes = 1 if journey[number - 1] == "single" else 2
        saved_by = f"{processes} x {journey[number - 1].partition('_')[0]}"
        assert not number or f"at step {LEG * number}, saved by {saved_by}\n" in forks.output, forks.output[-3000:]
    found, expected = (step_losses(tmp_path / name) for name in ("run", "alone"))
    assert len(found) == len(expected) == LEG * len(journey) // 6 * 6
    assert found == pytest.approx(expected, abs=1e-4)
    for file in ("state/step-*/tensors.safetensors", "adapters.safetensors"):
        found, expected = (load_file(max((tmp_path / name).glob(file))) for name in ("run", "alone"))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert float((tensor - expected[name]).abs().max()) < 1e-4, name
    reported, alone_s = (
        json.loads((tmp_path / name / "result.json").read_text())["last"]["test"]["loss"] for name in ("run", "alone")
    )
    assert evaluate_run(str(tmp_path / "run"), "test", "last")["loss"] == pytest.approx(reported, abs=1e-5)
    assert reported == pytest.approx(alone_s, abs=1e-4)
