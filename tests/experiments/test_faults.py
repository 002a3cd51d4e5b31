"""Bad input as a user meets it: one message with the place, the rule and the fix, and nothing half-written."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_vpt.backbones.build import DEMO
from dist_vpt.cli.main import main
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.folder import RunFolder
from tests.running import TINY, train


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def fault(run: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """What a user reads on standard error; the run folder is as it was before."""
    before = files(run)
    capsys.readouterr()
    assert main(["train", *TINY, f"run.dir={run}", *words]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert files(run) == before
    return captured.err


def test_unknown_key(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\noptim:\n  lrate: 3\n")
    message = fault(run, capsys, str(tmp_path / "a.yaml"))
    assert f"{tmp_path}/a.yaml:3: optim.lrate = 3: unknown key; did you mean " in message


def test_wrong_type(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fault(run, capsys, "train.epochs=many", "train.test=2")
    assert "2 mistakes in the recipe" in message
    assert "command line: train.epochs = 'many': must be a valid integer" in message
    assert "command line: train.test = 2: must be a valid boolean" in message


def test_missing_recipe(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    message = fault(run, capsys, str(tmp_path / "recip.yaml"))
    assert f"{tmp_path}/recip.yaml: no such recipe file; did you mean '{tmp_path}/recipe.yaml'?" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbone.name=vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224'?"),
        (
            ["backbone.name=resnet18"],
            "this version tunes timm's VisionTransformer, Eva and SwinTransformer models",
        ),
        (["data.image_size=30"], "must be a multiple of the patch size 4"),
        (["backbone.weights=nix.safetensors"], "nix.safetensors: no such weights file"),
        (["backbone.name=vit_tiny_patch16_224", "data.image_size=32"], "could not be downloaded"),
        (["method.layers=7"], "method.layers = 7: the backbone has 6 blocks"),
        (["data.task=mine", "data.format=image_folder", "data.root=/nix/da"], "/nix/da"),
        (["runtime.precision=fp16", "runtime.device=cpu"], "runtime.precision = fp16: needs a GPU"),
        (["data.task=nonsense"], "not a known task"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_exist_or_fit(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fault(run, capsys, *words)
    assert not run.exists()


def test_weights_of_another_architecture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["backbone.name=test_vit", f"backbone.weights={DEMO}", "data.image_size=32"]
    message = fault(run, capsys, *words)
    assert f"{DEMO}: not weights of this architecture" in message
    assert "of another shape: blocks.0" in message
    assert "backbone.load=lenient" not in message  # nothing would be loaded


def test_weights_with_code_in_them(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (target,))

    with open(tmp_path / "a.pth", "wb") as file:
        pickle.dump({"model": Payload()}, file, protocol=2)
    message = fault(run, capsys, f"backbone.weights={tmp_path}/a.pth")
    assert "Pickled objects are never executed" in message
    assert not target.exists()
    pickle.loads((tmp_path / "a.pth").read_bytes())
    assert target.exists()


def test_truncated_weights(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(DEMO.read_bytes()[:-100])
    assert "not a safetensors file" in fault(run, capsys, f"backbone.weights={tmp_path}/a.safetensors")


def test_weights_of_nothing_alike(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    words = [f"backbone.weights={tmp_path}/a.safetensors", "backbone.load=lenient"]
    assert "holds no blocks of a transformer: only timm's plain vision transformers" in fault(run, capsys, *words)


def test_the_folder_of_another_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(run)
    assert "holds a run already (status: done); use run.resume=auto" in fault(run, capsys)
    message = fault(run, capsys, "run.resume=auto", "optim.lr=0.7", "train.epochs=2")
    assert "holds the run of another recipe" in message
    assert "\n  optim.lr: 0.1 -> 0.7" in message
    assert "\n  train.epochs: 1 -> 2" in message


def test_the_folder_of_something_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.mkdir()
    (run / "thesis.tex").write_text("")
    assert "holds files (thesis.tex) but no run; choose another run.dir" in fault(run, capsys)
    assert "cannot be a run folder" in fault(run / "thesis.tex", capsys)


def test_two_runs_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe([], [*TINY, f"run.dir={run}"])
    with RunFolder(run).acquire(recipe):
        message = fault(run, capsys, "run.resume=auto")
        assert f"another run is at work here (process {os.getpid()} on " in message
        assert "wait for its end or choose another run.dir" in message
        assert RunFolder(run).status()["status"] == "running"


def test_a_batch_that_the_processes_do_not_divide(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_vpt.training.components import Components

    alone = Components.loader_options
    monkeypatch.setattr(Components, "loader_options", lambda self, rank, world: alone(self, rank, 3))
    assert main(["train", *TINY, f"run.dir={run}", "train.batch_size=8", "train.grad_accum_steps=2"]) == 2
    message = capsys.readouterr().err
    assert "error: batch_size 8: must be a multiple of 6 = 3 processes x 2 accumulated micro-batches; use 6 or 12" in (
        message
    )
    assert not run.exists()


def test_processes_that_accelerate_does_not_see(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = fault(run, capsys)
    assert "2 processes were started, but Accelerate sees 1" in message
    assert "accelerate launch" in message


def test_a_loss_that_is_not_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, f"run.dir={run}", "optim.lr=1e30", "train.batch_size=100"]) == 3
    message = capsys.readouterr().err
    assert message.startswith(f"error: {run}: the ")
    assert "lower optim.lr" in message
    assert "Traceback" not in message
    assert RunFolder(run).status()["status"] == "failed"
    assert "lower optim.lr" in RunFolder(run).status()["reason"]
    assert not (run / "adapters.safetensors").exists()
    assert not (run / "result.json").exists()


def test_the_module_that_accelerate_launches_speaks_alike(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_module = importlib.import_module("dist_vpt.train")
    assert train_module.main([f"run.dir={run}", "train.epoch=1"]) == 2
    assert "did you mean 'epochs'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        train_module.main([f"run.dir={run}", "train.epoch=1", "--debug"])
    assert not run.exists()


@pytest.mark.slow
def test_as_a_process_of_its_own(run: Path) -> None:
    words = [sys.executable, "-m", "dist_vpt", "train", f"run.dir={run}", "backbone.weights=nix.pth", "data.workers=0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: nix.pth: no such weights file; give backbone.weights an existing .safetensors, .pth or .npz\n"
    )
    assert not run.exists()
