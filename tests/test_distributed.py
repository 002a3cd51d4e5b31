"""One process and two, DDP and every ZeRO stage: equal losses, whole adapters, resumable."""

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from dist_vpt.checkpoint import read_adapters
from dist_vpt.predict import score
from tests.running import finish, metrics, start, step_losses, train, wait_for, workers_of

pytestmark = pytest.mark.distributed
STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero3_offload")
# 1,000 images in batches of 60: the 17th is smaller and shared unevenly. Clipping and class weights span processes.
OPTIONS = ("train.batch_size=60", "train.epochs=2", "optim.clip_norm=1", "train.class_weights=inv", "method.prompts=3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(folder, *OPTIONS)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(strategy: str, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("train.accumulate=3",) if strategy in ("ddp", "zero2", "zero3") else ()
    process = start(strategy, folder, *OPTIONS, *more)
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    one, two = step_losses(alone), step_losses(folder)
    assert len(one) == len(two) == 34
    assert two == pytest.approx(one, abs=1e-4)
    for a, b in zip(metrics(alone), metrics(folder), strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    result = json.loads((folder / "result.json").read_text())
    assert (result["strategy"], result["processes"]) == (strategy.removesuffix("_offload"), 2)
    assert result["parameters"] == json.loads((alone / "result.json").read_text())["parameters"]
    ours, theirs = (read_adapters(run / "adapters.safetensors")[0] for run in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-4), name
    assert score(str(folder), "test", "last")["top1"] == pytest.approx(result["last"]["test"]["top1"])
    saved = sum(p.stat().st_size for p in (folder / "state").rglob("*") if p.is_file())
    assert saved < 2_000_000  # two states without the frozen 1.2 million weights


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_stopped_by_a_signal_to_one_process_and_resumed(strategy: str, tmp_path: Path) -> None:
    """State, optimiser and position come back; DDP's state goes on on one process."""
    options = (*OPTIONS, "optim.name=adamw", "optim.lr=0.01", "train.epochs=3")
    train(tmp_path / "whole", *options)
    folder = tmp_path / "run"
    process = start(strategy, folder, *options)
    log = folder / "train.log"
    wait_for(lambda: (log.exists() and "step 3/" in log.read_text()) or process.poll() is not None)
    workers_of(process)[-1].send_signal(signal.SIGUSR1)
    output = finish(process)
    assert process.returncode != 0
    assert "stopped at step" in output
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    if strategy == "ddp":
        train(folder, *options, "run.resume=auto")
    else:
        process = start(strategy, folder, *options, "run.resume=auto")
        output = finish(process)
        assert process.returncode == 0, output[-3000:]
        assert "resumed from" in output
    assert len(metrics(folder)) == len(metrics(tmp_path / "whole"))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(folder), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)


def test_zero3_trains_everything_with_checkpointing(tmp_path: Path) -> None:
    """Sharded weights gathered again in backward, for every weight of the backbone."""
    options = ("method.name=full", "optim.name=adamw", "optim.lr=1e-3", "train.batch_size=100", "optim.clip_norm=1")
    train(tmp_path / "alone", *options)
    process = start("zero3", tmp_path / "run", *options, "runtime.checkpointing=block")
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    assert step_losses(tmp_path / "run") == pytest.approx(step_losses(tmp_path / "alone"), abs=1e-4)


def test_a_batch_that_the_processes_do_not_divide(tmp_path: Path) -> None:
    process = start("ddp", tmp_path / "run", "train.batch_size=61")
    output = finish(process)
    assert process.returncode != 0
    assert "batch_size 61: must be a multiple of 2" in output
    assert not (tmp_path / "run" / "state").exists()


def test_an_unreadable_image_on_one_process_is_told_once_and_by_name(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    lines = []
    for i in range(40):
        Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(images / f"{i}.png")
        lines.append(f"images/{i}.png {i % 2}\n")
    for name in ("train800", "val200", "train800val200", "test"):
        (tmp_path / "data" / f"{name}.txt").write_text("".join(lines))
    (images / "7.png").write_bytes((images / "7.png").read_bytes()[:40])
    options = ("data.task=mine", "data.format=vtab_folder", f"data.root={tmp_path / 'data'}", "train.batch_size=4")
    process = start("ddp", tmp_path / "run", *options)
    output = finish(process)
    assert process.returncode != 0
    ours = output.split("ChildFailedError")[0]
    assert ours.count("error: ") == 1, output[-3000:]
    assert "7.png" in json.loads((tmp_path / "run" / "run.json").read_text())["reason"]
    process = start("ddp", tmp_path / "other", *options, "data.bad_images=skip")
    output = finish(process)
    assert process.returncode == 0, output[-3000:]
    skipped = json.loads((tmp_path / "other" / "result.json").read_text())["skipped_images"]
    assert [Path(name).name for name in skipped] == ["7.png"]
