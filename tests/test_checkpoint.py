"""Saved states: whole or not there, the newest two, damaged ones named; adapters that prove what they are."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt import checkpoint
from dist_vpt.checkpoint import read_adapters, restore, write_adapters
from dist_vpt.errors import RunFolderError, WeightsError
from dist_vpt.methods import attach
from dist_vpt.methods.recipe import VPTRecipe
from tests.forks import command
from tests.methods.conftest import make_backbone
from tests.running import metrics, train, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
OPTIONS = ("train.batch_size=250", "train.epochs=3", "run.save_every=1", "runtime.deterministic=true")


def kill_at(point: str) -> None:
    """Let this process kill itself, as a power cut or the system would, at a point of its fourth save."""
    saves = 0

    def counted(original: Callable[..., Any], when: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal saves
            saves += when == "tensors"
            if saves == 4 and when == point:
                if when == "tensors":
                    args[1].write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    torch.save = counted(torch.save, "tensors")
    checkpoint.write_atomically = counted(checkpoint.write_atomically, "json")
    checkpoint.os.replace = counted(os.replace, "rename")
    checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree, "prune")


@pytest.mark.parametrize("point", ["tensors", "json", "rename", "prune"])
def test_a_kill_during_a_save_loses_at_most_that_save(point: str, tmp_path: Path) -> None:
    train(tmp_path / "whole", *OPTIONS)
    folder = tmp_path / "run"
    killed = command(["train", *words(folder, *OPTIONS)], tmp_path / "told.txt", before=lambda rank: kill_at(point))
    assert killed.finish() == [-signal.SIGKILL], killed.output
    names = sorted(path.name for path in (folder / "state").glob("step-*"))
    assert names[-1] in ("step-00000003", "step-00000004")
    assert not (folder / "result.json").exists()
    train(folder, *OPTIONS, "run.resume=auto")
    assert metrics(folder) == metrics(tmp_path / "whole")
    left = sorted(path.name for path in (folder / "state").iterdir())
    assert left == ["step-00000011", "step-00000012"], "two states and no leavings"


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    train(tmp_path / "run", *OPTIONS)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "run.json").write_text('{"status": "interrupted"}')
    newest = tmp_path / "run" / "state" / "step-00000012" / "tensors.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(RunFolderError, match=r"step-00000012: damaged state .*remove this folder"):
        train(tmp_path / "run", *OPTIONS, "run.resume=auto")


def test_adapters_of_another_method_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vpt = attach(VPTRecipe(prompts=2), make_backbone(), 5)
    path = tmp_path / "a.safetensors"
    tensors = {name: p.detach().clone() for name, p in vpt.trainable()}
    write_adapters(path, tensors, {"classes": ["a", "b"]})
    found, facts = read_adapters(path)
    assert facts == {"classes": ["a", "b"]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    with pytest.raises(WeightsError, match=r"prompts has shape \(3, 2, 16\), this recipe's \(3, 4, 16\)"):
        restore(attach(VPTRecipe(prompts=4), make_backbone(), 5), found, path)
    with pytest.raises(WeightsError, match=r"missing: \['prompts'\]"):
        restore(vpt, {"head.weight": found["head.weight"], "head.bias": found["head.bias"]}, path)


def test_damaged_and_missing_adapters(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no adapters here"):
        read_adapters(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(WeightsError, match=r"bad.safetensors: damaged adapters"):
        read_adapters(tmp_path / "bad.safetensors")
