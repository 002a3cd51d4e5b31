"""Part methods of the acceptance on a GPU: methods in all precisions, cache places, the CPU's losses, resuming."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.errors import Interrupted
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import engine
from tests.gpu.device import DRY, accepts, train
from tests.running import metrics, step_losses
from tests.running import train as train_anywhere

pytestmark = accepts
METHODS = {
    "vpt": ("method.name=vpt", "method.prompts=4"),
    "vpt_shallow": ("method.name=vpt", "method.prompts=4", "method.deep=false"),
    "vpt_bias": ("method.name=vpt", "method.prompts=4", "method.extra_trainable=[bias]"),
    "vqt": ("method.name=vqt", "method.queries=2"),
    "vqt_projected": ("method.name=vqt", "method.queries=2", "method.form=projected"),
    "linear": ("method.name=linear",),
    "mlp": ("method.name=mlp",),
    "side": ("method.name=side",),
    "full": ("method.name=full",),
    "partial": ("method.name=partial",),
    "bias": ("method.name=bias",),
    "lora": ("method.name=lora",),
    "adapter": ("method.name=adapter",),
    "ssf": ("method.name=ssf",),
}
PLACES = ("none", "memory", "disk") if DRY else ("none", "device", "memory", "disk")
LEARN = ("optim.name=adamw", "optim.lr=1e-3", "optim.scale_lr=false", "optim.warmup_epochs=0", "train.epochs=4")


@pytest.mark.parametrize("precision", ["fp32", "bf16"] if DRY else ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_in_every_precision(method: str, precision: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, *METHODS[method], *LEARN, f"runtime.precision={precision}")
    losses = [line["loss"] for line in metrics(run) if line["split"] == "train"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert 0 < result["last"]["test"]["top1"] <= 100
    assert ("CPU" in result["device"] or "thread" in result["device"]) == DRY


@pytest.mark.parametrize("method", ["linear", "mlp", "side", "vqt", "vqt_projected"])
def test_the_place_of_a_cache_changes_no_loss(method: str, tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    for place in PLACES:
        run, keys = tmp_path / place, (f"stream.cache={place}", f"stream.dir={tmp_path / 'stream'}")
        train(run, *METHODS[method], *LEARN, *keys, "runtime.tf32=false", "runtime.precision=fp32")
        losses[place] = step_losses(run)
        line = next(line for line in (run / "train.log").read_text().splitlines() if "frozen stream: " in line)
        assert ("live" in line) == (place == "none")
        assert ("on the accelerator" in line) == (place == "device")
    for place in PLACES[1:]:
        assert losses[place] == pytest.approx(losses["none"], rel=1e-4), place


@pytest.mark.parametrize("method", ["vpt", "vqt", "lora", "full"])
def test_losses_are_the_cpus(method: str, tmp_path: Path) -> None:
    """In float32 without TF32, the first steps and the epoch's metrics."""
    keys = (*METHODS[method], *LEARN, "train.epochs=2", "runtime.tf32=false", "runtime.precision=fp32")
    train(tmp_path / "here", *keys)
    train_anywhere(tmp_path / "cpu", *keys, "runtime.device=cpu")
    here, cpu = step_losses(tmp_path / "here"), step_losses(tmp_path / "cpu")
    assert here == pytest.approx(cpu, rel=1e-3)
    assert here[0] == pytest.approx(cpu[0], rel=2e-5)


@pytest.mark.parametrize("method", ["vpt", "vqt", "full"])
def test_a_resumed_run_is_equal_to_the_last_bit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*METHODS[method], *LEARN, "runtime.deterministic=true", "runtime.precision=bf16", "run.save_every=3")
    train(tmp_path / "whole", *keys)
    step, done = engine.train_step, list[int]()

    def stopped_at_seven(*args: Any, **named: Any) -> Any:
        done.append(1)
        if len(done) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **named)

    monkeypatch.setattr(engine, "train_step", stopped_at_seven)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", *keys)
    monkeypatch.undo()
    train(tmp_path / "parts", *keys, "run.resume=auto")
    whole, parts = (read_adapters(tmp_path / name / "adapters.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert step_losses(tmp_path / "whole")[-1] == step_losses(tmp_path / "parts")[-1]


def test_images_of_workers_come_through_pinned_memory(tmp_path: Path) -> None:
    """Two workers, and the same losses as none."""
    losses = []
    for workers in (0, 2):
        run = tmp_path / str(workers)
        train(run, *METHODS["vpt"], *LEARN, f"data.workers={workers}", "runtime.tf32=false", "runtime.precision=fp32")
        losses.append(step_losses(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
