"""A process computes on its own GPU from its first call on, and on none where the recipe says so. GPUs are faked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.distributed.devices import ASK_NVML, select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.recipe.loading import load_recipe
from tests.running import words


@pytest.mark.parametrize(("local_rank", "gpus", "device"), [(3, 4, 3), (3, 2, 1), (None, 2, 0)])
def test_each_process_has_the_device_of_its_local_rank(
    local_rank: int | None, gpus: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    select_device("auto", LaunchEnv(local_rank=local_rank))
    assert chosen == [device]


def test_the_device_is_set_before_anything_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, sweep and evaluation: the first call is the choice of the device, from the recipe as it was given."""
    from dist_vpt.experiments import run, sweep
    from dist_vpt.inference import evaluate

    class Stopped(Exception):
        pass

    def stop(kind: str, launch: LaunchEnv) -> Any:
        raise Stopped(kind)

    def probed(*_: Any, **__: Any) -> Any:
        raise AssertionError("probed before the device was set")

    recipe = load_recipe([], words(tmp_path / "run", "runtime.device=cpu"))
    for module in (run, sweep, evaluate):
        monkeypatch.setattr(module, "select_device", stop)
        monkeypatch.setattr(module, "resolve_precision", probed)
        monkeypatch.setattr(module, "build_components", probed)
    monkeypatch.setattr(evaluate.RunFolder, "refuse_sweep", lambda folder: None)
    monkeypatch.setattr(evaluate.RunFolder, "load", lambda folder, overrides: recipe)
    for call in (
        lambda: run.run(recipe),
        lambda: sweep.sweep(recipe),
        lambda: evaluate.evaluate_run("r", "val", "last"),
    ):
        with pytest.raises(Stopped, match="cpu"):
            call()


def test_the_cpu_touches_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as torch sees it: a run with runtime.device=cpu neither pins memory nor opens a context."""
    source = """
import sys, torch
from dist_vpt.recipe.loading import load_recipe
def touched(*_, **__):
    raise AssertionError("a GPU was touched")
torch.cuda._lazy_init = touched  # what all functions of torch.cuda call that need a context
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
empty_like = torch.empty_like
def empty(*given, pin_memory=False, **options):
    assert not pin_memory
    return empty_like(*given, **options)
torch.empty_like = empty
from torch.utils.data import DataLoader
init = DataLoader.__init__
def made(self, *given, pin_memory=False, **options):
    assert not pin_memory
    init(self, *given, **options)
DataLoader.__init__ = made
from dist_vpt.experiments.run import run
print(run(load_recipe([], sys.argv[1:]))["device"])
"""
    options = words(tmp_path / "run", "runtime.device=cpu", "data.workers=1", "data.task=digits")
    done = subprocess.run(
        [sys.executable, "-c", source, *options], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.delenv(ASK_NVML, raising=False)
    select_device("cpu", LaunchEnv())
    assert os.environ.pop(ASK_NVML) == "1"
