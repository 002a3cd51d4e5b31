"""Part distributed of the acceptance on a GPU: a process over NCCL, ZeRO, a state taken over, memory that runs out."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_vpt.errors import OutOfMemory, UserError
from dist_vpt.training import engine
from tests.gpu.device import BACKBONE, DRY, KEY, accepts, command, cuda_only, train
from tests.running import metrics, step_losses, words

pytestmark = accepts
VPT = ("method.name=vpt", "method.prompts=4", "train.epochs=2")
FULL = ("method.name=full", "optim.lr=1e-4", "runtime.precision=bf16", "runtime.activation_checkpointing=block")


def launched(strategy: str, folder: Path, *overrides: str) -> None:
    """A run that accelerate starts as one process."""
    files = ["--config_file", f"launch/accelerate/{strategy}.yaml"]
    if strategy.startswith("zero"):
        files += ["--deepspeed_config_file", f"launch/accelerate/{strategy}.json"]
    options = ["--num_processes", "1", "--main_process_port", "0"]
    if DRY and strategy == "ddp":
        options.append("--cpu")
    key = "runtime.device=auto" if strategy != "ddp" else KEY  # DeepSpeed takes the CPU where there is no GPU
    rest = words(folder, key, *overrides)
    done = command("-m", "accelerate.commands.launch", *options, *files, "-m", "dist_vpt.train", *rest)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    "keys",
    [
        (*VPT, "train.grad_accum_steps=4"),
        (*VPT, "runtime.precision=bf16" if DRY else "runtime.precision=fp16", "optim.clip_norm=1"),
        ("method.name=vqt", "method.queries=2", "train.epochs=3"),
    ],
    ids=["accumulated", "fp16", "vqt"],
)
def test_ddp_gives_what_one_process_gives(keys: tuple[str, ...], tmp_path: Path) -> None:
    launched("ddp", tmp_path / "ddp", *keys)
    train(tmp_path / "alone", *keys)
    tolerance = 1e-3 if any("precision" in key for key in keys) else 1e-4
    assert step_losses(tmp_path / "ddp") == pytest.approx(step_losses(tmp_path / "alone"), rel=tolerance)


@pytest.mark.parametrize("keys", [VPT, FULL], ids=["vpt", "full"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_gives_what_one_process_gives(strategy: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    launched(strategy, tmp_path / "zero", *keys)
    train(tmp_path / "alone", *keys)
    found, wanted = step_losses(tmp_path / "zero"), step_losses(tmp_path / "alone")
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)
    assert found == pytest.approx(wanted, rel=2e-2)  # DeepSpeed's own optimizer arithmetic
    result = json.loads((tmp_path / "zero" / "result.json").read_text())
    assert result["strategy"] == strategy[:5]


def test_a_state_of_ddp_goes_on_under_zero3(tmp_path: Path) -> None:
    """The newest state is left out, so that the run has an epoch to go."""
    keys = (*VPT, "train.epochs=3", "run.save_every=5", "runtime.device=auto")
    launched("ddp", tmp_path / "ddp", *keys)
    shutil.copytree(tmp_path / "ddp", tmp_path / "taken")
    (tmp_path / "taken" / "result.json").unlink()
    newest = max((tmp_path / "taken" / "state").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    about = tmp_path / "taken" / "run.json"
    about.write_text(about.read_text().replace('"done"', '"interrupted"'))
    launched("zero3", tmp_path / "taken", *keys, "run.resume=auto")
    found, wanted = metrics(tmp_path / "taken"), metrics(tmp_path / "ddp")
    assert [(line["split"], line["epoch"]) for line in found] == [(line["split"], line["epoch"]) for line in wanted]
    assert found[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=1e-2)


def test_memory_that_runs_out_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is ignored, and 2 % of the GPU are given to torch."""
    if DRY:

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(engine, "train_step", full)
    else:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(OutOfMemory, match=r"runtime\.|train\.|memory"):
            train(tmp_path / "run", *VPT, *BACKBONE, "train.batch_size=128", "runtime.memory_check=ignore")
    finally:
        if not DRY:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


@cuda_only
def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4 * 2**30, 80 * 2**30))
    with pytest.raises(UserError, match=r"this run is estimated to hold .* GiB on a GPU of which 4\.0 GiB are free"):
        train(tmp_path / "run", *VPT, *BACKBONE, "train.batch_size=128", "runtime.precision=fp32")
